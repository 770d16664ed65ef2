"""Rubbish in: exit status 2, one line that names it, no traceback, nothing written, no great memory."""

import gzip
import resource
import shutil

import nibabel as nib
import numpy as np
import pytest
import rubbish
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import helpers
from config import InputError


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
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:] and message in lines[-1], errors
    assert not list(tmp_path.glob("out/*"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


def test_the_corpus_is_not_small():
    assert len(rubbish.CORPUS) >= 40


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
        image, affine = helpers.read_image(path)
        volume = helpers.to_network(
            helpers.Volume(image, affine), helpers.network_grid(affine, image.shape, (8, 8, 8), 3.0), (8, 8, 8)
        )
        assert np.isfinite(volume.image).all()
    except InputError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
