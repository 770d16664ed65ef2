"""What people's real files do to registration tools, by public fault reports; each kind with what a user expects."""

import os
import shlex
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rubbish import TINY
from scipy import ndimage

import helpers
import inference
import utils
from config import TrainConfig, as_json
from extras import checkpoint, files, report
from extras.errors import InputError
from networks import NETWORKS

ROOT = Path(__file__).resolve().parents[1]
SMALL = TrainConfig(voxel_size=6, fixed_shape=(12, 14, 11), moving_shape=(16, 16, 16), channels=2, network="local")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A network as it is before training: it deforms nothing."""
    folder = tmp_path_factory.mktemp("untrained") / "model"
    folder.mkdir()
    (folder / "config.json").write_text(as_json(SMALL))
    network = NETWORKS["local"](**SMALL.network_options())
    checkpoint.save_weights(network, folder, checkpoint.TrainingState([]))
    return folder


@pytest.fixture
def pair(tmp_path):
    """Paths of a moving and a fixed image of 12 mm balls in texture."""
    rng, paths = np.random.default_rng(0), []
    for name, shape in (("mr", (30, 32, 28)), ("us", (26, 28, 24))):
        distance = np.linalg.norm(np.moveaxis(np.indices(shape), 0, -1) - np.array(shape) / 2, axis=-1)
        image = 100 + 50 * (distance < 6) + rng.normal(0, 5, shape)
        paths.append(tmp_path / f"{name}.nii.gz")
        files.write_nifti(paths[-1], image.astype(np.float32), np.diag([2.0, 2, 2, 1]))
    return paths


# -- Headers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codes", [(1, 0), (1, 1), (0, 1), (2, 3), (0, 0)])
def test_conflicting_sizes_in_a_header_are_named_with_what_is_used_and_what_itk_takes(codes, pair, model, call):
    """pixdim says 2 x 2 x 3 mm, the sform 1.05 x 1.05 x 3 mm, as after a change of one of the two."""
    path = pair[0].with_name("odd.nii")
    header = nib.load(pair[0]).header
    header.set_qform(np.diag([1.05, 1.05, 3, 1]), codes[1])
    header["pixdim"][1:4] = 2, 2, 3
    header.set_sform(np.diag([1.05, 1.05, 3, 1]), codes[0])
    nib.save(nib.Nifti1Image(nib.load(pair[0]).get_fdata(dtype=np.float32), None, header), path)
    words = [f"--model_dir={model}", f"--moving={path}", f"--fixed={pair[1]}", f"--output_dir={path.parent / 'out'}"]
    status, out, err = call(inference, *words)
    assert status == 0, err
    used = [1.05, 1.05, 3] if codes[0] else [2, 2, 3]
    np.testing.assert_allclose(nib.affines.voxel_sizes(files.read_nifti(path)[1]), used, rtol=1e-5)
    np.testing.assert_allclose(sitk.ReadImage(str(path)).GetSpacing(), [2, 2, 3])
    line = f"{np.array(used, float)} is used here, ITK takes pixdim"
    assert out.count("by its sform, [2. 2. 3.] by its pixdim") == 1 and line in out, out


# -- Labels that vanish ----------------------------------------------------------------------------------------------


def test_a_label_that_no_longer_has_a_voxel_is_named_everywhere(pair, model, tmp_path, call):
    """One that is too small for the fixed image's voxels, one that lies outside of it, and one that stays."""
    for side, path in zip(("moving", "fixed"), pair, strict=True):
        image, affine = files.read_nifti(path)
        middle, labels = np.array(image.shape) // 2, np.zeros((*image.shape, 4), np.uint8)
        labels[..., :2] = (np.linalg.norm(np.moveaxis(np.indices(image.shape), 0, -1) - middle, axis=-1) < 6)[..., None]
        labels[..., 1] = np.roll(labels[..., 1], 1, axis=0)
        labels[(*middle, 2)] = 1
        labels[(1, 1, 1, 3) if side == "moving" else (*middle, 3)] = 1
        if side == "fixed":  # another part of it, and half a voxel aside
            affine = affine @ nib.affines.from_matvec(np.eye(3), [3.5, 3.5, 3.5])
        for kind, data in (("images", image), ("labels", labels)):
            folder = tmp_path / "set" / f"{side}_{kind}"
            folder.mkdir(parents=True)
            files.write_nifti(folder / "a.nii.gz", data, affine)
    words = [f"--model_dir={model}", f"--test_dir={tmp_path / 'set'}", f"--output_dir={tmp_path / 'out'}"]
    status, out, err = call(inference, *words, "--initial_alignment=header")
    assert status == 0, err
    stored = nib.load(tmp_path / "out" / "a" / "warped_labels.nii.gz").get_fdata().any(axis=(0, 1, 2))
    assert list(stored) == [True, True, False, False]
    table = report.read_metrics(tmp_path / "out" / "metrics.csv")
    assert list(table["lost"].fillna("")) == ["", "", "too small for the fixed image's grid", "outside the fixed image"]
    for k in (2, 3):
        assert f"warning: a: label {k} is not in warped_labels.nii.gz: {table['lost'][k]}" in out
        assert f"a, label {k}: {table['lost'][k]}" in (tmp_path / "out" / "summary.txt").read_text()
    assert "labels that are not in warped_labels.nii.gz: 2 of 4" in out


