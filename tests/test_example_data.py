"""The example data are what they claim to be: repeatable, fold-free, at most 15 mm, and true."""

import nibabel as nib
import numpy as np
from conftest import ROOT, import_file
from scipy import ndimage

import helpers
from utils import dice_score, displacement_on, voxel_to_world, warp_to_fixed

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


def test_the_true_deformation_is_smooth_small_and_takes_the_labels_home(example):
    for pair in helpers.find_pairs(example / "train"):
        moving, fixed = helpers.read_pair(pair)
        assert moving.image.shape != fixed.image.shape
        assert nib.aff2axcodes(moving.affine) != nib.aff2axcodes(fixed.affine)
        assert 2 <= fixed.labels.shape[-1] <= 6
        truth, affine = helpers.read_displacement(pair.true_displacement)

        # Without the two scanners' frames: centre on centre, the displacement that is left is the patient's.
        grids = [helpers.network_grid(v.affine, v.image.shape, (24, 32, 22), 3.0) for v in (fixed, moving)]
        zero = np.zeros((24, 32, 22, 3), np.float32)
        frames = displacement_on(truth.shape[:3], affine, zero, *grids, [0, 0, 0])
        assert np.linalg.norm(truth - frames, axis=-1).max() < made.LARGEST_DISPLACEMENT + 0.2
        mapped = truth + voxel_to_world(truth.shape[:3], affine)
        jacobian = np.stack(np.gradient(mapped, axis=(0, 1, 2)), axis=-1) @ np.linalg.inv(affine[:3, :3])
        assert np.linalg.det(jacobian).min() > 0.2

        index = np.linalg.inv(affine) @ fixed.affine
        place = index[:3, :3], index[:3, 3], fixed.image.shape
        full = [ndimage.affine_transform(c, *place, order=1, mode="nearest") for c in np.moveaxis(truth, -1, 0)]
        warped = warp_to_fixed(moving.labels, moving.affine, np.stack(full, axis=-1), fixed.affine)
        assert dice_score(warped[..., 0] >= 0.5, fixed.labels[..., 0] >= 0.5) > 0.95
