"""Similarities and regularisers: analytic values, invariants, and one answer in eager, graph and XLA mode."""

import numpy as np
import pytest
import tensorflow as tf

import losses
from utils import reference_grid

SCALES = (0, 1, 2, 4)


def ball(centre, radius, shape=(24, 24, 24)):
    distance = np.linalg.norm(reference_grid(shape).numpy() - centre, axis=-1)
    return np.clip(radius + 0.5 - distance, 0, 1).astype(np.float32)[None, ..., None]


@pytest.mark.parametrize("name", losses.LABEL_LOSSES)
def test_similarity_is_best_where_labels_agree(name):
    similarity = losses.LABEL_LOSSES[name]
    fixed = ball([12, 12, 12], 4)
    values = [float(losses.multi_scale(similarity, ball([12 + d, 12, 12], 4), fixed, SCALES)[0, 0]) for d in range(7)]
    assert values == sorted(values) and values[0] < values[1]


@pytest.mark.parametrize("name, same, disjoint", [("dice", 0, 1), ("jaccard", 0, 1), ("mean-squared", 0, 54 / 1000)])
def test_similarity_values(name, same, disjoint):
    a, b = np.zeros((2, 1, 10, 10, 10, 1), np.float32)
    a[:, :3, :3, :3] = 1
    b[:, 5:8, 5:8, 5:8] = 1
    assert float(losses.LABEL_LOSSES[name](a, a)[0, 0]) == pytest.approx(same, abs=1e-5)
    assert float(losses.LABEL_LOSSES[name](a, b)[0, 0]) == pytest.approx(disjoint, abs=1e-5)


def test_cross_entropy_value():
    half = np.full((1, 4, 4, 4, 1), 0.5, np.float32)
    assert float(losses.cross_entropy(half, np.ones_like(half))[0, 0]) == pytest.approx(np.log(2), rel=1e-5)


def test_jaccard_is_the_intersection_over_the_union():
    a, b = ball([11, 12, 12], 4), ball([13, 12, 12], 5)
    both = np.sum(a * b)
    expected = 1 - both / (np.sum(a**2) + np.sum(b**2) - both)
    np.testing.assert_allclose(losses.jaccard_loss(a, b), [[expected]], rtol=1e-4)


def test_scales_let_distant_landmarks_attract():
    fixed = tf.constant(ball([6, 12, 12], 2))
    for scales, attracted in (((0,), False), ((0, 2, 4), True)):
        warped = tf.Variable(ball([18, 12, 12], 2))
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(losses.multi_scale(losses.dice_loss, warped, fixed, scales))
        slope = tape.gradient(loss, warped).numpy()[0, :, 12, 12, 0]
        # Mass just towards the fixed landmark must pay more than mass just away from it.
        assert (slope[16] < slope[20] - 1e-5) == attracted


@pytest.mark.parametrize("name", losses.LABEL_LOSSES)
def test_an_empty_label_keeps_loss_and_gradient_finite(name):
    warped, fixed = tf.Variable(tf.zeros((1, 6, 6, 6, 2))), tf.zeros((1, 6, 6, 6, 2))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(losses.multi_scale(losses.LABEL_LOSSES[name], warped, fixed, SCALES))
    assert np.isfinite(loss) and np.isfinite(tape.gradient(loss, warped)).all()


def test_absent_labels_count_for_nothing():
    values = tf.constant([[1.0, 3.0, 99.0], [5.0, 99.0, 99.0]])
    assert float(losses.masked_mean(values, tf.constant([[1.0, 1, 0], [1, 0, 0]]))) == 3.5
    assert float(losses.masked_mean(values, tf.zeros((2, 3)))) == 0


# field (as a function of x, y, z in every component), bending energy, gradient L2, gradient L1 on the interior
FIELDS = {
    "constant": (lambda x, y, z: 3 + 0 * x, 0, 0, 0),
    "linear": (lambda x, y, z: 2 * x - y + 3 * z, 0, 14, 6),
    "quadratic": (lambda x, y, z: x**2, 4, None, None),
    "mixed": (lambda x, y, z: x * y, 2, None, None),
    "mixed, other axes": (lambda x, y, z: 3 * y * z, 18, None, None),
    "sum": (lambda x, y, z: x**2 + y**2 + z**2 + x * z, 14, None, None),
}


@pytest.mark.parametrize("name", FIELDS)
def test_regularisers_on_polynomials(name):
    field, bending, l2, l1 = FIELDS[name]
    grid = reference_grid((7, 8, 9)).numpy()
    ddf = tf.constant(np.repeat(field(*np.moveaxis(grid, -1, 0))[None, ..., None], 3, axis=-1), tf.float32)
    for regulariser, expected in (("bending", bending), ("gradient-l2", l2), ("gradient-l1", l1)):
        if expected is not None:
            assert float(losses.REGULARISERS[regulariser](ddf)) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("mode", [{}, {"jit_compile": True}])
def test_graph_and_xla_give_the_eager_values_and_gradients(mode, rng):
    labels = [tf.constant(rng.random((1, 9, 8, 7, 2)), tf.float32) for _ in range(2)]
    field = tf.constant(rng.random((1, 9, 8, 7, 3)), tf.float32)

    def loss(warped, ddf):
        total = tf.add_n([r(ddf) for r in losses.REGULARISERS.values()])
        for similarity in losses.LABEL_LOSSES.values():
            total += tf.reduce_sum(losses.multi_scale(similarity, warped, labels[1], (0, 1.5)))
        return total

    def value_and_gradient(function):
        with tf.GradientTape() as tape:
            tape.watch([labels[0], field])
            value = function(labels[0], field)
        return [value, *tape.gradient(value, [labels[0], field])]

    for eager, compiled in zip(value_and_gradient(loss), value_and_gradient(tf.function(loss, **mode)), strict=True):
        np.testing.assert_allclose(eager, compiled, rtol=1e-4, atol=1e-6)