def test_a_label_that_teaches_nothing_is_named_with_the_reason(tmp_path, rng, capsys):
    shape, affine = (60, 60, 60), np.diag([0.3, 0.3, 0.3, 1])
    labels = np.zeros((*shape, 3), np.uint8)
    labels[20:40, 20:40, 20:40, 0] = labels[30, 30, 30, 1] = labels[-3:, -3:, -3:, 2] = 1
    for side in ("moving", "fixed"):
        for kind, data in (("images", rng.random(shape).astype(np.float32)), ("labels", labels)):
            (tmp_path / f"{side}_{kind}").mkdir()
            files.write_nifti(tmp_path / f"{side}_{kind}" / "a.nii", data, affine)
    prepared = helpers.PreparedPairs(helpers.find_pairs(tmp_path), "centre", (4, 4, 4), (4, 4, 4), 3.0)
    out = capsys.readouterr().out
    for side in ("moving", "fixed"):
        start = f"warning: labels of {tmp_path / f'{side}_images' / 'a.nii'}: label"
        assert f"{start} 1 is too small for the network grid and teaches nothing" in out, out
        assert f"{start} 2 lies outside the network grid and teaches nothing" in out, out
    assert helpers.whole_pair(prepared, 0)["mask"].tolist() == [[1, 0, 0]]


# -- Intensities -----------------------------------------------------------------------------------------------------


def test_outside_the_moving_image_the_warped_one_is_as_dark_as_it_ever_is(pair, model, tmp_path, call):
    image, affine = files.read_nifti(pair[0])
    small = (image - 1024)[8:-8, 8:-8, 8:-8]  # as CT has it, with tissue below 0
    affine[:3, 3] += 16
    files.write_nifti(pair[0], small, affine)
    words = [f"--model_dir={model}", f"--moving={pair[0]}", f"--fixed={pair[1]}", f"--output_dir={tmp_path / 'out'}"]
    assert call(inference, *words)[0] == 0
    warped = nib.load(tmp_path / "out" / "mr_to_us" / "warped_image.nii.gz").get_fdata()
    assert warped[0, 0, 0] == warped.min() == pytest.approx(small.min())


# -- Names and paths -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "folder, what",
    [
        *((b"M\xfcller", what) for what in ("moving", "output_dir", "model_dir")),
        (b"line\nbreak", "moving"),
        (b"long" * 60, "output_dir"),
    ],
)
def test_a_path_that_not_all_can_take_is_one_line_before_any_work(folder, what, pair, model, tmp_path, call):
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + folder))
    odd.mkdir()
    paths = {"moving": pair[0], "fixed": pair[1], "model_dir": model, "output_dir": tmp_path / "out"}
    paths[what] = {
        "moving": lambda: shutil.copy(pair[0], odd),
        "model_dir": lambda: shutil.copytree(model, odd / "model"),
        "output_dir": lambda: odd / "out",
    }[what]()
    done = subprocess.run(
        [sys.executable, "inference.py", *(f"--{name}={path}" for name, path in paths.items())],
        capture_output=True,
        cwd=ROOT,
    )
    error = done.stderr.decode(errors="replace")
    assert done.returncode == 2 and "Traceback" not in error, error
    expected = "a name of 240 bytes, longlonglong" if len(folder) > 200 else "the name"
    assert f"found {expected}" in error.strip().splitlines()[-1] and not list(odd.glob("out/*")), error


def test_a_folder_that_the_names_of_both_images_make_too_long_is_one_line(pair, model, tmp_path, call):
    long = [
        shutil.copy(path, path.with_name(f"{letter * 120}.nii.gz")) for path, letter in zip(pair, "ab", strict=True)
    ]
    words = [f"--model_dir={model}", f"--moving={long[0]}", f"--fixed={long[1]}", f"--output_dir={tmp_path / 'out'}"]
    status, _, err = call(inference, *words)
    assert status == 2 and "found a name of 244 bytes" in err.splitlines()[-1] and not list(tmp_path.glob("out/*")), err


