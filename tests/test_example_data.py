"""The example data are what they claim to be: repeatable, fold-free, worth registering, visible, and true."""

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT, import_file
from scipy import ndimage

import helpers
from extras import files
from utils import dice_score, jacobian_determinant, voxel_to_world, warp_to_fixed

made = import_file(ROOT / "data" / "make_example_data.py")


def test_the_same_seed_gives_the_same_files(tmp_path):
    for name in ("a", "b"):
        made.main(tmp_path / name, seed=3, patients={"train": 1})
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.nii.gz"))
    assert len(files) == 5
    for file in files:
        one, two = (nib.load(tmp_path / name / file) for name in ("a", "b"))
        np.testing.assert_array_equal(one.get_fdata(), two.get_fdata())
        np.testing.assert_array_equal(one.affine, two.affine)


@pytest.fixture(scope="module")
def true_fields():
    """Of each test patient: points (N, 3) mm in the gland, their displacement in mm, and the smallest Jacobian."""
    x = voxel_to_world(made.US_SHAPE, made.centred_affine(made.US_SHAPE, made.US_SPACING))[::3, ::3, ::3].astype(float)
    spacing, fields = 3 * np.array(made.US_SPACING), []
    for number in range(sum(made.PATIENTS.values()))[-made.PATIENTS["test"] :]:
        rng = np.random.default_rng([2019, number])
        patient = made.random_patient(rng)
        displacement = made.random_deformation(rng, patient)(x)
        gland = made.tissues(x + displacement, patient)["gland"] < 1
        fields.append((x[gland], displacement[gland], jacobian_determinant(displacement / spacing).min()))
    return fields


def test_the_deformation_asks_for_more_than_a_shift_or_an_affine_and_never_folds(true_fields):
    start, shift, affine, jacobian = [], [], [], []
    for points, displacement, smallest in true_fields:
        start.append(np.linalg.norm(displacement, axis=1).mean())
        shift.append(np.linalg.norm(displacement - displacement.mean(axis=0), axis=1).mean())
        terms = np.c_[np.ones(len(points)), points]
        rest = displacement - terms @ np.linalg.lstsq(terms, displacement, rcond=None)[0]
        affine.append(np.linalg.norm(rest, axis=1).mean())
        jacobian.append(smallest)
    assert 8 < np.median(start) < 11 and 2.5 < np.median(shift) < 3.8 and 0.8 < np.median(affine) < 1.5
    assert min(jacobian) > 0.8 * made.SMALLEST_JACOBIAN  # which holds on another grid


def test_what_a_label_marks_is_seen_in_both_images(example):
    """Across the border of each label the network grid shows a contrast, beyond the noise of either side."""
    seen = []
    for pair in helpers.find_pairs(example / "train"):
        grid = "centre", (72, 72, 64), (48, 64, 44), 1.5
        for volume in helpers.pair_to_network(*helpers.read_pair(pair), *grid):
            image = volume.image[..., 0]
            for label in np.moveaxis(volume.labels, -1, 0) >= 0.5:
                distance = ndimage.distance_transform_edt(label) - ndimage.distance_transform_edt(~label)
                shells = [image[(distance > low) & (distance <= low + 1.5)] for low in (-3, -1.5, 0, 1.5)]
                errors = [shell.std() / np.sqrt(max(len(shell), 1)) for shell in shells]
                means = [shell.mean() for shell in shells if len(shell)]
                seen.append(np.ptp(means) > max(0.08, 3 * max(errors)))
    assert np.mean(seen) > 0.95, np.mean(seen)


def test_the_true_displacement_takes_the_labels_home(example):
    for pair in helpers.find_pairs(example / "train"):
        moving, fixed = helpers.read_pair(pair)
        assert moving.image.shape != fixed.image.shape
        assert nib.aff2axcodes(moving.affine) != nib.aff2axcodes(fixed.affine)
        assert 6 <= fixed.labels.shape[-1] <= 8
        truth, affine = files.read_displacement(pair.true_displacement)
        index = np.linalg.inv(affine) @ fixed.affine
        place = index[:3, :3], index[:3, 3], fixed.image.shape
        full = [ndimage.affine_transform(c, *place, order=1, mode="nearest") for c in np.moveaxis(truth, -1, 0)]
        warped = warp_to_fixed(moving.labels, moving.affine, np.stack(full, axis=-1), fixed.affine)
        assert dice_score(warped[..., 0] >= 0.5, fixed.labels[..., 0] >= 0.5) > 0.95
