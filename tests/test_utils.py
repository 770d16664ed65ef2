"""Coordinates and metrics against SciPy, SimpleITK and analytic values."""

import numpy as np
import pytest
import SimpleITK as sitk
import tensorflow as tf
from scipy import ndimage

import utils


def test_resample_agrees_with_scipy_inside_and_outside(rng):
    volume = rng.random((2, 7, 6, 5, 2), np.float32)
    points = rng.uniform(-2, 8, (2, 40, 3)).astype(np.float32)
    result = utils.resample(volume, points)
    for b in range(2):
        for c in range(2):
            expected = ndimage.map_coordinates(volume[b, ..., c], points[b].T, order=1, mode="grid-constant")
            np.testing.assert_allclose(result[b, :, c], expected, atol=1e-5)


def test_resample_gradient_agrees_with_finite_differences(rng):
    volume = tf.constant(rng.random((1, 6, 6, 6, 1)), tf.float64)
    points = tf.Variable(rng.integers(0, 5, (1, 20, 3)) + rng.uniform(0.2, 0.8, (1, 20, 3)))
    with tf.GradientTape() as tape:
        value = tf.reduce_sum(resample64(volume, points))
    gradient = tape.gradient(value, points).numpy()
    for k in range(3):
        delta = 1e-6 * np.eye(3)[k]
        difference = (resample64(volume, points + delta) - resample64(volume, points - delta)).numpy() / 2e-6
        np.testing.assert_allclose(gradient[..., k], difference[..., 0], atol=1e-6)


def resample64(volume, points):
    return utils.resample(volume, tf.convert_to_tensor(points))


def test_identity_points_return_the_volume(rng):
    volume = rng.random((1, 5, 6, 7, 1), np.float32)
    np.testing.assert_array_equal(utils.resample(volume, utils.reference_grid((5, 6, 7))[None]), volume)


def test_affine_turns_about_the_centre():
    quarter = tf.constant([[[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0]]], tf.float32)
    points = tf.constant([[[4.0, 4.0, 4.0], [6.0, 4.0, 4.0]]])
    np.testing.assert_allclose(utils.transform_points(points, quarter, (9, 9, 9))[0], [[4, 4, 4], [4, 6, 4]], atol=1e-6)


def test_affine_broadcasts_one_grid_over_the_batch():
    affine = tf.stack([tf.eye(3, 4), tf.eye(3, 4) + tf.constant([[0, 0, 0, 1.0]] * 3)])
    grid = utils.reference_grid((3, 4, 5))
    moved = utils.transform_points(grid[None], affine, (3, 4, 5))
    np.testing.assert_allclose(moved, np.stack([grid, grid + 1]), atol=1e-6)


def test_random_affine_mirrors_both_sides_alike_and_keeps_to_its_size():
    affine = utils.random_affine((1, 2), 50, (10, 10, 10), 0.1, tf.constant([1.0, -1.0] * 25), 0).numpy()
    assert (np.sign(affine[:, 0, 0]) == [1, -1] * 25).all() and (affine[:, 1, 1] > 0).all()
    assert np.abs(np.abs(affine[:, :, :3]) - np.eye(3)).max() <= 0.1 and np.abs(affine[:, :, 3]).max() <= 0.5
    none = utils.random_affine((1, 2), 1, (10, 10, 10), 0.0, tf.constant([-1.0]), -1)
    np.testing.assert_array_equal(none[0], np.eye(3, 4))


def test_random_smooth_is_smooth_and_of_its_size():
    bend = utils.random_smooth([1, 2], 200, (21, 22, 23), places=5, channels=3, amount=1.5).numpy()
    assert bend.shape == (200, 21, 22, 23, 3)
    assert abs(bend.mean()) < 0.05
    corners = bend[:, ::20, ::21, ::22]  # further in, interpolation averages
    assert corners.std() == pytest.approx(1.5, rel=0.05)
    assert np.diff(bend, axis=1).std() < 0.5 * bend.std()  # 1.4 were neighbours independent
    assert not utils.random_smooth([1, 2], 2, (5, 6, 7), 3, 1, 0.0).numpy().any()