def test_accents_in_both_spellings_of_unicode_are_one_name(tmp_path, rng):
    composed, decomposed = (unicodedata.normalize(form, "Müller") for form in ("NFC", "NFD"))
    for folder, name in zip(helpers.FOLDERS, (composed, decomposed, composed, decomposed), strict=True):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.nii.gz").touch()
    (tmp_path / "patients.csv").write_text(f"case,patient\n{decomposed},a\n", encoding="utf-8")
    (pair,) = helpers.find_pairs(tmp_path)
    assert pair.case == composed and pair.patient == "a" and pair.fixed_image.stem.startswith(decomposed)
    (tmp_path / "moving_images" / f"{decomposed}.nii.gz").touch()
    with pytest.raises(InputError, match="found the same case as in 'Mu.u0308ller.nii.gz', expected one file"):
        helpers.find_pairs(tmp_path)


@pytest.mark.parametrize("name", ["us.NII.GZ", "us.nii.GZ", "US.Nii.gz", 'us.x y\'s "z".nii.gz'])
def test_endings_and_signs_in_names(name, pair, model, tmp_path, call):
    """What nibabel opens is read, whatever the case of its ending; what it does not is one line with the name given."""
    shutil.copy(pair[1], tmp_path / name)
    words = [
        f"--model_dir={model}",
        f"--moving={pair[0]}",
        f"--fixed={tmp_path / name}",
        f"--output_dir={tmp_path / 'o'}",
    ]
    status, _, err = call(inference, *words)
    if name == "US.Nii.gz":
        assert status == 2 and f"{tmp_path / name}: cannot be read" in err and "small letters" in err, err
    else:
        assert status == 0, err
        case = name[: name.lower().index(".nii")]
        assert (tmp_path / "o" / f"mr_to_{case}" / "displacement.nii.gz").exists()


def test_the_next_command_works_as_printed_from_where_the_user_stands(example, tmp_path):
    folder = tmp_path / "it's here"
    folder.mkdir()
    shutil.copytree(example / "train", folder / "my pairs")
    words = [sys.executable, str(ROOT / "train.py"), *TINY, "--network=local", "--steps=1", "--train_dir=my pairs"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True)
    command = done.stdout.split("next: ")[1].strip()
    assert command.endswith(" --moving FILE --fixed FILE")
    images = [shlex.quote(f"my pairs/{side}_images/train00.nii.gz") for side in ("moving", "fixed")]
    command = command.replace("--moving FILE --fixed FILE", f"--moving {images[0]} --fixed {images[1]}")
    subprocess.run(command, shell=True, cwd=folder, check=True)
    assert (folder / "output" / "train00_to_train00" / "displacement.nii.gz").exists()


def test_a_project_that_was_copied_uses_its_own_example_data(example, model, tmp_path):
    for name in ("old", "new"):
        shutil.copytree(
            ROOT, tmp_path / name, ignore=shutil.ignore_patterns(".*", "example", "output", "model", "tests")
        )
        shutil.copytree(example, tmp_path / name / "data" / "example")
    shutil.copytree(model, tmp_path / "new" / "model")
    shutil.rmtree(tmp_path / "old")
    done = subprocess.run([sys.executable, "inference.py"], cwd=tmp_path / "new", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = (tmp_path / "new" / "output" / "test00" / "pair.txt").read_text()
    assert record.startswith(str(tmp_path / "new" / "data" / "example"))


# -- All at once -----------------------------------------------------------------------------------------------------


def scene(shape, centre, seed):
    """A bright ball, a landmark in it and noise: image and labels (*shape, 2)."""
    distance = [
        np.linalg.norm(np.moveaxis(np.indices(shape), 0, -1) - np.array(place), axis=-1)
        for place in (centre, np.add(centre, (3, -2, 1)))
    ]
    labels = np.stack([d < radius for d, radius in zip(distance, (7, 2.5), strict=True)], axis=-1)
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1)
    return 300 + 500 * labels[..., 0] + 60 * noise, labels.astype(np.uint8)


