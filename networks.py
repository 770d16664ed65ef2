"""Networks: a moving and a fixed image in, a dense displacement field (DDF) out. No network ever sees a label.

Each of NETWORKS builds a Keras model: [moving (B, MX, MY, MZ, 1), fixed (B, X, Y, Z, 1)] -> ddf (B, X, Y, Z, 3), in
voxels. warped(i) = moving(i + offset + ddf(i)), where the offset lays the centres of the two grids over each other.
Training starts from a DDF of zero. README, "Networks"; Hu et al. ISBI 2018, arXiv 1711.01666.
"""

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from keras.activations import leaky_relu

from utils import affine_transform, fit_affine, reference_grid, resize, warp

MAX_CHANNELS = 64  # where the doubling of channels ends (paper: 512); small data sets need no more
LOCAL_DEPTH, GLOBAL_DEPTH = 4, 3  # levels of the U-Nets, from half the resolution down
KEYPOINTS = 16  # corresponding points that GlobalNet finds; an affine needs 4
PLACE_RADIUS = 5  # voxels, of the sphere on which the keypoints start
BUMP_WIDTH = 8  # voxels, standard deviation of the Gaussian added to each heat map: wide, so learnt scores outweigh it
RIDGE = 2 * KEYPOINTS  # voxel^2, how strongly fit_affine() holds the affine near the identity: 2 for each point

# -- Blocks --------------------------------------------------------------------------------------------------------


def lambda_layer(function, *tensors, name=None, **options):
    """Use a TensorFlow function on the tensors of a Keras model."""
    return layers.Lambda(lambda inputs: function(*inputs, **options), name=name)(tensors)


def convolution(x, channels, kernel=3, kernel_initializer="he_normal", **options):
    return layers.Conv3D(channels, kernel, padding="same", kernel_initializer=kernel_initializer, **options)(x)


def zero_convolution(x, channels):
    """A last convolution. Its weights are zero at first, so training starts from no deformation."""
    return convolution(x, channels, kernel_initializer="zeros")


def instance_norm(x):
    """Zero mean and unit variance of each channel of each volume (B, X, Y, Z, C): instance normalisation."""
    flat = tf.reshape(x, [-1, np.prod(x.shape[1:4]), x.shape[-1]])  # one axis of voxels is faster to sum than three
    centred = flat - tf.reduce_mean(flat, 1, keepdims=True)
    result = centred * tf.math.rsqrt(tf.reduce_mean(centred**2, 1, keepdims=True) + 1e-6)
    return tf.reshape(result, [-1, *x.shape[1:]])


def residual_block(x):
    """Two convolutions around which the input is carried and added (He et al. 2016, arXiv 1512.03385).

    Instance normalisation (Ulyanov et al. 2016, arXiv 1607.08022) follows each. Unlike the batch normalisation of Hu
    et al., it gives a pair one result, alone or in a batch, in training or not.
    """
    channels = x.shape[-1]
    y = leaky_relu(lambda_layer(instance_norm, convolution(x, channels, use_bias=False)))  # a bias would cancel out
    return leaky_relu(x + lambda_layer(instance_norm, convolution(y, channels, use_bias=False)))


