"""Rubbish in: exit status 2, one line that names it, no traceback, nothing written, no great memory."""

import contextlib
import gzip
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import rubbish
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import helpers
import inference
import train
from extras.errors import InputError


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rubbish")
    rubbish.make_folder(folder)
    return folder


@pytest.mark.parametrize("name", rubbish.CORPUS)
def test_rubbish_ends_with_one_line(name, base, tmp_path):
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    script, words, message = rubbish.CORPUS[name](tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status, errors = rubbish.run(script, words)
    lines = errors.strip().splitlines()
    assert status == 2 and "Traceback" not in errors, errors
    in_one_line = [line for line in lines if line.startswith("error: ")] == lines[-1:] and message in lines[-1]
    in_tyros_words = "--help" in errors and message.split(":")[0] in errors
    assert in_one_line or in_tyros_words, errors
    assert not list(tmp_path.glob("out/*"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


@contextlib.contextmanager
def as_an_ordinary_user():
    """Root may read everything."""
    "".encode("utf-8-sig")  # that user may not be able to load it
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("name", ["moving_images", "fixed_labels/train00.nii.gz", "patients.csv"])
def test_what_may_not_be_read_is_named(name, base):
    with tempfile.TemporaryDirectory() as folder:  # which, unlike pytest's, others may look into
        shutil.copytree(base / "example" / "train", Path(folder, "data"))
        Path(folder, "data", "patients.csv").write_text("case,patient\ntrain00,a\n")
        os.chmod(folder, 0o777)
        Path(folder, "data", name).chmod(0)
        words = [*rubbish.TINY, f"--train_dir={folder}/data", f"--model_dir={folder}/out"]
        with as_an_ordinary_user():
            status, errors = rubbish.run(train, words)
        Path(folder, "data", name).chmod(0o755)
    last = errors.splitlines()[-1]
    assert status == 2 and f"{folder}/data/{name}" in last and ("denied" in last or "cannot be read" in last), errors


@pytest.mark.parametrize("script, kilobytes", [(train, 300), (inference, 4000)])
def test_a_full_disk_is_named_and_leaves_nothing_unfinished(script, kilobytes, base, tmp_path):
    """A real file system of so many kilobytes for what is written."""
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    disk = tmp_path / "out"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a small file system here")
    try:
        quick = " ".join(rubbish.QUICK) if script is train else ""
        _, words, _ = rubbish.of_request(script, quick, "")(tmp_path)
        command = [sys.executable, f"{script.__name__}.py", *words]
        done = subprocess.run(command, cwd=rubbish.ROOT, capture_output=True, text=True)
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 2 and last.startswith(f"error: {disk}/"), done.stderr
        assert ("No space left" in last or "bytes free" in last) and "Traceback" not in done.stderr, done.stderr
        assert not list(disk.rglob(".unfinished*"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    """The bytes of a small good file, and where to write spoilt ones."""
    rng = np.random.default_rng(0)
    image = nib.Nifti1Image(rng.integers(0, 200, (6, 5, 4), np.uint8), np.diag([2.0, 2, 3, 1]))
    return image.to_bytes(), tmp_path_factory.mktemp("fuzz")


@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    changes=st.lists(st.tuples(st.integers(0, 355), st.binary(min_size=1, max_size=8)), min_size=1, max_size=6),
    keep=st.integers(0, 600),
    compressed=st.booleans(),
)
def test_no_header_raises_anything_else(changes, keep, compressed, small_file):
    """Random bytes anywhere in the header, any length: a file is read, or it is refused by name."""
    data, folder = bytearray(small_file[0]), small_file[1]
    for offset, values in changes:
        data[offset : offset + len(values)] = values
    path = folder / ("a.nii.gz" if compressed else "a.nii")
    path.write_bytes(gzip.compress(bytes(data[:keep]), 1) if compressed else bytes(data[:keep]))
    try:
        volume = helpers.read_image(path)
        grid = helpers.network_grid(volume.affine, volume.image.shape, (8, 8, 8), 3.0)
        assert np.isfinite(helpers.to_network(volume, grid, (8, 8, 8)).image).all()
    except InputError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
