"""train.py and inference.py as a user runs them, small: every option, what they write, and what bad input does."""

import csv
import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

import config
import inference
import train

ROOT = Path(__file__).resolve().parents[1]
TINY = "--voxel_size 6 --fixed_shape 12 14 11 --moving_shape 16 16 16 --channels 2 --global_channels 2 --first_kernel 3"
TINY = [*TINY.split(), "--batch_size", "2"]


def folders(example):
    return [f"--{name}_dir={example / name}" for name in ("train", "valid", "test")]


@pytest.mark.parametrize(
    "options",
    [
        "--network local --similarity dice --regulariser bending --ddf_levels 0 2 4",
        "--network global --similarity cross-entropy --regulariser gradient-l2 --labels_per_pair 1",
        "--network composite --similarity mean-squared --regulariser gradient-l1 --mirror_axis -1",
        "--network centred --labels_per_pair 1 --similarity jaccard --similarity_scales 0 --cross_patient 0 --folds 3",
    ],
)
def test_every_option_trains_and_registers(options, example, tmp_path, call):
    model, output = f"--model_dir={tmp_path / 'model'}", f"--output_dir={tmp_path / 'output'}"
    words = [*options.split(), *TINY, "--steps", 4, "--valid_every", 2]
    named = [word for word in folders(example) if not ("--folds" in options and word.startswith("--test_dir"))]
    status, out, err = call(train, *words, *named, model)
    assert status == 0, err
    assert out.splitlines()[-1].endswith(f"next: python inference.py --model_dir {tmp_path / 'model'}")
    written = {path.name.split(".")[0] for path in (tmp_path / "model").iterdir()}
    assert written == {"config", "best", "last", "history", "events"}
    with open(tmp_path / "model" / "history.csv") as file:
        history = list(csv.DictReader(file))
    assert [row["step"] for row in history] == ["2", "4"]
    assert all(np.isfinite(float(value)) for row in history for value in row.values())

    status, out, err = call(inference, model, output)
    assert status == 0, err
    cases = {"train00", "train01", "train02"} if "--folds" in options else {"test00", "test01"}
    found = {path.name for path in (tmp_path / "output").iterdir()}
    assert found - cases == {"metrics.csv", "summary.txt", "boxplot.png"}
    assert len(found & cases) == (1 if "--folds" in options else 2)


@pytest.fixture(scope="module")
def trained(example, tmp_path_factory):
    """A model trained by the command itself, in a process of its own."""
    folder = tmp_path_factory.mktemp("trained") / "model"
    words = [
        "--steps=150",
        "--valid_every=50",
        "--ddf_levels",
        "1",
        "2",
        "--learning_rate=3e-3",
        f"--model_dir={folder}",
    ]
    subprocess.run([sys.executable, "train.py", *TINY, *words, *folders(example)], cwd=ROOT, check=True)
    return folder


def test_it_learns_and_does_not_fold(trained, example, tmp_path, call):
    with open(trained / "history.csv") as file:
        history = list(csv.DictReader(file))
    assert float(history[-1]["valid_loss"]) < 0.8 * float(history[0]["valid_loss"])
    words = [f"--model_dir={trained}", f"--test_dir={example / 'train'}", f"--output_dir={tmp_path}"]
    status, _, err = call(inference, *words)
    assert status == 0, err
    with open(tmp_path / "metrics.csv") as file:
        glands = [row for row in csv.DictReader(file) if row["label"] == "0"]
    for column, better in (("dice_{}", 1), ("hd95_{}_mm", -1), ("true_error_{}_mm", -1)):
        before, after = (np.mean([float(row[column.format(when)]) for row in glands]) for when in ("before", "after"))
        assert better * after > better * before, column
    assert all(float(row["folded_percent"]) == 0 for row in glands)


