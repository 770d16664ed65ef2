"""Losses: label similarity at several scales, and deformation regularisers. README, "Label similarity measures"."""

import numpy as np
import tensorflow as tf

from utils import apply_along_axes, channels_to_batch, smooth

EPSILON = 1e-6  # keeps the loss of an empty label, and logarithms, finite

# -- Label losses: two labels (B, X, Y, Z, L) in [0, 1] -> one value per label (B, L), smallest where they agree -------


def dice_loss(warped, fixed):
    """1 - soft Dice with squared sums (V-Net, Milletari et al. 2016, arXiv 1606.04797), in [0, 1].

    With squared sums two equal labels have loss 0 at every scale, so a smoothed label can still be matched perfectly;
    plain sums would leave a large constant, and next to no gradient, at the wide scales.
    """
    overlap = tf.reduce_sum(warped * fixed, [1, 2, 3])
    total = tf.reduce_sum(warped**2, [1, 2, 3]) + tf.reduce_sum(fixed**2, [1, 2, 3])
    return 1 - 2 * overlap / (total + EPSILON)


def jaccard_loss(warped, fixed):
    """1 - soft Jaccard index (intersection over union) with squared sums, in [0, 1]."""
    dice_score = 1 - dice_loss(warped, fixed)
    return 1 - dice_score / (2 - dice_score)


def cross_entropy(warped, fixed):
    """Mean binary cross-entropy over voxels, the fixed label as the target probability."""
    p = tf.clip_by_value(warped, EPSILON, 1 - EPSILON)
    return -tf.reduce_mean(fixed * tf.math.log(p) + (1 - fixed) * tf.math.log(1 - p), [1, 2, 3])


def mean_squared(warped, fixed):
    """Mean squared difference over voxels."""
    return tf.reduce_mean((warped - fixed) ** 2, [1, 2, 3])


LABEL_LOSSES = {
    "dice": dice_loss,
    "jaccard": jaccard_loss,
    "cross-entropy": cross_entropy,
    "mean-squared": mean_squared,
}


def multi_scale(loss, warped, fixed, scales):
    """Mean of a label loss over Gaussian-smoothed copies of both labels (Hu et al. 2018).

    scales: standard deviations in voxels, 0 = the label as it is. Returns (B, L).
    """
    count = fixed.shape[-1]
    warped, fixed = channels_to_batch(warped), channels_to_batch(fixed)  # one channel is smoothed faster than many
    values = [loss(smooth(warped, sigma), smooth(fixed, sigma)) for sigma in scales]
    return tf.reshape(tf.add_n(values) / len(values), [-1, count])


def masked_mean(values, mask):
    """Mean over a pair's labels whose mask is 1 (0 if there are none), then over pairs. Both (B, L). Scalar."""
    per_pair = tf.reduce_sum(values * mask, 1) / tf.maximum(tf.reduce_sum(mask, 1), 1)
    return tf.reduce_mean(per_pair)


# -- Deformation regularisation: ddf (B, X, Y, Z, 3) in voxels -> scalar -------------------------------------------

STENCILS = np.array([[0, 1, 0], [-0.5, 0, 0.5], [1, -2, 1]])  # of the value, the first and the second derivative


def derivatives(ddf, *orders):
    """Central differences of each component in the interior, one tensor (B * 3, X-2, Y-2, Z-2, 1) for each order.

    orders: each a tuple for x, y and z, such as (1, 0, 1) for dxz.
    """

    def matrix(size, order):
        return sum(weight * np.eye(size - 2, size, shift) for shift, weight in enumerate(STENCILS[order]))

    components, shape = channels_to_batch(ddf), ddf.shape[1:4]
    return [apply_along_axes(components, map(matrix, shape, order)) for order in orders]


def gradient_l1(ddf):
    """Mean over voxels and components of |dx| + |dy| + |dz|."""
    return tf.add_n([tf.reduce_mean(tf.abs(d)) for d in derivatives(ddf, (1, 0, 0), (0, 1, 0), (0, 0, 1))])


def gradient_l2(ddf):
    """Mean over voxels and components of dx^2 + dy^2 + dz^2."""
    return tf.add_n([tf.reduce_mean(d**2) for d in derivatives(ddf, (1, 0, 0), (0, 1, 0), (0, 0, 1))])


def bending_energy(ddf):
    """Mean over voxels and components of dxx^2 + dyy^2 + dzz^2 + 2 (dxy^2 + dxz^2 + dyz^2) (Rueckert et al. 1999).

    Zero for every affine field, so shift, rotation and scale cost nothing.
    """
    pure = derivatives(ddf, (2, 0, 0), (0, 2, 0), (0, 0, 2))
    mixed = derivatives(ddf, (1, 1, 0), (1, 0, 1), (0, 1, 1))
    return tf.add_n([tf.reduce_mean(d**2) for d in pure]) + 2 * tf.add_n([tf.reduce_mean(d**2) for d in mixed])


REGULARISERS = {"bending": bending_energy, "gradient-l2": gradient_l2, "gradient-l1": gradient_l1}
