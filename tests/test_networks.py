"""Networks: zero at the start, any grid, one answer in every mode, keypoints, geometry of affine and composite."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy import ndimage

import networks
from networks import KEYPOINTS, NETWORKS, soft_argmax
from utils import fit_affine, moving_offset, reference_grid, warp


def build(network, moving_shape, fixed_shape, channels=2, dropout=0.0):
    return NETWORKS[network](moving_shape, fixed_shape, channels=channels, dropout=dropout)


def images(moving_shape, fixed_shape, batch=1, seed=0):
    rng = np.random.default_rng(seed)
    return [tf.constant(rng.random((batch, *shape, 1)), tf.float32) for shape in (moving_shape, fixed_shape)]


def train_a_little(network, moving_shape, fixed_shape):
    """Give every weight a value of its own."""
    keras.utils.set_random_seed(1)
    for weight in network.trainable_variables:
        weight.assign_add(tf.random.normal(weight.shape, stddev=0.1))
    return images(moving_shape, fixed_shape, batch=2)


def layers_of(model, kind, **properties):
    found = [layer for layer in model.layers if isinstance(layer, kind)]
    return [layer for layer in found if all(getattr(layer, name) == value for name, value in properties.items())]


def ddf_heads(model):
    return layers_of(model, keras.layers.Conv3D, filters=3)


def keypoints_of(model, inputs):
    """Moving and fixed points (B, K, 3), in voxels from each volume's centre."""
    outputs = [model.get_layer(name).output for name in ("moving_points", "fixed_points")]
    return [points.numpy() for points in keras.Model(model.inputs, outputs)(inputs)]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("moving_shape, fixed_shape", [((16, 16, 16), (16, 16, 16)), ((21, 12, 18), (9, 17, 13))])
def test_training_starts_from_no_deformation_on_any_grid(network, moving_shape, fixed_shape):
    ddf = build(network, moving_shape, fixed_shape)(images(moving_shape, fixed_shape))
    assert ddf.shape == (1, *fixed_shape, 3)
    np.testing.assert_allclose(ddf, 0, atol=1e-4)


@pytest.mark.parametrize("network", NETWORKS)
def test_graph_mode_equals_eager_mode(network):
    model = build(network, (18, 17, 16), (15, 13, 11))
    inputs = train_a_little(model, (18, 17, 16), (15, 13, 11))
    eager, graph = model(inputs).numpy(), tf.function(model)(inputs).numpy()
    assert np.abs(eager).max() > 1e-3
    np.testing.assert_allclose(eager, graph, atol=1e-4 * np.abs(eager).max())


@pytest.mark.parametrize("network", NETWORKS)
def test_a_pair_alone_or_in_a_batch_in_training_or_not_gives_the_same(network):
    model = build(network, (16, 16, 16), (12, 12, 12))
    inputs = train_a_little(model, (16, 16, 16), (12, 12, 12))
    both = model(inputs, training=True)
    second = model([image[1:] for image in inputs], training=False)
    np.testing.assert_allclose(both[1:], second, atol=1e-5 * np.abs(both).max())


@pytest.mark.parametrize("network", NETWORKS)
def test_every_weight_is_trained(network):
    """Those of both images' keypoints, too."""
    shapes = (24, 18, 20), (18, 20, 17)  # with more than one voxel at the coarsest level
    model = build(network, *shapes)
    inputs = train_a_little(model, *shapes)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((model(inputs) - 1) ** 2)
    gradients = tape.gradient(loss, model.trainable_variables)
    for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0, variable.path


def test_brightness_and_contrast_of_the_scanner_do_not_matter():
    model = build("composite", (16, 16, 16), (16, 16, 16))
    moving, fixed = train_a_little(model, (16, 16, 16), (16, 16, 16))
    ddf = model([moving, fixed]).numpy()
    np.testing.assert_allclose(ddf, model([3 * moving + 1, 0.5 * fixed - 2]), atol=1e-3 * np.abs(ddf).max())