def test_one_new_pair_needs_no_labels_and_itk_reads_what_is_written(trained, example, tmp_path, call):
    moving, fixed = (example / "test" / f"{side}_images" / "test00.nii.gz" for side in ("moving", "fixed"))
    shutil.copy(moving, tmp_path / "mr.nii.gz")
    nib.save(nib.load(fixed), tmp_path / "us.nii")  # not compressed
    words = [f"--model_dir={trained}", f"--output_dir={tmp_path / 'output'}"]
    status, out, err = call(inference, *words, f"--moving={tmp_path / 'mr.nii.gz'}", f"--fixed={tmp_path / 'us.nii'}")
    assert status == 0, err
    folder = tmp_path / "output" / "mr_to_us"
    assert {path.name for path in folder.iterdir()} == {
        *("warped_image.nii.gz", "displacement.nii.gz", "overview.png"),
        *("metrics.csv", "summary.txt"),  # its own: those of a whole test run stay as they are
    }
    warped = sitk.ReadImage(str(folder / "warped_image.nii.gz"), sitk.sitkFloat32)
    field = sitk.ReadImage(str(folder / "displacement.nii.gz"), sitk.sitkVectorFloat64)
    original = sitk.ReadImage(str(moving), sitk.sitkFloat32)
    theirs = sitk.Resample(original, warped, sitk.DisplacementFieldTransform(field), sitk.sitkLinear, 0.0)
    difference = np.abs(sitk.GetArrayFromImage(warped) - sitk.GetArrayFromImage(theirs))
    value_range = np.ptp(sitk.GetArrayFromImage(original))
    assert np.mean(difference > 1e-3 * value_range) < 1e-3
    np.testing.assert_allclose(nib.load(folder / "warped_image.nii.gz").affine, nib.load(fixed).affine, atol=1e-4)


def test_the_header_given_results_do_not_depend_on_storage_order(trained, example, tmp_path, call):
    results = []
    for orientation in ("RAS", "SLP"):
        paths = []
        for side in ("moving", "fixed"):
            image = nib.load(example / "test" / f"{side}_images" / "test00.nii.gz")
            change = nib.orientations.ornt_transform(
                nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(orientation)
            )
            paths.append(tmp_path / f"{side}_{orientation}.nii.gz")
            nib.save(image.as_reoriented(change), paths[-1])
        output = tmp_path / orientation
        words = [f"--model_dir={trained}", f"--output_dir={output}", f"--moving={paths[0]}", f"--fixed={paths[1]}"]
        assert call(inference, *words)[0] == 0
        warped = nib.load(next(output.glob("*/warped_image.nii.gz")))
        results.append(nib.as_closest_canonical(warped).get_fdata())
    np.testing.assert_allclose(results[0], results[1], atol=1e-3 * np.ptp(results[0]))


def test_two_trainings_with_one_seed_agree(example, tmp_path, call):
    histories = []
    for name in "ab":
        words = [*TINY, "--steps=3", "--valid_every=3", *folders(example), f"--model_dir={tmp_path / name}"]
        assert call(train, *words)[0] == 0
        with open(tmp_path / name / "history.csv") as file:
            row = next(csv.DictReader(file))
        del row["minutes"]
        histories.append({key: float(value) for key, value in row.items()})
    assert histories[0] == pytest.approx(histories[1], rel=1e-4)


# -- Bad input -----------------------------------------------------------------------------------------------------


def edit(path, change):
    """Rewrite a NIfTI file through a function of its voxels and header."""
    image = nib.load(path)
    data, affine = np.asanyarray(image.dataobj).astype(np.float32), image.affine.copy()
    result = change(data, affine)
    path.unlink()
    nib.save(nib.Nifti1Image(data if result is None else result, affine), path)


def set_nan(data, affine):
    data[3, 3, 3] = np.nan


def set_empty(data, affine):
    data[..., 1] = 0


def set_shift(data, affine):
    affine[:3, 3] += 5


def spoil_header(path):
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[252:256] = (0).to_bytes(2, "little") + (1).to_bytes(2, "little")  # qform off, sform on
    raw[280:328] = bytes(48)  # sform rows of zeros
    path.write_bytes(gzip.compress(bytes(raw)))


