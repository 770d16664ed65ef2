"""Networks: a moving and a fixed image in, a dense displacement field (DDF) out. No network ever sees a label.

All four are Keras models of one signature: [moving (B, MX, MY, MZ, 1), fixed (B, X, Y, Z, 1)] -> a dictionary with
"ddf" (B, X, Y, Z, 3) in voxels; the centred one adds "moving_gland", "fixed_gland", "moving_centre" and "fixed_centre",
shaped like the images, which the loss compares with the gland. Their last layers start at zero, so training starts from
no deformation.
README, "Networks"; Hu et al. 2018 (doi 10.1016/j.media.2018.07.002 and arXiv 1711.01666).
"""

import keras
import tensorflow as tf
from keras import layers

from utils import centroids, moving_offset, reference_grid, resample, resize, smooth, transform_points

# -- Blocks --------------------------------------------------------------------------------------------------------


class Gain(layers.Layer):
    """Multiply each channel by a learned factor, zero at first."""

    def build(self, shape):
        self.gain = self.add_weight(shape=(shape[-1],), initializer="zeros", name="gain")

    def call(self, x):
        return x * self.gain


def conv(x, channels, kernel=3):
    return layers.Conv3D(channels, kernel, padding="same", kernel_initializer="he_normal")(x)


def activation(x):
    return layers.LeakyReLU(0.1)(x)


def shortcut_block(x):
    """Two convolutions around which the input is carried and added.

    The convolutions enter with a gain of zero (De and Smith 2020, arXiv 2002.10444), so that a deep network starts as
    a shallow one. This stands where Hu et al. have batch normalisation: it means the same for one pair as for a
    batch, in training as in inference, and costs nothing.
    """
    y = conv(activation(conv(x, x.shape[-1])), x.shape[-1])
    return activation(x + Gain()(y))


def normalised_block(x):
    """The same with instance normalisation (Ulyanov et al. 2016, arXiv 1607.08022) in place of the gain.

    The gland of patients that were not in the training is found better with it, its centre in ultrasound 0.4 to 0.7 mm
    nearer (means of two folds, media/experiments.csv).
    """

    def normalise(y):  # each channel of each volume to zero mean and unit variance, then a learned scale and shift
        return layers.GroupNormalization(groups=-1)(y)

    y = activation(normalise(conv(x, x.shape[-1])))
    return activation(x + normalise(conv(y, x.shape[-1])))


def encoder(x, channels, max_channels, first_kernel, block=shortcut_block, depth=5):
    """Residual down blocks from level 0 (finest): each half the size, twice the channels up to `max_channels`."""
    levels = []
    for level in range(depth):
        width = min(channels * 2**level, max_channels)
        x = block(activation(conv(x, width, first_kernel if level == 0 else 3)))
        levels.append(x)
        x = layers.MaxPool3D(2, padding="same")(x)
    return levels