def test_gaussian_matrices_agree_with_scipy(rng):
    volume = np.zeros((1, 40, 40, 40, 1), np.float32)
    volume[0, 15:25, 15:25, 15:25, 0] = rng.random((10, 10, 10))
    filters = [utils.gaussian_matrix(40, 2.0)] * 3
    expected = ndimage.gaussian_filter(volume[0, ..., 0], 2.0, truncate=10)
    np.testing.assert_allclose(utils.apply_along_axes(volume, filters)[0, ..., 0], expected, atol=1e-5)
    np.testing.assert_allclose(filters[0].sum(axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("channels", [1, 2, 9])  # few and many go different ways
def test_axes_are_not_confused(rng, channels):
    volume = rng.random((2, 3, 4, 5, channels), np.float32)
    a, b, c = (rng.random((n + 1, n), np.float32) for n in (3, 4, 5))
    expected = np.einsum("ai,bj,ck,nijkl->nabcl", a, b, c, volume)
    np.testing.assert_allclose(utils.apply_along_axes(volume, [a, b, c]), expected, rtol=1e-5)


@pytest.mark.parametrize("size_in, size_out", [(3, 6), (12, 24), (3, 5), (6, 3)])
def test_resize_keeps_a_ramp(size_in, size_out):
    ramp = (np.arange(size_in) + 0.5) / size_in
    expected = np.clip((np.arange(size_out) + 0.5) / size_out, ramp[0], ramp[-1])
    np.testing.assert_allclose(utils.resize_matrix(size_in, size_out) @ ramp, expected, atol=1e-6)


def test_dice_and_tre_of_shifted_boxes():
    affine = np.diag([2.0, 1, 1, 1])
    a, b = np.zeros((2, 10, 10, 10), bool)
    a[2:6, 2:6, 2:6] = True
    b[4:8, 2:6, 2:6] = True
    assert utils.dice_score(a, b) == 0.5 and utils.dice_score(a, a) == 1
    assert utils.target_registration_error(a, b, affine) == pytest.approx(4)
    assert np.isnan(utils.target_registration_error(a, np.zeros_like(a), affine))
    dice, distance = utils.label_metrics(*(tf.constant(m[None, ..., None], tf.float32) for m in (a, b)))
    assert float(dice[0, 0]) == pytest.approx(0.5) and float(distance[0, 0]) == pytest.approx(2)


def test_centroid_follows_an_oblique_header(rng):
    affine = np.eye(4)
    affine[:3] = rng.normal(size=(3, 4))
    label = np.zeros((5, 6, 7))
    label[1, 2, 3] = label[3, 2, 5] = 1
    np.testing.assert_allclose(utils.centroid(label, affine), affine[:3, :3] @ [2, 2, 4] + affine[:3, 3])


def test_hausdorff_agrees_with_simpleitk(rng):
    """The whole distance between two surfaces, from SimpleITK's distance maps at its contour voxels."""
    masks = [np.pad(ndimage.gaussian_filter(rng.random((24, 24, 24)), 3) > 0.5, 2) for _ in range(2)]
    spacing = (0.5, 1.0, 2.0)
    contours = []
    for mask in masks:
        image = sitk.GetImageFromArray(mask.astype(np.uint8))
        image.SetSpacing(spacing[::-1])  # SimpleITK counts axes from the last
        contours.append(sitk.BinaryContour(image, fullyConnected=False))
    distances = []
    for here, there in (contours, contours[::-1]):
        field = sitk.GetArrayFromImage(sitk.Abs(sitk.SignedMaurerDistanceMap(there, False, False, True)))
        distances.append(np.percentile(field[sitk.GetArrayFromImage(here) > 0], 95))
    assert utils.hausdorff_95(*masks, spacing) == pytest.approx(max(distances), abs=1e-3)
    assert utils.hausdorff_95(masks[0], masks[0], spacing) == 0


def test_hausdorff_of_two_parallel_plates_is_their_distance():
    a, b = np.zeros((2, 20, 20, 20), bool)
    a[5], b[9] = True, True
    assert utils.hausdorff_95(a, b, (1.5, 1, 1)) == pytest.approx(6)


def test_jacobian_determinant_of_linear_fields():
    grid = utils.reference_grid((6, 6, 6)).numpy()
    np.testing.assert_allclose(utils.jacobian_determinant(0.5 * grid), 1.5**3, rtol=1e-5)
    fold = grid * [-2, 0, 0]  # x -> -x
    np.testing.assert_allclose(utils.jacobian_determinant(fold), -1, rtol=1e-5)