def test_dropout_leaves_features_out_in_training_alone():
    model = build("global", (16, 16, 16), (12, 12, 12), dropout=0.5)
    inputs = train_a_little(model, (16, 16, 16), (12, 12, 12))
    once, again = (model(inputs, training=True).numpy() for _ in range(2))
    assert np.abs(once - again).max() > 1e-3
    plain = build("global", (16, 16, 16), (12, 12, 12))
    plain.set_weights(model.get_weights()[: len(plain.weights)])  # without the state of the random numbers
    np.testing.assert_array_equal(model(inputs), plain(inputs))


def test_local_net_sums_a_ddf_from_each_level():
    model = build("local", (16, 16, 16), (16, 16, 16))
    sizes = [head.output.shape[1] for head in ddf_heads(model)]
    assert sizes == [1, 2, 4, 8]
    for head, value in zip(ddf_heads(model), (1, 10, 100, 1000), strict=True):
        head.bias.assign([value] * 3)
    np.testing.assert_allclose(model(images((16, 16, 16), (16, 16, 16))), 1111, rtol=1e-5)


# -- Keypoints -----------------------------------------------------------------------------------------------------


def test_keypoints_start_at_places_of_their_own():
    model = build("global", (20, 18, 16), (12, 14, 13))
    for points in keypoints_of(model, images((20, 18, 16), (12, 14, 13))):
        np.testing.assert_allclose(np.linalg.norm(points[0], axis=-1), networks.PLACE_RADIUS, atol=1e-4)
        distance = np.linalg.norm(points[0, :, None] - points[0], axis=-1)
        assert points.shape[1] == networks.KEYPOINTS and np.sort(distance, axis=1)[:, 1].min() > 1


def test_soft_argmax_is_the_expected_position(rng):
    scores = rng.normal(size=(2, 5, 6, 7, 3)).astype(np.float32)
    points = soft_argmax(scores, reference_grid((5, 6, 7)))
    for b in range(2):
        for k in range(3):
            np.testing.assert_allclose(points[b, k], ndimage.center_of_mass(np.exp(scores[b, ..., k])), rtol=1e-4)


def test_an_organ_that_is_shifted_shifts_its_points(monkeypatch, rng):
    """Away from the border, by the network's total stride, and without the bumps, which belong to the volume."""
    monkeypatch.setattr(networks, "BUMP_WIDTH", 1e6)
    shape, stride = (48, 48, 48), 8
    organ = ndimage.gaussian_filter(rng.random((10, 10, 10)), 1) - 0.5
    here, there = np.zeros((2, 1, *shape, 1), np.float32)
    here[0, 15:25, 15:25, 15:25, 0] = organ
    there[0, 15 + stride : 25 + stride, 15:25, 15:25, 0] = organ
    keras.utils.set_random_seed(4)
    model = build("global", shape, shape, channels=4)
    for head in layers_of(model, keras.layers.Conv3D, filters=networks.KEYPOINTS, kernel_size=(3, 3, 3)):
        if not np.any(head.kernel):  # the last convolutions; peaks that are sharp enough for all else to vanish
            head.kernel.assign(1000 * tf.random.normal(head.kernel.shape))
    before, after = (keypoints_of(model, [image, here])[0][0] for image in (here, there))
    near = (np.abs(before - (19.5 - 23.5)) < 8).all(axis=-1)  # other heat maps are highest at the volume's border
    follows = np.abs(after - before - [stride, 0, 0]).max(axis=-1) < 0.1
    assert near.sum() >= 4 and follows[near].mean() > 0.6  # of two peaks of one height either may win


def test_an_affine_is_found_from_its_points(rng):
    affine = np.concatenate([np.eye(3) + rng.uniform(-0.3, 0.3, (2, 3, 3)), rng.uniform(-9, 9, (2, 3, 1))], axis=-1)
    fixed = rng.normal(0, 5, (2, 16, 3))
    moving = np.einsum("bij,bkj->bki", affine[:, :, :3], fixed) + affine[:, None, :, 3]
    found = fit_affine(*(tf.constant(v, tf.float32) for v in (fixed, moving)), ridge=0.0)
    np.testing.assert_allclose(found, affine, atol=1e-4)
    ridge = 1e9  # so large that nothing but the shift of the means is left
    found = fit_affine(*(tf.constant(v, tf.float32) for v in (fixed, moving)), ridge=ridge)
    np.testing.assert_allclose(found[..., :3], [np.eye(3)] * 2, atol=1e-4)
    np.testing.assert_allclose(found[..., 3], moving.mean(1) - fixed.mean(1), atol=1e-3)


