"""Muon: orthogonal steps, their size, and agreement with Keras' own on matrices."""

import inspect

import keras
import numpy as np
import pytest

from extras.optimizer import STEP_SIZE, Muon, orthogonalise


@pytest.mark.parametrize("shape", [(40, 6), (6, 40), (9, 9), (1, 7)])
def test_all_singular_values_become_about_one(shape, rng):
    matrix = rng.normal(size=shape).astype(np.float32) * 1e-3
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    found = orthogonalise(matrix).numpy()
    values = np.diag(u.T @ found @ vt.T)  # in the directions of the matrix's own singular vectors
    assert (values > 0.6).all() and (values < 1.25).all()
    np.testing.assert_allclose(found, u @ np.diag(values) @ vt, atol=1e-4)


def test_no_gradient_no_step():
    np.testing.assert_array_equal(orthogonalise(np.zeros((5, 3), np.float32)), np.zeros((5, 3)))


@pytest.mark.parametrize("shape", [(3, 3, 3, 8, 16), (16,), (3, 3, 3, 4, 3)])
def test_a_step_has_the_size_that_the_learning_rate_says(shape, rng):
    """Of kernels and of biases; and against the gradient."""
    variable = keras.Variable(np.zeros(shape, np.float32))
    optimizer = Muon(learning_rate=0.01)
    gradient = rng.normal(size=shape).astype(np.float32)
    optimizer.apply([gradient], [variable])
    step = variable.numpy()
    assert 0.5 < np.sqrt((step**2).mean()) / (0.01 * STEP_SIZE) < 1.5
    assert (step * gradient).sum() < 0


def test_it_agrees_with_keras_on_matrices(rng):
    theirs = getattr(keras.optimizers, "Muon", None)  # Keras 3.10 and later; 3.13 and later scale their steps so
    if not theirs or "rms_rate" not in inspect.signature(theirs).parameters:
        pytest.skip("this version of Keras has no such optimizer")
    start, gradients = rng.normal(size=(12, 5)), rng.normal(size=(3, 12, 5))
    results = []
    for kind in (Muon, theirs):
        variable, optimizer = keras.Variable(start.astype(np.float32)), kind(learning_rate=0.01, weight_decay=0.1)
        for gradient in gradients.astype(np.float32):
            optimizer.apply([gradient], [variable])
        results.append(variable.numpy())
    assert np.abs(results[0] - start).max() > 1e-3
    np.testing.assert_allclose(*results, atol=1e-6)