def register(moving, fixed):
    """TRE in mm of a pair's landmark by a method that needs no training: the centroids of what is bright."""
    grid = "centre", (30, 30, 30), (26, 26, 26), 2.0
    on_grid = helpers.pair_to_network(moving, fixed, *grid)
    bright = [np.float32(volume.image[None] > 0.65) for volume in on_grid]
    offset = utils.moving_offset(grid[1], grid[2])
    shift = (utils.centroids(bright[0]) - utils.centroids(bright[1]) - offset).numpy()[0, 0]
    ddf = np.broadcast_to(shift, (26, 26, 26, 3)).astype(np.float32)
    geometry = on_grid[1].affine, on_grid[0].affine, offset
    displacement = utils.displacement_on(fixed.image.shape, fixed.affine, ddf, *geometry)
    warped = inference.warp_volume(moving, displacement, fixed.affine)
    stored = inference.labels_to_store(moving, warped, displacement)
    rows = report.measure_pair(
        "a", moving, fixed, {"before": warped, "after": warped}, {"after": ddf}, geometry, stored
    )
    return rows[1]["tre_after_mm"]


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    orientation=st.sampled_from(["RAS", "LPS", "PIR", "SLA"]),
    codes=st.tuples(st.sampled_from([0, 1, 2]), st.sampled_from([0, 1])),
    zooms=st.sampled_from([None, (2.0, 2.0, 2.0), (1.0, 2.0, 3.0)]),
    padding=st.sampled_from([None, -32768, -1024, -1, 0, 4095]),
    border=st.integers(0, 12),
    label_size=st.sampled_from([0, 1, 2]),
    kind=st.sampled_from([np.int16, np.float32, np.float64]),
    slope=st.sampled_from([1.0, 0.5, 10.0]),
)
def test_no_change_of_a_file_changes_the_result_silently(
    orientation, codes, zooms, padding, border, label_size, kind, slope, tmp_path_factory, capsys
):
    """Headers, padding, types and labels of all sizes: TRE within 10 %, or a warning, or one line; no traceback."""
    folder = tmp_path_factory.mktemp("files")
    affine, paths = np.diag([2.0, 2, 2, 1]), {}
    for side, shape, centre in (("moving", (30, 30, 30), (17, 13, 14)), ("fixed", (26, 26, 26), (12, 14, 13))):
        image, labels = scene(shape, centre, len(side))
        for name, (data, grid) in {"plain": ((image, labels), affine), "changed": ((image, labels), affine)}.items():
            data, marks = data
            if name == "changed" and side == "moving":
                if padding is not None and border:
                    size = ((border, border),) * 3
                    data = np.pad(data, size, constant_values=padding)
                    marks = np.pad(marks, (*size, (0, 0)))
                if label_size < 2:
                    place = np.argwhere(marks[..., 1]).mean(axis=0).round().astype(int)
                    marks[..., 1] = 0
                    marks[(*[slice(c - label_size, c + label_size + 1) for c in place], 1)] = 1
            for what, values in (("images", data), ("labels", marks)):
                stored = nib.Nifti1Image((values / slope).astype(kind) if what == "images" else values, grid)
                stored.set_sform(grid, 1), stored.set_qform(grid, 1)
                if name == "changed":
                    change = nib.orientations.ornt_transform(
                        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(orientation)
                    )
                    stored = stored.as_reoriented(change)
                    matrix = stored.affine
                    stored.set_sform(matrix, codes[0]), stored.set_qform(matrix, codes[1])
                    if zooms:
                        stored.header["pixdim"][1:4] = zooms
                paths[name, side, what] = folder / f"{name}_{side}_{what}.nii"
                nib.save(stored, paths[name, side, what])
    results = {}
    for name in ("plain", "changed"):
        capsys.readouterr()
        try:
            volumes = []
            for side in ("moving", "fixed"):
                files.warn_of_frame(paths[name, side, "images"])
                volumes.append(helpers.read_image(paths[name, side, "images"]))
                volumes[-1].labels, volumes[-1].is_map = helpers.read_labels(paths[name, side, "labels"], volumes[-1])
            results[name] = register(*volumes)
        except InputError as error:
            assert str(error).startswith(str(folder)) and "\n" not in str(error)
            results[name] = None
        told = "warning" in capsys.readouterr().out
    assert results["plain"] < 1.5
    if results["changed"] is not None and not told:
        assert abs(results["changed"] - results["plain"]) < 0.1 * results["plain"] + 0.25, results


@pytest.mark.parametrize("padding", [-32768, -1000])
def test_padding_around_the_fan_is_named_once_and_changes_nothing(padding, capsys, tmp_path):
    image, _ = scene((26, 26, 26), (12, 14, 13), 1)
    image[:6] = 0
    grid = helpers.network_grid(np.diag([2.0, 2, 2, 1]), image.shape, (26, 26, 26), 2.0)
    plain, padded = (
        helpers.to_network(
            helpers.Volume(np.where(image == 0, value, image), np.diag([2.0, 2, 2, 1]), tmp_path / "us"),
            grid,
            (26, 26, 26),
        ).image
        for value in (0, padding)
    )
    np.testing.assert_allclose(plain, padded, atol=1e-6)
    assert (
        capsys.readouterr().out == f"warning: {tmp_path / 'us'}: 23 % of its voxels are {padding}, taken as padding\n"
    )
