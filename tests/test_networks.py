"""Networks: zero at the start, any grid, one answer in every mode, the geometry of affine and composite."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy import ndimage

import networks
from config import Config
from networks import local_contrast
from utils import moving_offset, reference_grid, resample

NETWORKS = ("local", "global", "composite", "centred")
SEARCH_CHANNELS = 2, 4


def build_network(network, moving_shape, fixed_shape, **changes):
    small = {"channels": 2, "global_channels": 2, "search_channels": SEARCH_CHANNELS, "max_channels": 16}
    small |= {"first_kernel": 3, "ddf_levels": (0, 1, 2, 3, 4), **changes}
    return networks.build_network(Config(network=network, moving_shape=moving_shape, fixed_shape=fixed_shape, **small))


def images(moving_shape, fixed_shape, batch=1, seed=0):
    rng = np.random.default_rng(seed)
    return [tf.constant(rng.random((batch, *shape, 1)), tf.float32) for shape in (moving_shape, fixed_shape)]


def train_a_little(network, moving_shape, fixed_shape):
    """Give every weight a value of its own."""
    keras.utils.set_random_seed(1)
    for weight in network.trainable_variables:
        weight.assign_add(tf.random.normal(weight.shape, stddev=0.1))
    return images(moving_shape, fixed_shape, batch=2)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("moving_shape, fixed_shape", [((16, 16, 16), (16, 16, 16)), ((21, 12, 18), (9, 17, 13))])
def test_training_starts_from_no_deformation_on_any_grid(network, moving_shape, fixed_shape):
    model = build_network(network, moving_shape, fixed_shape)
    ddf = model(images(moving_shape, fixed_shape))["ddf"]
    assert ddf.shape == (1, *fixed_shape, 3)
    np.testing.assert_allclose(ddf, 0, atol=1e-4)


@pytest.mark.parametrize("network", NETWORKS)
def test_graph_mode_equals_eager_mode(network):
    model = build_network(network, (18, 17, 16), (15, 13, 11))
    inputs = train_a_little(model, (18, 17, 16), (15, 13, 11))
    eager, graph = model(inputs)["ddf"].numpy(), tf.function(model)(inputs)["ddf"].numpy()
    assert np.abs(eager).max() > 1e-3
    np.testing.assert_allclose(eager, graph, atol=1e-4 * np.abs(eager).max())


@pytest.mark.parametrize("network", NETWORKS)
def test_a_pair_alone_or_in_a_batch_in_training_or_not_gives_the_same(network):
    model = build_network(network, (16, 16, 16), (12, 12, 12))
    inputs = train_a_little(model, (16, 16, 16), (12, 12, 12))
    both = model(inputs, training=True)["ddf"]
    second = model([image[1:] for image in inputs], training=False)["ddf"]
    np.testing.assert_allclose(both[1:], second, atol=1e-4)


def test_dropout_withholds_features_of_the_search_in_training_alone():
    model = build_network("centred", (16, 16, 16), (12, 12, 12), dropout=0.5)
    inputs = train_a_little(model, (16, 16, 16), (12, 12, 12))
    once, again = (model(inputs, training=True)["fixed_centre"].numpy() for _ in range(2))
    assert np.abs(once - again).max() > 1e-3
    plain = build_network("centred", (16, 16, 16), (12, 12, 12))
    plain.set_weights(model.get_weights())
    np.testing.assert_array_equal(model(inputs)["fixed_centre"], plain(inputs)["fixed_centre"])


def test_each_search_is_as_wide_as_asked():
    model = build_network("centred", (16, 16, 16), (12, 12, 12))
    for name, width in zip(("moving", "fixed"), SEARCH_CHANNELS, strict=True):
        search = keras.Model(model.inputs, model.output[f"{name}_centre"])
        first = next(layer for layer in search.layers if getattr(layer, "strides", None) == (2, 2, 2))
        assert first.filters == width


@pytest.mark.parametrize("network", NETWORKS)
def test_every_weight_is_trained(network):
    model = build_network(network, (16, 16, 16), (16, 16, 16))
    inputs = train_a_little(model, (16, 16, 16), (16, 16, 16))
    with tf.GradientTape() as tape:
        loss = tf.add_n([tf.reduce_mean((output - 1) ** 2) for output in model(inputs).values()])
    for variable, gradient in zip(
        model.trainable_variables, tape.gradient(loss, model.trainable_variables), strict=True
    ):
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0, variable.path


def test_brightness_and_contrast_of_the_scanner_do_not_matter():
    model = build_network("local", (16, 16, 16), (16, 16, 16))
    moving, fixed = train_a_little(model, (16, 16, 16), (16, 16, 16))
    ddf = model([moving, fixed])["ddf"].numpy()
    np.testing.assert_allclose(ddf, model([3 * moving + 1, 0.5 * fixed - 2])["ddf"], atol=1e-3 * np.abs(ddf).max())


def test_local_contrast_hardly_sees_a_slow_change_of_the_gain():
    rng = np.random.default_rng(0)
    image = ndimage.gaussian_filter(rng.random((24, 24, 24)), 1)
    image = 0.2 + 0.6 * (image - image.min()) / np.ptp(image)
    gain = np.exp(-np.arange(24) / 24)[:, None, None]  # fades to a third along the first axis
    plain, faded = (local_contrast(tf.constant(v[None, ..., None], tf.float32)) for v in (image, image * gain))
    away = (slice(None), slice(6, -6))  # the mean at the border is of one side only
    assert np.std(plain[away] - faded[away]) < 0.1 * np.std(plain[away])


@pytest.mark.parametrize("levels", [(0,), (4,), (1, 3), (0, 1, 2, 3, 4)])
def test_ddf_levels_choose_the_heads(levels):
    model = build_network("local", (16, 16, 16), (16, 16, 16), ddf_levels=levels)
    heads = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv3D) and layer.filters == 3]
    assert len(heads) == len(levels)
    assert model(images((16, 16, 16), (16, 16, 16)))["ddf"].shape == (1, 16, 16, 16, 3)


def test_global_network_gives_an_affine_field():
    model = build_network("global", (16, 16, 16), (11, 12, 13))
    ddf = model(train_a_little(model, (16, 16, 16), (11, 12, 13)))["ddf"][0].numpy()
    grid = reference_grid((11, 12, 13)).numpy().reshape(-1, 3)
    design = np.c_[grid, np.ones(len(grid))]
    fit = np.linalg.lstsq(design, ddf.reshape(-1, 3), rcond=None)[0]
    np.testing.assert_allclose(design @ fit, ddf.reshape(-1, 3), atol=1e-3)
    assert np.linalg.matrix_rank(fit[:3]) == 3


def test_composite_network_is_its_affine_after_its_local_field():
    """With local heads at zero the composite is affine; with a local shift s it is A (i + s) - i."""
    shape = (12, 12, 12)
    model = build_network("composite", (16, 16, 16), shape)
    inputs = train_a_little(model, (16, 16, 16), shape)
    heads = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv3D) and layer.filters == 3]
    for head in heads:
        head.kernel.assign(tf.zeros_like(head.kernel))
        head.bias.assign([0.0, 0.0, 0.0])
    affine = model(inputs)["ddf"][0].numpy()
    grid = reference_grid(shape).numpy()
    heads[-1].bias.assign([1.0, 0.0, 0.0])
    shifted = model(inputs)["ddf"][0].numpy()
    mapped = grid + affine
    np.testing.assert_allclose((grid + shifted)[:-1], mapped[1:], atol=1e-3)
    assert np.abs(affine).max() > 1e-2


def test_centred_network_shifts_by_the_distance_of_the_centres_that_it_expects():
    shapes = (16, 18, 20), (12, 13, 14)
    model = build_network("centred", *shapes)
    inputs = train_a_little(model, *shapes)
    for head in (layer for layer in model.layers if isinstance(layer, keras.layers.Conv3D) and layer.filters == 3):
        head.kernel.assign(tf.zeros_like(head.kernel))
        head.bias.assign([0.0, 0.0, 0.0])
    outputs = model(inputs)
    for k in range(2):
        chances = [np.exp(outputs[name][k, ..., 0].numpy()) for name in ("moving_centre", "fixed_centre")]
        np.testing.assert_allclose([chance.sum() for chance in chances], 1, rtol=1e-5)
        moving, fixed = map(ndimage.center_of_mass, chances)
        shift = np.subtract(moving, fixed) - moving_offset(*shapes)
        assert np.abs(shift).max() > 0.01
        np.testing.assert_allclose(outputs["ddf"][k], np.broadcast_to(shift, (*shapes[1], 3)), atol=1e-3)


def test_a_zero_field_puts_the_volume_centres_together():
    moving = np.zeros((1, 11, 12, 13, 1), np.float32)
    moving[0, 5, 6, 6] = 1
    points = reference_grid((7, 8, 9))[None] + moving_offset((11, 12, 13), (7, 8, 9))
    np.testing.assert_array_equal(np.argwhere(resample(moving, points).numpy())[0], [0, 3, 4, 4, 0])