def up_block(x, skip, block=shortcut_block):
    """Double the size and add what the encoder kept at this level.

    Additive upsampling (Hu et al. 2018): channels summed in groups, which needs no weights, beside a learned 1x1x1 mix.
    """
    channels = skip.shape[-1]
    grouped = layers.Reshape((*x.shape[1:4], channels, x.shape[-1] // channels))(x)
    summed = layers.Lambda(lambda v: tf.reduce_sum(v, axis=-1))(grouped)
    x = upsample(summed + conv(x, channels, kernel=1), skip.shape[1:4])
    return block(x + skip)


def upsample(x, shape):
    return layers.Lambda(lambda v: resize(v, shape))(x)


def ddf_head(x):
    """Features -> three displacement components, zero at first.

    Adam moves every weight alike, so a sum over n inputs would move sqrt(n) to n times as fast; the factor holds back.
    """
    n = 27 * x.shape[-1]
    return layers.Conv3D(3, 3, padding="same", kernel_initializer="zeros")(x * n**-0.5)


def standardise(image):
    """Zero mean and unit variance of each volume: the scanner's brightness and contrast fall away."""
    mean, variance = tf.nn.moments(image, [1, 2, 3, 4], keepdims=True)
    return (image - mean) * tf.math.rsqrt(variance + 1e-6)


def local_contrast(image):
    """Greys (B, X, Y, Z, 1) in 0..1 against what lies around them, in standard deviations there.

    Ultrasound fades with depth and varies with the probe's contact. The logarithm turns such factors into sums, which
    the local mean takes away. The constants are a grey, and a spread of the logarithm, that count as nothing.
    """
    logarithm = tf.math.log(image + 0.02)
    difference = logarithm - smooth(logarithm, 3.0)
    return difference * tf.math.rsqrt(smooth(difference**2, 3.0) + 0.08**2)


# -- Networks ------------------------------------------------------------------------------------------------------


def local_ddf(moving, fixed, channels, max_channels, first_kernel, ddf_levels):
    """LocalNet: two images (B, X, Y, Z, 1) on the fixed grid -> ddf.

    An encoder, a decoder with skip connections, and at each of `ddf_levels` a small DDF. They are summed from coarse
    to fine, all in voxels of level 0.
    """
    levels = encoder(layers.Concatenate()([moving, fixed]), channels, max_channels, first_kernel)
    x, ddf = levels[4], None
    for level in (4, 3, 2, 1, 0):
        if ddf is not None:
            ddf = upsample(ddf, levels[level].shape[1:4])
        if min(ddf_levels) <= level < 4:  # the decoder ends where the last DDF is read
            x = up_block(x, levels[level])
        if level in ddf_levels:
            ddf = ddf_head(x) if ddf is None else ddf + ddf_head(x)
    return ddf


def global_affine(moving, fixed, channels, max_channels, first_kernel):
    """GlobalNet: two images (B, X, Y, Z, 1) on the fixed grid -> affine (B, 3, 4) about that grid's centre."""
    shape = fixed.shape[1:4]
    x = encoder(layers.Concatenate()([moving, fixed]), channels, max_channels, first_kernel)[4]
    features = layers.Flatten()(x)
    entries = layers.Dense(12, kernel_initializer="zeros")(features * features.shape[-1] ** -0.5)  # as in ddf_head

    def to_affine(entries):
        # Entries are voxels: of shift in the last column, of motion at the volume's border in the others.
        border = tf.constant([[n / 2 for n in shape] + [1.0]])
        return tf.reshape(entries, [-1, 3, 4]) / border + tf.eye(3, 4)

    return layers.Lambda(to_affine)(entries)


def find_gland(image, channels, max_channels, dropout):
    """Where in one image (B, X, Y, Z, C) the gland is: two volumes (B, X, Y, Z, 1), worked out at half the resolution.

    gland: from 0 to 1, how much of it is there; 0.5 at first. centre: log-probability of each voxel to be its centre,
    as landmarks are found by heat maps; all alike at first. It is more exact than the centre of mass of the former.
    dropout: share of the coarsest features, half of it of the finer ones, that is withheld in training.
    """
    half = activation(layers.Conv3D(channels, 5, strides=2, padding="same", kernel_initializer="he_normal")(image))
    x, *finer = encoder(half, 2 * channels, max_channels, 3, normalised_block, depth=3)[::-1]
    x = layers.SpatialDropout3D(dropout)(x)
    for skip in finer:
        x = up_block(x, layers.SpatialDropout3D(dropout / 2)(skip), normalised_block)
    scores = upsample(layers.Conv3D(2, 3, padding="same", kernel_initializer="zeros")(x), image.shape[1:4])
    gland, centre = layers.Lambda(lambda v: tf.split(v, 2, axis=-1))(scores)
    gland = layers.Lambda(tf.sigmoid)(gland)
    centre = layers.Lambda(lambda v: v - tf.reduce_logsumexp(v, [1, 2, 3], keepdims=True))(centre)
    return gland, centre


def build_network(config):
    """The Keras model of "local", "global", "composite" or "centred" for the two grids (config.py, "Network")."""
    moving_shape, fixed_shape, max_channels = config.moving_shape, config.fixed_shape, config.max_channels
    moving_image = layers.Input((*moving_shape, 1))
    fixed_image = layers.Input((*fixed_shape, 1))
    moving, fixed = layers.Lambda(standardise)(moving_image), layers.Lambda(standardise)(fixed_image)
    grid = reference_grid(fixed_shape)[None]
    offset = moving_offset(moving_shape, fixed_shape)

    def apply_affine(affine, points=grid):
        return transform_points(points, affine, fixed_shape)

    def shift_of_centres(centres):  # as an affine: from the fixed gland's expected centre to that of the moving one
        moving_centre, fixed_centre = (centroids(tf.exp(centre))[:, 0] for centre in centres)
        shift = moving_centre - fixed_centre - offset
        return tf.concat([tf.eye(3, batch_shape=[tf.shape(shift)[0]]), shift[..., None]], axis=-1)

    def beside(image, gland):  # a second channel, which the local network reads but does not teach
        return layers.Lambda(lambda v: tf.concat([v[0], tf.stop_gradient(v[1]) - 0.5], -1))([image, gland])

    def model(ddf, **maps):
        return keras.Model([moving_image, fixed_image], {"ddf": ddf, **maps})

    local = config.channels, max_channels, config.first_kernel, config.ddf_levels
    aligned = layers.Lambda(lambda v: resample(v, grid + offset))(moving)  # as a DDF of zero would warp it
    if config.network == "local":
        return model(local_ddf(aligned, fixed, *local))

    maps = {}
    if config.network == "centred":
        images = {"moving": moving_image, "fixed": fixed_image}
        for (name, image), width in zip(images.items(), config.search_channels, strict=True):
            seen = layers.Lambda(lambda v: tf.concat([standardise(v), local_contrast(v)], -1))(image)
            maps[f"{name}_gland"], maps[f"{name}_centre"] = find_gland(seen, width, max_channels, config.dropout)
        centres = [maps["moving_centre"], maps["fixed_centre"]]
        affine = layers.Lambda(lambda v: tf.stop_gradient(shift_of_centres(v)))(centres)
        moving, fixed = beside(moving, maps["moving_gland"]), beside(fixed, maps["fixed_gland"])
    else:
        affine = global_affine(aligned, fixed, config.global_channels, max_channels, config.first_kernel)
    if config.network == "global":
        return model(layers.Lambda(lambda a: apply_affine(a) - grid)(affine))

    # Composite and centred: the affine first; the local network then sees the moving image that it warped. A fixed
    # point goes through the local DDF, then through the affine: i -> A (i + local(i)).
    warped = layers.Lambda(lambda v: resample(v[0], apply_affine(v[1]) + offset))([moving, affine])
    local_field = local_ddf(warped, fixed, *local)
    ddf = layers.Lambda(lambda v: apply_affine(v[1], grid + v[0]) - grid)([local_field, affine])
    return model(ddf, **maps)
