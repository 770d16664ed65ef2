"""Networks: a moving and a fixed image in, a dense displacement field (DDF) out. No network ever sees a label.

Each builder returns a Keras model: [moving (B, MX, MY, MZ, 1), fixed (B, X, Y, Z, 1)] -> ddf (B, X, Y, Z, 3) in voxels.
The warped image has at i what the moving one has at i + offset + ddf(i); the offset lays the centres of the two grids
over each other, and training starts from a DDF of zero. README, "Networks"; Hu et al. ISBI 2018, arXiv 1711.01666.
"""

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from keras.activations import leaky_relu

from utils import affine_transform, fit_affine, reference_grid, resize, warp

MAX_CHANNELS = 64  # where the doubling of channels ends (paper: 512); small data sets need no more
LOCAL_DEPTH, GLOBAL_DEPTH = 5, 3  # levels of the two U-Nets
KEYPOINTS = 16  # corresponding points that GlobalNet finds; an affine needs 4
PLACE_RADIUS = 5  # voxels, of the sphere on which the keypoints start
BUMP_WIDTH = 8  # voxels, standard deviation of the Gaussian that each heat map starts with: wide, so it hardly steers
RIDGE = 2 * KEYPOINTS  # voxel^2; keeps the affine near the identity as long as the points are poor
DDF_RATE, HEAT_MAP_RATE = 8, 24  # learning-rate multipliers of the last convolutions; heat maps must become sharp

# -- Blocks --------------------------------------------------------------------------------------------------------


def lambda_layer(function, *tensors, name=None, **options):
    """Use a TensorFlow function on the tensors of a Keras model."""
    return layers.Lambda(lambda inputs: function(*inputs, **options), name=name)(tensors)


def convolution(x, channels, kernel=3, **options):
    return layers.Conv3D(channels, kernel, padding="same", kernel_initializer="he_normal", **options)(x)


def instance_norm(x):
    """Zero mean and unit variance of each channel of each volume (B, X, Y, Z, C): instance normalisation."""
    flat = tf.reshape(x, [-1, np.prod(x.shape[1:4]), x.shape[-1]])  # one axis of voxels is summed fastest
    centred = flat - tf.reduce_mean(flat, 1, keepdims=True)
    result = centred * tf.math.rsqrt(tf.reduce_mean(centred**2, 1, keepdims=True) + 1e-6)
    return tf.reshape(result, [-1, *x.shape[1:]])


def residual_block(x):
    """Two convolutions around which the input is carried and added (He et al. 2016, arXiv 1512.03385).

    Instance normalisation (Ulyanov et al. 2016, arXiv 1607.08022) follows each. Unlike the batch normalisation of Hu
    et al., it gives a pair one result, alone or in a batch, in training or not. At a level of one voxel it gives zero.
    """
    channels = x.shape[-1]  # no bias: the normalisation would remove it
    y = leaky_relu(lambda_layer(instance_norm, convolution(x, channels, use_bias=False)))
    return leaky_relu(x + lambda_layer(instance_norm, convolution(y, channels, use_bias=False)))


def encoder(x, channels, depth):
    """Features of each level, from 0 (finest): each has half the size and twice the channels of the one before."""
    levels = []
    for level in range(depth):
        x = layers.MaxPool3D(2, padding="same")(x) if levels else x
        x = residual_block(convolution(x, min(channels * 2**level, MAX_CHANNELS), activation="leaky_relu"))
        levels.append(x)
    return levels


