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
    np.testing.assert_allclose(utils.affine_transform(points, quarter, (9, 9, 9))[0], [[4, 4, 4], [4, 6, 4]], atol=1e-6)


def test_affine_broadcasts_one_grid_over_the_batch():
    affine = tf.stack([tf.eye(3, 4), tf.eye(3, 4) + tf.constant([[0, 0, 0, 1.0]] * 3)])
    grid = utils.reference_grid((3, 4, 5))
    moved = utils.affine_transform(grid[None], affine, (3, 4, 5))
    np.testing.assert_allclose(moved, np.stack([grid, grid + 1]), atol=1e-6)


def test_random_affine_mirrors_as_told_and_keeps_to_its_size(rng):
    affine = utils.random_affine(rng, 50, (10, 10, 10), 0.1, 0, np.array([1, -1] * 25))
    assert (np.sign(affine[:, 0, 0]) == [1, -1] * 25).all() and (affine[:, 1, 1] > 0).all()
    assert np.abs(np.abs(affine[:, :, :3]) - np.eye(3)).max() <= 0.1 and np.abs(affine[:, :, 3]).max() <= 0.5
    none = utils.random_affine(rng, 1, (10, 10, 10), 0.0, -1, np.array([-1]))
    np.testing.assert_array_equal(none[0], np.eye(3, 4))


def test_random_augmentation_is_smooth_and_of_its_size(rng):
    affine = np.repeat(np.eye(3, 4, dtype=np.float32)[None], 200, axis=0)
    transform, intensity = utils.random_augmentation(rng, affine, 1.5, 0.3)
    displacement = (utils.augmented_points((21, 22, 23), **transform) - utils.reference_grid((21, 22, 23))).numpy()
    assert displacement.shape == (200, 21, 22, 23, 3) and abs(displacement.mean()) < 0.05
    corners = displacement[:, ::20, ::21, ::22]  # further in, interpolation averages
    assert corners.std() == pytest.approx(1.5, rel=0.05)
    assert np.diff(displacement, axis=1).std() < 0.5 * displacement.std()  # 1.4 were neighbours independent
    image = tf.constant(rng.random((200, 6, 7, 8, 1)), tf.float32)
    assert np.abs(intensity["log_gamma"]).max() <= 0.3 and intensity["log_gain"].std() == pytest.approx(0.18, rel=0.05)
    assert (
        0
        <= np.min(utils.augment_intensity(image, **intensity))
        < np.max(utils.augment_intensity(image, **intensity))
        <= 1
    )
    transform, intensity = utils.random_augmentation(rng, affine, 0.0, 0.0)
    np.testing.assert_allclose(
        utils.augmented_points((5, 6, 7), **transform)[0], utils.reference_grid((5, 6, 7)), atol=1e-5
    )
    np.testing.assert_allclose(utils.augment_intensity(image, **intensity), np.maximum(image, 1e-4), rtol=1e-5)


def test_smooth_agrees_with_scipy_and_keeps_a_constant(rng):
    volume = np.zeros((1, 40, 40, 40, 1), np.float32)
    volume[0, 15:25, 15:25, 15:25, 0] = rng.random((10, 10, 10))
    expected = ndimage.gaussian_filter(volume[0, ..., 0], 2.0, truncate=10)
    np.testing.assert_allclose(utils.smooth(tf.constant(volume), 2.0)[0, ..., 0], expected, atol=1e-5)
    np.testing.assert_allclose(utils.smooth(tf.ones((1, 5, 6, 7, 2)), 3.0), 1, rtol=1e-5)  # also at the border


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
    volume = tf.constant(np.tile(ramp[None, None, :, None, None], (1, 4, 1, 5, 1)), tf.float32)
    np.testing.assert_allclose(utils.resize(volume, (4, size_out, 5))[0, 1, :, 2, 0], expected, atol=1e-6)


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


def test_the_distance_of_centroids_follows_an_oblique_header(rng):
    affine = np.eye(4)
    affine[:3] = rng.normal(size=(3, 4))
    a, b = np.zeros((2, 5, 6, 7))
    a[1, 2, 3] = a[3, 2, 5] = b[4, 0, 1] = 1
    expected = np.linalg.norm(affine[:3, :3] @ (np.array([2, 2, 4]) - [4, 0, 1]))
    assert utils.target_registration_error(a, b, affine) == pytest.approx(expected)


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
