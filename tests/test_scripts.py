"""train.py and inference.py as a user runs them, small: what they write, and what bad input does."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import tensorflow as tf
from rubbish import TINY, put
from scipy.ndimage import map_coordinates
from test_points import check_points_of_a_pair

import config
import helpers
import inference
import train
from extras import cross_validation, files, report
from extras.errors import InputError
from utils import centroids, invert_ddf, moving_offset

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory):
    """A model trained by the command itself, in a process of its own."""
    folder = tmp_path_factory.mktemp("trained") / "model"
    words = [
        "--steps=150",
        "--valid_every=50",
        "--learning_rate=3e-3",
        f"--model_dir={folder}",
    ]
    subprocess.run([sys.executable, "train.py", *TINY, *words, *folders], cwd=ROOT, check=True)
    return folder


def of_the_documentation(start):
    """Its lines of Python that begin so."""
    return re.search(rf"```python\n({start}.*?)```", (ROOT / "docs" / "your_data.md").read_text(), re.DOTALL)[1]


def test_it_learns_and_does_not_fold(trained, example, tmp_path, call, monkeypatch):
    with open(trained / "history.csv") as file:
        history = list(csv.DictReader(file))
    assert float(history[-1]["loss"]) < 0.8 * float(history[0]["loss"])
    words = [f"--model_dir={trained}", f"--test_dir={example / 'train'}", f"--output_dir={tmp_path}"]
    status, _, err = call(inference, *words)
    assert status == 0, err
    with open(tmp_path / "metrics.csv") as file:
        glands = [row for row in csv.DictReader(file) if row["label"] == "0"]
    for column, better in (("dice_{}", 1), ("hd95_{}_mm", -1), ("true_error_{}_mm", -1)):
        before, after = (np.mean([float(row[column.format(when)]) for row in glands]) for when in ("before", "after"))
        assert better * after > better * before, column
    assert all(float(row["folded_percent"]) == 0 for row in glands)

    monkeypatch.chdir(tmp_path / "train00")
    exec(of_the_documentation("import nibabel"), {})
    labels = nib.load("warped_labels.nii.gz").get_fdata()
    for k, label in enumerate(np.moveaxis(labels, -1, 0)):
        np.testing.assert_array_equal(nib.load(f"warped_label_{k}.nii.gz").get_fdata(), label)


def test_one_new_pair_needs_no_labels_and_itk_reads_what_is_written(trained, example, tmp_path, call, monkeypatch):
    moving, fixed = (example / "test" / f"{side}_images" / "test00.nii.gz" for side in ("moving", "fixed"))
    shutil.copy(moving, tmp_path / "mr.nii.gz")
    nib.save(nib.load(fixed), tmp_path / "us.nii")  # not compressed
    words = [f"--model_dir={trained}", f"--output_dir={tmp_path / 'output'}"]
    pair = [f"--moving={tmp_path / 'mr.nii.gz'}", f"--fixed={tmp_path / 'us.nii'}"]
    shutil.copytree(trained, tmp_path / "model", ignore=shutil.ignore_patterns("best*"))
    status, _, err = call(inference, words[1], f"--model_dir={tmp_path / 'model'}", *pair)
    assert status == 2 and "best.weights.h5: missing" in err and not list(tmp_path.glob("output/*")), err
    status, out, err = call(inference, *words, *pair)
    assert status == 0 and out.startswith("computing on the CPU, "), err
    folder = tmp_path / "output" / "mr_to_us"
    assert {path.name for path in folder.iterdir()} == {
        *("warped_image.nii.gz", "displacement.nii.gz", "displacement_inverse.nii.gz", "overview.png"),
        *("pair.txt", "metrics.csv", "summary.txt", "report.html"),  # its own, not those of a whole run
    }
    warped = sitk.ReadImage(str(folder / "warped_image.nii.gz"), sitk.sitkFloat32)
    field = sitk.ReadImage(str(folder / "displacement.nii.gz"), sitk.sitkVectorFloat64)
    original = sitk.ReadImage(str(moving), sitk.sitkFloat32)
    theirs = sitk.Resample(original, warped, sitk.DisplacementFieldTransform(field), sitk.sitkLinear, 0.0)
    difference = np.abs(sitk.GetArrayFromImage(warped) - sitk.GetArrayFromImage(theirs))
    value_range = np.ptp(sitk.GetArrayFromImage(original))
    assert np.mean(difference > 1e-3 * value_range) < 1e-3
    np.testing.assert_allclose(nib.load(folder / "warped_image.nii.gz").affine, nib.load(fixed).affine, atol=1e-4)

    before = {path: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "other").mkdir()
    other = shutil.copy(moving, tmp_path / "other" / "mr.nii.gz")
    status, _, err = call(inference, *words, f"--moving={other}", f"--fixed={tmp_path / 'us.nii'}")
    known = f"{tmp_path / 'mr.nii.gz'} and {tmp_path / 'us.nii'}"
    assert status == 2 and f"found results of {known}, expected none; name another --output_dir" in err, err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before

    shutil.copy(fixed, tmp_path / "us.nii.gz")
    shutil.copy(folder / "displacement.nii.gz", tmp_path)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(of_the_documentation("import SimpleITK"), names)
    by_readme = sitk.GetArrayFromImage(sitk.Cast(names["warped"], sitk.sitkFloat32))
    assert np.mean(np.abs(by_readme - sitk.GetArrayFromImage(warped)) > 1e-3 * value_range) < 1e-3

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(inference, "write_volumes", stop)
    with pytest.raises(KeyboardInterrupt):
        call(inference, *words, *pair)
    assert not {"metrics.csv", "summary.txt", "report.html"} & {path.name for path in folder.iterdir()}


def test_points_go_both_ways_as_the_written_fields_say(trained, example, tmp_path, call, rng):
    moving, fixed = (example / "test" / f"{side}_images" / "test00.nii.gz" for side in ("moving", "fixed"))
    for side, path in (("mr", moving), ("us", fixed)):
        shutil.copy(path, tmp_path / f"{side}.nii.gz")
    words = [f"--model_dir={trained}", f"--output_dir={tmp_path / 'output'}"]
    pair = tmp_path / "mr.nii.gz", tmp_path / "us.nii.gz"
    check_points_of_a_pair(tmp_path, *pair, lambda *more: call(inference, *words, *more), rng)


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


def ball(shape, centre, radius=7.0):
    """A ball (1, *shape, 1): 1 within, 0 outside, and half a voxel on either side in between."""
    distance = np.linalg.norm(np.moveaxis(np.indices(shape), 0, -1) - centre, axis=-1)
    return np.clip(radius - distance + 0.5, 0, 1)[None, ..., None].astype(np.float32)


def test_test_time_augmentation_is_undone():
    """A network that reads the way from ball to ball off the images says the same of every copy of the pair."""
    shapes = (36, 36, 32), (24, 32, 22)
    trained = config.TrainConfig(moving_shape=shapes[0], fixed_shape=shapes[1], affine_augmentation=0.2, mirror_axis=1)
    way = np.subtract((20, 14, 17), (10, 17, 12)) - moving_offset(*shapes)

    def network(seen):
        way_seen = centroids(seen[0]) - centroids(seen[1]) - moving_offset(*shapes)
        return tf.zeros([1, *shapes[1], 3]) + way_seen[:, None, None]

    images = ball(shapes[0], (20, 14, 17)), ball(shapes[1], (10, 17, 12))
    ddf = inference.predict(network, *images, inference.test_time_affines(trained, 6))
    np.testing.assert_allclose(ddf, np.broadcast_to(way, ddf.shape), atol=0.1)


def test_opposite_copies_cancel():
    """What a network says however the pair is turned comes back turned, and unchanged on average over opposites."""
    shape, said = (10, 11, 12), np.array([3, -2, 1], np.float32)
    trained = config.TrainConfig(affine_augmentation=0.3, mirror_axis=-1, moving_shape=shape, fixed_shape=shape)
    image = np.zeros((1, *shape, 1), np.float32)
    affines = inference.test_time_affines(trained, 4)
    assert np.abs(affines - affines[:1]).max() > 0.03
    ddf = inference.predict(lambda images: tf.zeros([1, *shape, 3]) + said, image, image, affines)
    np.testing.assert_allclose(ddf, np.broadcast_to(said, (*shape, 3)), atol=1e-5)


@pytest.mark.parametrize("moving_shape", [(16, 16, 16), (40, 36, 44)])
def test_the_inverse_field_reaches_all_that_the_field_does(moving_shape):
    """A stretch about the centre has its inverse in closed form; the smaller moving grid ends within the fixed one."""
    fixed_shape = np.array([24, 20, 28])
    centre, offset = (fixed_shape - 1) / 2, moving_offset(moving_shape, fixed_shape)
    here = np.moveaxis(np.indices(fixed_shape), 0, -1).astype(np.float32)
    there = here + offset + 0.1 * (here - centre)
    inverse, first = invert_ddf((0.1 * (here - centre)).astype(np.float32), offset)
    found = [map_coordinates(inverse[..., k], (there - first).reshape(-1, 3).T, order=1) for k in range(3)]
    np.testing.assert_allclose(there.reshape(-1, 3) - offset + np.transpose(found), here.reshape(-1, 3), atol=0.05)


def test_one_sample_is_the_pair_as_it_is(rng):
    trained = config.TrainConfig(moving_shape=(10, 11, 12), fixed_shape=(8, 9, 10), mirror_axis=0)
    images = [rng.random((1, *shape, 1)).astype(np.float32) for shape in (trained.moving_shape, trained.fixed_shape)]
    answer, seen = rng.random((1, 8, 9, 10, 3)).astype(np.float32), []

    def network(images):
        seen.extend(images)
        return tf.constant(answer)

    tf.config.run_functions_eagerly(True)
    ddf = inference.predict(network, *images, inference.test_time_affines(trained, 1))
    tf.config.run_functions_eagerly(False)
    np.testing.assert_allclose(ddf, answer[0], atol=1e-5)
    for ours, given in zip(seen, images, strict=True):
        np.testing.assert_allclose(ours, given, atol=1e-5)


def test_maps_of_integer_labels_come_back_as_maps(trained, example, tmp_path, call):
    shutil.copytree(example / "test", tmp_path / "test")
    for path in (tmp_path / "test").glob("*_labels/*"):
        labels, affine = files.read_nifti(path)
        names = 1 + np.argmax(labels[..., ::-1] > 0.5, axis=-1)  # the gland, unless a landmark lies there
        stored = np.where(labels.max(axis=-1) > 0.5, labels.shape[-1] + 1 - names, 0)
        if path.name == "test01.nii.gz":  # one label, as one volume
            stored = labels[..., 0] > 0.5
        files.write_nifti(path, stored.astype(np.int16), affine)
    words = [f"--model_dir={trained}", f"--output_dir={tmp_path / 'output'}", f"--test_dir={tmp_path / 'test'}"]
    status, out, err = call(inference, *words)
    assert status == 0, err
    moving = tmp_path / "test" / "moving_labels" / "test00.nii.gz"
    table = report.read_metrics(tmp_path / "output" / "metrics.csv")
    assert (table["case"] == "test00").sum() == files.read_nifti(moving)[0].max()
    folder = tmp_path / "output" / "test00"
    warped = sitk.ReadImage(str(folder / "warped_labels.nii.gz"))
    field = sitk.DisplacementFieldTransform(sitk.ReadImage(str(folder / "displacement.nii.gz"), sitk.sitkVectorFloat64))
    theirs = sitk.Resample(sitk.ReadImage(str(moving)), warped, field, sitk.sitkNearestNeighbor)
    ours, theirs = sitk.GetArrayFromImage(warped), sitk.GetArrayFromImage(theirs)
    assert ours.max() > 1 and np.mean(ours != theirs) < 1e-3  # ties
    gland, _ = files.read_nifti(tmp_path / "output" / "test01" / "warped_labels.nii.gz")
    assert nib.load(tmp_path / "output" / "test01" / "warped_labels.nii.gz").ndim == 3 and gland.max() == 1


def test_headers_that_share_a_frame_are_the_start_on_request(trained, example, tmp_path, call):
    """A pair whose headers lay 40 mm of the moving image beyond the fixed one starts there, not at the centres."""
    paths = {side: example / "test" / f"{side}_images" / "test00.nii.gz" for side in ("moving", "fixed")}
    data, affine = files.read_nifti(paths["moving"])
    centre, fixed_centre = (
        nib.affines.apply_affine(a, (np.array(d.shape) - 1) / 2)
        for d, a in (files.read_nifti(paths[side]) for side in ("moving", "fixed"))
    )
    affine[:3, 3] += fixed_centre - centre + [40, 0, 0]
    files.write_nifti(tmp_path / "mr.nii.gz", data, affine)
    means = {}
    for start in ("centre", "header"):
        words = [f"--model_dir={trained}", f"--output_dir={tmp_path / start}", f"--initial_alignment={start}"]
        status, out, err = call(inference, *words, f"--moving={tmp_path / 'mr.nii.gz'}", f"--fixed={paths['fixed']}")
        assert status == 0, err
        means[start] = files.read_displacement(next((tmp_path / start).glob("*/displacement.nii.gz")))[0].mean(
            (0, 1, 2)
        )
    assert means["centre"][0] > 30 and means["header"][0] < 20  # less what the network, hardly trained, adds


def test_a_large_pair_takes_little_memory(trained, example, tmp_path):
    """400 x 400 x 80 voxels of 0.4 x 0.4 x 1 mm, in a process of its own, which tells its peak memory."""
    shape, spacing, words = (400, 400, 80), (0.4, 0.4, 1.0), [f"--model_dir={trained}"]
    for side in ("moving", "fixed"):
        data, affine = files.read_nifti(example / "test" / f"{side}_images" / "test00.nii.gz")
        large = np.diag([*spacing, 1.0])
        large[:3, 3] = (
            nib.affines.apply_affine(affine, (np.array(data.shape) - 1) / 2) - np.diag(spacing) @ np.array(shape) / 2
        )
        path = tmp_path / f"{side}.nii.gz"
        files.write_nifti(path, helpers.resample_to_grid(data, affine, large, shape).astype(np.int16), large)
        words.append(f"--{side}={path}")
    code = "import resource, inference; inference.main(); "
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    words = [sys.executable, "-c", code, *words, f"--output_dir={tmp_path / 'output'}"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=True)
    assert nib.load(tmp_path / "output" / "moving_to_fixed" / "warped_image.nii.gz").shape == shape
    assert int(done.stdout.split()[-1]) * 1024 < 4e9


# -- Bad input: what rubbish.py cannot show -------------------------------------------------------------------------


def test_all_problems_are_reported_together(example, tmp_path, call):
    shutil.copytree(example / "train", tmp_path / "train")
    for case in ("train00", "train02"):
        put((3, 3, 3), np.nan)(tmp_path / "train" / "moving_images" / f"{case}.nii.gz")
    status, _, err = call(train, *TINY, f"--train_dir={tmp_path / 'train'}", f"--model_dir={tmp_path / 'model'}")
    assert status == 2 and "train00" in err and "train02" in err and "train01" not in err


def test_bad_test_data_are_all_named_before_anything_is_written(trained, example, tmp_path, call):
    shutil.copytree(example / "test", tmp_path / "test")
    put((3, 3, 3), np.nan)(tmp_path / "test" / "moving_images" / "test01.nii.gz")
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


def test_results_of_other_files_are_not_overwritten(tmp_path):
    files = {folder: tmp_path / folder / "case00.nii.gz" for folder in ("moving", "fixed", "others")}
    pair = helpers.Pair("case00", "a", files["moving"], files["fixed"])
    other = helpers.Pair("case00", "a", files["others"], files["fixed"])
    new = helpers.Pair("case01", "b", files["moving"], files["fixed"])
    for _ in range(2):
        report.claim_folders(tmp_path, tmp_path, [pair])
    record = tmp_path / "case00" / "pair.txt"
    assert record.read_text() == f"{files['moving']}\n{files['fixed']}\n"
    with pytest.raises(InputError, match=f"case00: found results of {files['moving']} and {files['fixed']}"):
        report.claim_folders(tmp_path, tmp_path, [new, other])
    assert record.read_text() == f"{files['moving']}\n{files['fixed']}\n" and not (tmp_path / "case01").exists()


def test_held_out_patients_cannot_be_exchanged_after_training(trained, example, tmp_path, call):
    shutil.copytree(trained, tmp_path / "model")
    saved = json.loads((tmp_path / "model" / "config.json").read_text())
    saved |= {"folds": 3, "fold": 0}
    (tmp_path / "model" / "config.json").write_text(json.dumps(saved))
    status, _, err = call(inference, f"--model_dir={tmp_path / 'model'}")  # as if fold 0 had been other patients then
    assert status == 2 and "patients.csv: found patient train" in err and "expected none held out" in err, err

    moved = shutil.copytree(example / "train", tmp_path / "moved")  # the same data, and a training of the right part
    others, held_out = cross_validation.split_fold(helpers.find_pairs(moved), 3, 0)
    files.write_csv(
        tmp_path / "model" / "trained_patients.csv", [{"case": p.case, "patient": p.patient} for p in others]
    )
    words = [f"--model_dir={tmp_path / 'model'}", f"--train_dir={moved}", f"--output_dir={tmp_path / 'output'}"]
    status, _, err = call(inference, *words)
    assert status == 0 and {path.parent.name for path in tmp_path.glob("output/*/overview.png")} == {held_out[0].case}


def test_help_works_without_a_model(tmp_path):
    text = subprocess.run(
        [sys.executable, "inference.py", "--help"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert all(f"--{name}" in text for name in config.InferenceConfig.__dataclass_fields__)