def up_block(x, skip):
    """Additive upsampling (Hu et al. 2018) to the size of the encoder's features `skip`, which are added."""
    channels = skip.shape[-1]
    groups = layers.Reshape((*x.shape[1:4], channels, x.shape[-1] // channels))(x)
    x = lambda_layer(tf.reduce_sum, groups, axis=-1) + convolution(x, channels, kernel=1)
    return residual_block(lambda_layer(resize, x, shape=skip.shape[1:4]) + skip)


def zero_convolution(x, channels, rate):
    """A last convolution, zero at first. It learns rate / sqrt(n) times as fast as others, n its weights per output.

    Adam moves every weight alike, so without the root a level with more channels would run ahead of the others.
    """
    n = 27 * x.shape[-1]
    return layers.Conv3D(channels, 3, padding="same", kernel_initializer="zeros")(x * rate * n**-0.5)


# -- LocalNet: a displacement for every voxel ------------------------------------------------------------------------


def local_ddf(moving, fixed, channels, ddf_levels):
    """Two images (B, X, Y, Z, 1) on the fixed grid -> ddf (B, X, Y, Z, 3).

    A U-Net, with a small DDF at each of `ddf_levels`; they are summed from coarse to fine, all in voxels of level 0.
    """
    levels = encoder(layers.Concatenate()([moving, fixed]), channels, LOCAL_DEPTH)
    x, ddf = levels[-1], None
    for level in reversed(range(LOCAL_DEPTH)):
        if ddf is not None:
            ddf = lambda_layer(resize, ddf, shape=levels[level].shape[1:4])
        if min(ddf_levels) <= level < LOCAL_DEPTH - 1:  # the decoder ends at the finest of ddf_levels
            x = up_block(x, levels[level])
        if level in ddf_levels:
            head = zero_convolution(x, 3, DDF_RATE)
            ddf = head if ddf is None else ddf + head
    return ddf


# -- GlobalNet: corresponding points, and the affine that fits them --------------------------------------------------


def keypoints(image, channels, dropout, name):
    """Find K points in one image (B, X, Y, Z, 1): (B, K, 3), in voxels from its centre.

    A U-Net at half the resolution gives K heat maps. Convolutions are translation-equivariant: where the organ moves,
    its points follow. dropout: rate for the coarsest features, and half of it for the finer ones.
    """
    half = convolution(image, channels, strides=2, activation="leaky_relu")
    x, *skips = encoder(half, 2 * channels, GLOBAL_DEPTH)[::-1]
    x = layers.SpatialDropout3D(dropout)(x)
    for skip in skips:
        x = up_block(x, layers.SpatialDropout3D(dropout / 2)(skip))
    return lambda_layer(heat_map_points, zero_convolution(x, KEYPOINTS, HEAT_MAP_RATE), name=f"{name}_points")


def heat_map_points(scores):
    """Heat maps (B, X/2, Y/2, Z/2, K) -> points (B, K, 3), in voxels from the volume's centre.

    From zero scores alone, all K points would start as one and get the same gradient. So each starts in a place of its
    own, with a Gaussian bump there. The label loss teaches that point k means the same spot in both images.
    """
    shape, count = scores.shape[1:4], scores.shape[-1]
    grid = 2 * (reference_grid(shape) - (np.array(shape, np.float32) - 1) / 2)
    z = 1 - (2 * np.arange(count) + 1) / count  # a Fibonacci lattice spreads points evenly over a sphere
    angle, r = np.pi * (1 + 5**0.5) * np.arange(count), np.sqrt(1 - z**2)
    places = PLACE_RADIUS * np.stack([r * np.cos(angle), r * np.sin(angle), z], axis=-1).astype(np.float32)
    log_bumps = -tf.reduce_sum((grid[..., None, :] - places) ** 2, axis=-1) / (2 * BUMP_WIDTH**2)
    # What is subtracted makes scores of zero give exactly the places, although the border cuts the bumps.
    return places + soft_argmax(scores + log_bumps, grid) - soft_argmax(log_bumps[None], grid)


def soft_argmax(scores, grid):
    """Expected position under the softmax of each heat map: scores (B, X, Y, Z, K), grid (X, Y, Z, 3) -> (B, K, 3)."""
    scores = tf.reshape(scores, [-1, np.prod(grid.shape[:3]), scores.shape[-1]])
    return tf.einsum("bvk,vd->bkd", tf.nn.softmax(scores, axis=1), tf.reshape(grid, [-1, 3]))


def global_affine(moving, fixed, channels, dropout):
    """Two images, each with a grid and a U-Net of its own -> affine (B, 3, 4) from fixed to moving, about centres."""
    points = (keypoints(image, channels, dropout, name) for name, image in (("fixed", fixed), ("moving", moving)))
    return lambda_layer(fit_affine, *points, ridge=RIDGE)


def affine_ddf(affine, local=0.0, *, shape):
    """An affine (B, 3, 4) after a local DDF, as one DDF (B, X, Y, Z, 3): ddf(i) = A (i + local(i)) - i."""
    grid = reference_grid(shape)[None]
    return affine_transform(grid + local, affine, shape) - grid


# -- The three networks ----------------------------------------------------------------------------------------------


def image_inputs(*shapes):
    images = [layers.Input((*shape, 1)) for shape in shapes]
    return images, *(lambda_layer(instance_norm, image) for image in images)


def local_net(moving_shape, fixed_shape, channels, ddf_levels, dropout):
    """LocalNet alone: a displacement for every voxel. dropout is GlobalNet's, and not used."""
    images, moving, fixed = image_inputs(moving_shape, fixed_shape)
    moving = lambda_layer(warp, moving, ddf=tf.zeros((1, *fixed_shape, 3)))  # onto the fixed grid, centre on centre
    return keras.Model(images, local_ddf(moving, fixed, channels, ddf_levels))


def global_net(moving_shape, fixed_shape, channels, ddf_levels, dropout):
    """GlobalNet alone: an affine. ddf_levels are LocalNet's, and not used."""
    images, moving, fixed = image_inputs(moving_shape, fixed_shape)
    affine = global_affine(moving, fixed, channels, dropout)
    return keras.Model(images, lambda_layer(affine_ddf, affine, shape=fixed_shape))


def composite_net(moving_shape, fixed_shape, channels, ddf_levels, dropout):
    """GlobalNet first; LocalNet then sees the moving image as the affine has warped it."""
    images, moving, fixed = image_inputs(moving_shape, fixed_shape)
    affine = global_affine(moving, fixed, channels, dropout)
    warped = lambda_layer(warp, moving, lambda_layer(affine_ddf, affine, shape=fixed_shape))
    local = local_ddf(warped, fixed, channels, ddf_levels)
    return keras.Model(images, lambda_layer(affine_ddf, affine, local, shape=fixed_shape))


NETWORKS = {"local": local_net, "global": global_net, "composite": composite_net}
