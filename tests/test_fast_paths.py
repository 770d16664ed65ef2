"""What is written for speed gives the values and the gradients of the plain definition, in graph mode and under XLA."""

import numpy as np
import tensorflow as tf

from losses import bending_energy, dice_loss, multi_scale
from utils import reference_grid, resample, resize

SHAPE = (9, 7, 8)


def both(function, *arguments):
    """Value and the gradients to every argument."""
    arguments = [tf.constant(a) for a in arguments]
    with tf.GradientTape() as tape:
        tape.watch(arguments)
        value = function(*arguments)
        weighed = tf.reduce_sum(
            tf.cast(value, tf.float64) * np.cos(np.arange(np.prod(value.shape)).reshape(value.shape))
        )
    return [value, *tape.gradient(weighed, arguments)]


def agree(fast, plain, *arguments, atol=1e-5):
    expected = both(plain, *arguments)
    for mode in ({}, {"jit_compile": True}):
        run = tf.function(fast, **mode)
        for found, wanted in zip(both(run, *arguments), expected, strict=True):
            np.testing.assert_allclose(found, wanted, atol=atol, rtol=1e-4)


def plain_resample(volume, points):
    """Every voxel weighs in with the product of three hat functions of its distance."""
    hat = tf.nn.relu(1 - tf.abs(points[:, :, None] - tf.reshape(reference_grid(volume.shape[1:4]), [1, 1, -1, 3])))
    return tf.einsum("bpv,bvc->bpc", tf.reduce_prod(hat, -1), tf.reshape(volume, [len(volume), -1, volume.shape[-1]]))


def plain_smooth(volume, sigma):
    """A Gaussian as one dense three-dimensional convolution, the part beyond the border left out and made up for."""
    radius = np.arange(1 - max(SHAPE), max(SHAPE))
    line = np.exp(-0.5 * (radius / sigma) ** 2)
    kernel = tf.constant(line[:, None, None] * line[:, None] * line, tf.float32)[..., None, None]

    def convolve(v):
        return tf.nn.conv3d(v, kernel, [1] * 5, "SAME")

    total = convolve(tf.ones_like(volume[..., :1]))
    return tf.concat([convolve(v) for v in tf.split(volume, volume.shape[-1], axis=-1)], -1) / total


def plain_multi_scale(warped, fixed):
    return tf.add_n([dice_loss(*(v if s == 0 else plain_smooth(v, s) for v in (warped, fixed))) for s in (0, 1, 3)]) / 3


def plain_bending(ddf):
    def at(i, j, k):
        return ddf[:, 1 + i : SHAPE[0] - 1 + i, 1 + j : SHAPE[1] - 1 + j, 1 + k : SHAPE[2] - 1 + k]

    total = 0.0
    steps = (1, 0, 0), (0, 1, 0), (0, 0, 1)
    for a in steps:
        back = [-n for n in a]
        total += tf.reduce_mean((at(*a) - 2 * at(0, 0, 0) + at(*back)) ** 2)
        for b in steps:
            if a != b:  # each mixed derivative comes twice
                corners = [(np.multiply(p, a) + np.multiply(q, b), p * q) for p in (1, -1) for q in (1, -1)]
                total += tf.reduce_mean(tf.add_n([sign * at(*corner) for corner, sign in corners]) ** 2) / 16
    return total


def plain_resize(volume):
    """Each new voxel's place in the old grid, edges aligned and clipped to the outermost centres."""
    new = 5, 11, 16
    points = (reference_grid(new) + 0.5) * np.divide(SHAPE, new).astype(np.float32) - 0.5
    points = tf.clip_by_value(points, 0, np.subtract(SHAPE, 1).astype(np.float32))
    points = tf.repeat(tf.reshape(points, [1, -1, 3]), len(volume), axis=0)
    return tf.reshape(plain_resample(volume, points), [len(volume), *new, volume.shape[-1]])


def test_warp(rng):
    volume = rng.random((2, *SHAPE, 3), np.float32)
    points = rng.uniform(-2, 10, (2, 200, 3)).astype(np.float32)
    agree(lambda p: resample(tf.constant(volume), p), lambda p: plain_resample(tf.constant(volume), p), points)


def test_multi_scale_dice(rng):
    labels = rng.random((2, 2, *SHAPE, 3), np.float32)
    agree(lambda w, f: multi_scale(dice_loss, w, f, (0, 1, 3)), plain_multi_scale, *labels)


def test_bending_energy(rng):
    agree(bending_energy, plain_bending, rng.normal(size=(2, *SHAPE, 3)).astype(np.float32))


def test_resize(rng):
    agree(lambda v: resize(v, (5, 11, 16)), plain_resize, rng.random((2, *SHAPE, 4), np.float32))