def spoil_type(path):
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[70:72] = (999).to_bytes(2, "little")  # a data type that no program knows
    path.write_bytes(gzip.compress(bytes(raw)))


FIRST = "moving_images/train00.nii.gz"
LABELS = "fixed_labels/train00.nii.gz"
BAD_DATA = {  # what happens to a data set -> (the file to spoil, how, words that the message must hold)
    "missing folder": ("moving_labels", shutil.rmtree, "moving_labels"),
    "missing file": (FIRST, Path.unlink, "train00.nii.gz: missing"),
    "unreadable": (FIRST, lambda p: p.write_bytes(b"not a NIfTI file at all"), "cannot be read"),
    "empty file": (FIRST, lambda p: p.write_bytes(b""), "cannot be read"),
    "truncated": (FIRST, lambda p: p.write_bytes(p.read_bytes()[:5000]), "cannot be read"),
    "one slice": (FIRST, lambda p: edit(p, lambda d, a: d[..., :1]), "expected 3 dimensions"),
    "2D": (FIRST, lambda p: edit(p, lambda d, a: d[..., 0]), "expected 3 dimensions"),
    "4D image": (FIRST, lambda p: edit(p, lambda d, a: np.stack([d, d], -1)), "expected 3 dimensions"),
    "constant image": (FIRST, lambda p: edit(p, lambda d, a: d * 0), "every voxel"),
    "NaN voxels": (FIRST, lambda p: edit(p, set_nan), "NaN"),
    "singular header": (FIRST, spoil_header, "singular"),
    "data type": (FIRST, spoil_type, "cannot be read"),
    "label count": (LABELS, lambda p: edit(p, lambda d, a: d[..., :1]), "labels, expected 1 as in"),
    "label shape": (LABELS, lambda p: edit(p, lambda d, a: d[1:]), "expected (88, 48, 80)"),
    "label header": (LABELS, lambda p: edit(p, set_shift), "same grid"),
    "label values": (LABELS, lambda p: edit(p, lambda d, a: d * 3), "expected 0 to 1"),
    "empty label": (LABELS, lambda p: edit(p, set_empty), "label 1 is empty"),
    "5D label": (LABELS, lambda p: edit(p, lambda d, a: d[..., None]), "expected 3 dimensions, or 4"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_end_with_one_line_and_leave_nothing(name, example, tmp_path, call):
    path, spoil, words = BAD_DATA[name]
    shutil.copytree(example / "train", tmp_path / "train")
    spoil(tmp_path / "train" / path)
    status, out, err = call(train, *TINY, f"--train_dir={tmp_path / 'train'}", f"--model_dir={tmp_path / 'model'}")
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1 and err.splitlines()[-1] == lines[0], err
    assert words in lines[0] and Path(path).name in lines[0] and "Traceback" not in err
    assert not list((tmp_path / "model").glob("*"))


def test_all_problems_are_reported_together(example, tmp_path, call):
    shutil.copytree(example / "train", tmp_path / "train")
    for case in ("train00", "train02"):
        edit(tmp_path / "train" / "moving_images" / f"{case}.nii.gz", set_nan)
    status, _, err = call(train, *TINY, f"--train_dir={tmp_path / 'train'}", f"--model_dir={tmp_path / 'model'}")
    assert status == 2 and "train00" in err and "train02" in err and "train01" not in err


def test_bad_test_data_are_all_named_before_anything_is_written(trained, example, tmp_path, call):
    shutil.copytree(example / "test", tmp_path / "test")
    edit(tmp_path / "test" / "moving_images" / "test01.nii.gz", set_nan)
    truth = tmp_path / "test" / "true_displacement" / "test00.nii.gz"
    truth.write_bytes(truth.read_bytes()[:1000])
    words = [f"--model_dir={trained}", f"--test_dir={tmp_path / 'test'}", f"--output_dir={tmp_path / 'output'}"]
    status, _, err = call(inference, *words)
    assert status == 2 and "test01" in err and "test00" in err and not (tmp_path / "output").exists(), err


def test_a_test_folder_without_labels_is_registered_and_not_measured(trained, example, tmp_path, call):
    shutil.copytree(example / "test", tmp_path / "test")
    for side in ("moving", "fixed"):
        shutil.rmtree(tmp_path / "test" / f"{side}_labels")
    words = [f"--model_dir={trained}", f"--test_dir={tmp_path / 'test'}", f"--output_dir={tmp_path / 'output'}"]
    status, out, err = call(inference, *words)
    assert status == 0 and "Dice" not in out, err
    assert not list(tmp_path.glob("output/*/warped_labels.nii.gz")) and len(list(tmp_path.glob("output/*/*.png"))) == 2


def test_held_out_patients_cannot_be_exchanged_after_training(trained, example, tmp_path, call):
    shutil.copytree(trained, tmp_path / "model")
    saved = json.loads((tmp_path / "model" / "config.json").read_text())
    saved |= {"folds": 3, "fold": 0, "test_dir": ""}
    (tmp_path / "model" / "config.json").write_text(json.dumps(saved))
    status, _, err = call(inference, f"--model_dir={tmp_path / 'model'}", "--folds=3", "--fold=1")
    assert status == 2 and "--fold: found 1, expected 0" in err, err


def bad_model(folder, how):
    if how == "no model":
        shutil.rmtree(folder)
    elif how == "no weights":
        (folder / "best.weights.h5").unlink()
    elif how == "truncated weights":
        (folder / "best.weights.h5").write_bytes((folder / "best.weights.h5").read_bytes()[:3000])
    else:
        saved = json.loads((folder / "config.json").read_text())
        saved |= {"other channels": {"channels": 4}, "other network": {"network": "composite"}}[how]
        (folder / "config.json").write_text(json.dumps(saved))


@pytest.mark.parametrize("how", ["no model", "no weights", "truncated weights", "other channels", "other network"])
def test_a_model_that_does_not_fit_is_refused(how, trained, tmp_path, call):
    shutil.copytree(trained, tmp_path / "model")
    bad_model(tmp_path / "model", how)
    status, _, err = call(inference, f"--model_dir={tmp_path / 'model'}", f"--output_dir={tmp_path / 'output'}")
    last = err.splitlines()[-1]
    assert status == 2 and last.startswith("error: ") and str(tmp_path / "model") in last, err
    assert not list(tmp_path.glob("output/*"))


@pytest.mark.parametrize(
    "words, message",
    [
        (["--network", "global"], "--network"),
        (["--moving", "nowhere.nii.gz", "--fixed", "nowhere.nii.gz"], "nowhere.nii.gz"),
        (["--test_dir", "nowhere"], "nowhere"),
        (["--test_dir="], "--test_dir"),
        (["--moving", "only.nii.gz"], "--fixed"),
    ],
)
def test_bad_requests_to_inference(words, message, trained, tmp_path, call):
    status, _, err = call(inference, f"--model_dir={trained}", f"--output_dir={tmp_path / 'output'}", *words)
    assert status == 2 and message in err.splitlines()[-1] and err.splitlines()[-1].startswith("error: "), err
    assert not list(tmp_path.glob("output/*"))


def test_a_folder_that_cannot_be_written_is_named(trained, tmp_path, call):
    (tmp_path / "output").write_text("a file")
    status, _, err = call(inference, f"--model_dir={trained}", f"--output_dir={tmp_path / 'output'}")
    assert status == 2 and str(tmp_path / "output") in err.splitlines()[-1], err


def test_help_works_without_a_model(tmp_path):
    text = subprocess.run(
        [sys.executable, "inference.py", "--help"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert all(f"--{name}" in text for name in config.Config.__dataclass_fields__)