def test_points_that_coincide_give_a_pure_shift(rng):
    fixed, moving = (tf.Variable(np.repeat(rng.normal(size=(1, 1, 3)), 16, axis=1), dtype=tf.float32) for _ in "ab")
    with tf.GradientTape() as tape:
        affine = fit_affine(fixed, moving, 2 * KEYPOINTS)
        value = tf.reduce_sum(affine * np.arange(12.0).reshape(3, 4))
    np.testing.assert_allclose(affine[0, :, :3], np.eye(3), atol=1e-5)
    np.testing.assert_allclose(affine[0, :, 3], (moving - fixed)[0, 0], atol=1e-5)
    assert all(np.isfinite(gradient).all() for gradient in tape.gradient(value, [fixed, moving]))


# -- Geometry ------------------------------------------------------------------------------------------------------


def test_the_affine_takes_the_fixed_points_to_the_moving_ones_about_the_centres():
    shapes = (16, 18, 20), (12, 13, 14)
    model = build("global", *shapes)
    inputs = train_a_little(model, *shapes)
    moving, fixed = keypoints_of(model, inputs)
    affine = fit_affine(tf.constant(fixed), tf.constant(moving), 2 * KEYPOINTS).numpy()
    ddf = model(inputs).numpy()
    grid = reference_grid(shapes[1]).numpy()
    centre = (np.array(shapes[1]) - 1) / 2
    for k in range(2):
        expected = (grid - centre) @ affine[k, :, :3].T + affine[k, :, 3] + centre - grid
        np.testing.assert_allclose(ddf[k], expected, atol=1e-3)
    assert np.abs(ddf).max() > 0.1


def test_global_network_gives_an_affine_field():
    model = build("global", (16, 16, 16), (11, 12, 13))
    ddf = model(train_a_little(model, (16, 16, 16), (11, 12, 13)))[0].numpy()
    grid = reference_grid((11, 12, 13)).numpy().reshape(-1, 3)
    design = np.c_[grid, np.ones(len(grid))]
    fit = np.linalg.lstsq(design, ddf.reshape(-1, 3), rcond=None)[0]
    np.testing.assert_allclose(design @ fit, ddf.reshape(-1, 3), atol=1e-3)
    assert np.linalg.matrix_rank(fit[:3]) == 3


def test_composite_network_is_its_affine_after_its_local_field():
    """With local heads at zero the composite is affine; with a local shift s it is A (i + s) - i."""
    shape = (12, 12, 12)
    model = build("composite", (16, 16, 16), shape)
    inputs = train_a_little(model, (16, 16, 16), shape)
    heads = ddf_heads(model)
    for head in heads:
        head.kernel.assign(tf.zeros_like(head.kernel))
        head.bias.assign([0.0, 0.0, 0.0])
    affine = model(inputs)[0].numpy()
    grid = reference_grid(shape).numpy()
    heads[-1].bias.assign([1.0, 0.0, 0.0])
    shifted = model(inputs)[0].numpy()
    mapped = grid + affine
    np.testing.assert_allclose((grid + shifted)[:-1], mapped[1:], atol=1e-3)
    assert np.abs(affine).max() > 1e-2


def test_a_zero_field_puts_the_volume_centres_together():
    moving = np.zeros((1, 11, 12, 13, 1), np.float32)
    moving[0, 5, 6, 6] = 1
    np.testing.assert_array_equal(moving_offset((11, 12, 13), (7, 8, 9)), [2, 2, 2])
    warped = warp(tf.constant(moving), tf.zeros((1, 7, 8, 9, 3)))
    np.testing.assert_array_equal(np.argwhere(warped.numpy())[0], [0, 3, 4, 4, 0])