def up_block(x, skip):
    """Additive upsampling (Hu et al. 2018): sums of channel groups and a 1x1x1 convolution, enlarged; plus `skip`."""
    channels = skip.shape[-1]
    groups = layers.Reshape((*x.shape[1:4], channels, x.shape[-1] // channels))(x)
    x = lambda_layer(tf.reduce_sum, groups, axis=-1) + convolution(x, channels, kernel=1)
    return residual_block(lambda_layer(resize, x, shape=skip.shape[1:4]) + skip)


def u_net(x, channels, depth, dropout, name):
    """Features of a volume (B, X, Y, Z, C) at `depth` levels, coarsest first; the last ones have half its resolution.

    Each level of the encoder has half the size of the one before and twice its channels, up to MAX_CHANNELS; the
    decoder comes back up with skip connections. dropout: of whole channels of the coarsest level; half for the skips.
    """
    x, skips = convolution(x, channels, strides=2, activation="leaky_relu"), []
    for level in range(depth):
        if level:
            x = layers.MaxPool3D(2, padding="same")(x)
        x = residual_block(convolution(x, min(channels * 2**level, MAX_CHANNELS), activation="leaky_relu"))
        skips.append(x)
    *skips, coarsest = skips
    features = [layers.SpatialDropout3D(dropout, name=f"{name}_features")(coarsest)]  # outliers.py looks for the name
    for skip in reversed(skips):
        features.append(up_block(features[-1], layers.SpatialDropout3D(dropout / 2)(skip)))
    return features


# -- LocalNet: a displacement for every voxel ------------------------------------------------------------------------


def local_ddf(moving, fixed, channels, dropout):
    """Two images (B, X, Y, Z, 1) on the fixed grid -> ddf (B, X, Y, Z, 3).

    A small DDF from each level of a U-Net; they are summed from coarse to fine, all in voxels of the fixed grid.
    """
    ddf = None
    for features in u_net(layers.Concatenate()([moving, fixed]), channels, LOCAL_DEPTH, dropout, "local"):
        head = zero_convolution(features, 3)
        ddf = head if ddf is None else lambda_layer(resize, ddf, shape=head.shape[1:4]) + head
    return lambda_layer(resize, ddf, shape=fixed.shape[1:4])


# -- GlobalNet: corresponding points, and the affine that fits them --------------------------------------------------


def find_keypoints(image, channels, dropout, name):
    """Find K points in one image (B, X, Y, Z, 1): (B, K, 3), in voxels from its centre.

    The finest features of a U-Net give K heat maps. Convolutions are translation-equivariant: where the organ moves,
    its points follow.
    """
    features = u_net(image, channels, GLOBAL_DEPTH, dropout, name)[-1]
    return lambda_layer(heat_map_points, zero_convolution(features, KEYPOINTS), name=f"{name}_points")


def heat_map_priors(shape, count):
    """Where each of K points starts: grid (X, Y, Z, 3), places (K, 3), log_bumps (X, Y, Z, K).

    From zero scores alone, all K points would start as one and get the same gradient. So each starts in a place of its
    own, with a Gaussian bump there. All are in voxels of the image from its centre.
    """
    grid = 2 * (reference_grid(shape) - (np.array(shape, np.float32) - 1) / 2)  # 2: heat maps have half the resolution
    z = 1 - (2 * np.arange(count) + 1) / count  # a Fibonacci lattice spreads points evenly over a sphere
    angle, r = np.pi * (1 + 5**0.5) * np.arange(count), np.sqrt(1 - z**2)
    places = PLACE_RADIUS * np.stack([r * np.cos(angle), r * np.sin(angle), z], axis=-1).astype(np.float32)
    log_bumps = -tf.reduce_sum((grid[..., None, :] - places) ** 2, axis=-1) / (2 * BUMP_WIDTH**2)
    return grid, places, log_bumps


def heat_map_points(scores):
    """Heat maps (B, X/2, Y/2, Z/2, K) -> points (B, K, 3), in voxels from the volume's centre."""
    grid, places, log_bumps = heat_map_priors(scores.shape[1:4], scores.shape[-1])
    # The border shifts the mean of each bump. Less that mean, scores of zero give exactly the places.
    return places + soft_argmax(scores + log_bumps, grid) - soft_argmax(log_bumps[None], grid)


def soft_argmax(scores, grid):
    """Expected position under the softmax of each heat map: scores (B, X, Y, Z, K), grid (X, Y, Z, 3) -> (B, K, 3)."""
    scores = tf.reshape(scores, [-1, np.prod(grid.shape[:3]), scores.shape[-1]])
    return tf.einsum("bvk,vd->bkd", tf.nn.softmax(scores, axis=1), tf.reshape(grid, [-1, 3]))


def global_affine(moving, fixed, channels, dropout):
    """Two images, each with a grid and a U-Net of its own -> affine (B, 3, 4) from fixed to moving, about centres.

    Nothing says which points to find. The label loss teaches that point k is the same spot in both images.
    """
    fixed_points = find_keypoints(fixed, channels, dropout, "fixed")
    moving_points = find_keypoints(moving, channels, dropout, "moving")
    return lambda_layer(fit_affine, fixed_points, moving_points, ridge=RIDGE)


def compose_ddf(affine, local=0.0, *, shape):
    """The DDF of two maps, voxel i first moved by local(i), then by an affine (B, 3, 4): A (i + local(i)) - i."""
    grid = reference_grid(shape)[None]
    return affine_transform(grid + local, affine, shape) - grid


# -- The three networks ----------------------------------------------------------------------------------------------


def image_inputs(*shapes):
    """The inputs of a model (a list), and then each of them normalised."""
    images = [layers.Input((*shape, 1)) for shape in shapes]
    return images, *(lambda_layer(instance_norm, image) for image in images)


def local_net(moving_shape, fixed_shape, channels, dropout):
    """LocalNet alone: a displacement for every voxel."""
    images, moving, fixed = image_inputs(moving_shape, fixed_shape)
    moving = lambda_layer(warp, moving, ddf=tf.zeros((1, *fixed_shape, 3)))  # onto the fixed grid, centre on centre
    return keras.Model(images, local_ddf(moving, fixed, channels, dropout))


def global_net(moving_shape, fixed_shape, channels, dropout):
    """GlobalNet alone: an affine."""
    images, moving, fixed = image_inputs(moving_shape, fixed_shape)
    affine = global_affine(moving, fixed, channels, dropout)
    return keras.Model(images, lambda_layer(compose_ddf, affine, shape=fixed_shape))


def composite_net(moving_shape, fixed_shape, channels, dropout):
    """GlobalNet, then LocalNet on the image as the affine has warped it. A voxel takes the other order."""
    images, moving, fixed = image_inputs(moving_shape, fixed_shape)
    affine = global_affine(moving, fixed, channels, dropout)
    warped = lambda_layer(warp, moving, lambda_layer(compose_ddf, affine, shape=fixed_shape))
    local = local_ddf(warped, fixed, channels, dropout)
    return keras.Model(images, lambda_layer(compose_ddf, affine, local, shape=fixed_shape))


NETWORKS = {"local": local_net, "global": global_net, "composite": composite_net}
