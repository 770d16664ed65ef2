"""Coordinates, resampling, augmentation and metrics: pure functions.

Shapes: B batch; X, Y, Z fixed grid; MX, MY, MZ moving grid; L labels; C channels. Coordinates and displacements are in
voxels, in index order ("ij"), unless a name or a docstring says mm. README, "What a displacement field says".
"""

from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import tensorflow as tf
from scipy import ndimage

# -- Coordinates ---------------------------------------------------------------------------------------------------


def reference_grid(shape):
    """Index of every voxel: (X, Y, Z) -> (X, Y, Z, 3) float32."""
    axes = [tf.range(n, dtype=tf.float32) for n in shape]
    return tf.stack(tf.meshgrid(*axes, indexing="ij"), axis=-1)


def moving_offset(moving_shape, fixed_shape):
    """Voxels from a fixed index to the moving index that lies under it when the two centres coincide: (3,)."""
    return (np.array(moving_shape, np.float32) - np.array(fixed_shape, np.float32)) / 2


def affine_transform(points, affine, shape):
    """Apply affines about the centre c of a volume: p -> A (p - c) + t + c.

    points: (B or 1, ..., 3) voxels; affine: (B, 3, 4), [A | t], t in voxels; shape: (X, Y, Z). Returns (B, ..., 3).
    """
    centre = (np.array(shape, np.float32) - 1) / 2
    flat = tf.reshape(points - centre, [tf.shape(points)[0], -1, 3])
    moved = tf.matmul(flat, affine[:, :, :3], transpose_b=True) + affine[:, None, :, 3]
    return tf.reshape(moved, [-1, *points.shape[1:]]) + centre


def fit_affine(fixed_points, moving_points, ridge):
    """The least-squares affine from fixed to moving points, both (B, K, 3): (B, 3, 4), [A | t].

    Minimises |moving - A fixed - t|^2 + ridge |A - I|^2 in closed form, so a gradient passes through it to the points
    (KeyMorph, Wang et al. 2023, arXiv 2304.09941). The ridge, in voxel^2, keeps A near the identity; t is free.
    """
    fixed_mean, moving_mean = tf.reduce_mean(fixed_points, 1, True), tf.reduce_mean(moving_points, 1, True)
    fixed, moving = fixed_points - fixed_mean, moving_points - moving_mean
    covariance = tf.matmul(fixed, fixed, transpose_a=True) + ridge * tf.eye(3)
    change = tf.linalg.solve(covariance, tf.matmul(fixed, moving - fixed, transpose_a=True))  # (A - I)^T
    matrix = tf.eye(3) + tf.linalg.matrix_transpose(change)
    shift = moving_mean - tf.matmul(fixed_mean, matrix, transpose_b=True)
    return tf.concat([matrix, tf.linalg.matrix_transpose(shift)], axis=-1)


# -- Resampling ----------------------------------------------------------------------------------------------------


def lerp(a, b, fraction):  # linear interpolation
    return a + (b - a) * fraction


@tf.function(autograph=False, jit_compile=True)  # XLA makes one loop of these many small operations
def resample(volume, points):
    """Trilinear interpolation; the volume fades to zero over one voxel beyond its outermost voxel centres.

    volume: (B, X, Y, Z, C); points: (B, ..., 3) voxels, or (1, ..., 3) for all volumes alike, then without a gradient.
    Returns (B, ..., C). Differentiable in the points alone. The gradient of a point is the slope of the volume there,
    written out because automatic differentiation of the eight corners takes twice as long.
    """
    margin = 2  # voxels of zeros around the volume: a point further out sees the same as one among them
    padded = tf.pad(volume, [(0, 0), *[(margin, margin)] * 3, (0, 0)])
    _, *shape, channels = padded.shape
    size, strides = np.prod(shape), (shape[1] * shape[2], shape[2], 1)
    flat_volume = tf.reshape(padded, [-1, channels])
    start = tf.reshape(tf.range(tf.shape(volume)[0]) * size, [-1, *[1] * (len(points.shape) - 2)])  # of each volume

    @tf.custom_gradient
    def interpolate(points):
        points = tf.clip_by_value(points + margin, 0, np.array(shape, np.float32) - margin)
        lower = tf.floor(points)
        x, y, z = tf.split(points - lower, 3, axis=-1)  # the fraction along each axis
        first = sum(tf.cast(lower[..., axis], tf.int32) * stride for axis, stride in enumerate(strides))
        first = start + tf.clip_by_value(first, 0, size - 1 - sum(strides))  # a point that is NaN has an index too
        corners = [np.dot(corner, strides) for corner in product((0, 1), repeat=3)]
        c000, c001, c010, c011, c100, c101, c110, c111 = (tf.gather(flat_volume, first + corner) for corner in corners)
        c00, c01, c10, c11 = lerp(c000, c001, z), lerp(c010, c011, z), lerp(c100, c101, z), lerp(c110, c111, z)
        c0, c1 = lerp(c00, c01, y), lerp(c10, c11, y)
        dx = c1 - c0
        dy = lerp(c01 - c00, c11 - c10, x)
        dz = lerp(lerp(c001 - c000, c011 - c010, y), lerp(c101 - c100, c111 - c110, y), x)
        slope = tf.stack([dx, dy, dz], axis=-2)  # (B, ..., 3, C)
        return lerp(c0, c1, x), lambda upstream: tf.reduce_sum(upstream[..., None, :] * slope, axis=-1)

    return interpolate(points)


def warp(volume, ddf):
    """The spatial transformer: at fixed voxel i stands what the moving volume has at i + offset + ddf(i).

    volume: (B, MX, MY, MZ, C); ddf: (B, X, Y, Z, 3) voxels. Returns (B, X, Y, Z, C).
    """
    offset = moving_offset(volume.shape[1:4], ddf.shape[1:4])
    return resample(volume, reference_grid(ddf.shape[1:4]) + offset + ddf)


def warp_points(points, ddf):
    """Compose coordinates, so that a label is resampled once; beyond the moving grid stands the border's point.

    points: (B, MX, MY, MZ, 3), where each voxel of an augmented moving volume is read in the original one; ddf:
    (B, X, Y, Z, 3). Returns (B, X, Y, Z, 3): where each fixed voxel is read there.
    """
    offset = moving_offset(points.shape[1:4], ddf.shape[1:4])
    largest = np.array(points.shape[1:4], np.float32) - 1
    return resample(points, tf.clip_by_value(reference_grid(ddf.shape[1:4]) + offset + ddf, 0, largest))


def apply_along_axes(volume, matrices):
    """Multiply each spatial axis of (B, X, Y, Z, C) by its own (n_out, n_in) matrix.

    A Gaussian filter, a trilinear resize and a finite difference are all of this kind: linear, one axis at a time. On a
    CPU these small matrix products are faster than convolutions or slices, with C = 1 most of all.
    """
    for axis, matrix in enumerate(matrices, start=1):
        shape, (n_out, n_in) = list(volume.shape), matrix.shape
        after = int(np.prod(shape[axis + 1 :]))
        if after <= 8:  # the last axis, few channels: one large product, with many zeros, in place of many small ones
            of_all_channels = np.kron(matrix, np.eye(after)).astype(np.float32)
            volume = tf.matmul(tf.reshape(volume, [-1, n_in * after]), of_all_channels, transpose_b=True)
        else:
            volume = tf.matmul(matrix.astype(np.float32), tf.reshape(volume, [-1, n_in, after]))
        volume = tf.reshape(volume, [-1, *shape[1:axis], n_out, *shape[axis + 1 :]])
    return volume


def channels_to_batch(volume):
    """(B, X, Y, Z, C) -> (B * C, X, Y, Z, 1)."""
    return tf.reshape(tf.transpose(volume, [0, 4, 1, 2, 3]), [-1, *volume.shape[1:4], 1])


def smooth(volume, sigma):
    """Gaussian filter of (B, X, Y, Z, C), sigma in voxels, 0 for none; its weights sum to 1 also at the border."""
    if sigma == 0:
        return volume
    weights = [np.exp(-0.5 * (np.subtract.outer(range(n), range(n)) / sigma) ** 2) for n in volume.shape[1:4]]
    return apply_along_axes(volume, [w / w.sum(axis=1, keepdims=True) for w in weights])


def resize(volume, shape):
    """Trilinear resize of (B, X, Y, Z, C) to the given (X, Y, Z): edges aligned, constant beyond the outer centres."""
    matrices = []
    for n_in, n_out in zip(volume.shape[1:4], shape, strict=True):
        position = np.clip((np.arange(n_out) + 0.5) * n_in / n_out - 0.5, 0, n_in - 1)
        matrices.append(np.maximum(1 - np.abs(np.subtract.outer(position, np.arange(n_in))), 0))
    return apply_along_axes(volume, matrices)


# -- Augmentation: NumPy draws a few numbers for each pair, TensorFlow applies them ----------------------------------


def random_affine(rng, count, shape, amount, mirror_axis=-1, mirror=1):
    """Random affines about a volume's centre, for `affine_transform`: (count, 3, 4) float32.

    Every entry of the matrix departs from the identity by up to `amount`, and the shift is up to `amount` of half the
    volume. mirror: (count,) of +1 or -1, the sign along `mirror_axis`; an axis of -1 mirrors nothing.
    """
    change = rng.uniform(-amount, amount, (count, 3, 4))
    change[:, :, 3] *= np.array(shape) / 2
    affine = np.eye(3, 4) + change
    if mirror_axis >= 0:
        affine[:, mirror_axis, :3] *= np.reshape(mirror, (-1, 1))
    return affine.astype(np.float32)


def random_augmentation(rng, affine, elastic, intensity):
    """The arguments of `augmented_points` and of `augment_intensity` for one side of a batch, as two dictionaries.

    affine: (B, 3, 4); elastic: standard deviation in voxels of the displacement; intensity: largest log of gamma.
    """
    displacement = rng.normal(0, elastic, (len(affine), 5, 5, 5, 3))  # of control points
    log_gamma = rng.uniform(-intensity, intensity, (len(affine), 1, 1, 1, 1))
    log_gain = rng.normal(0, 0.6 * intensity, (len(affine), 3, 3, 3, 1))  # as of MR coils, or the probe's contact
    transform = {"affine": affine, "displacement": displacement.astype(np.float32)}
    return transform, {"log_gamma": log_gamma.astype(np.float32), "log_gain": log_gain.astype(np.float32)}


def augmented_points(shape, affine, displacement=None):
    """Where each voxel of an augmented volume is read in the original one: (B, *shape, 3) voxels."""
    points = affine_transform(reference_grid(shape)[None], affine, shape)
    return points if displacement is None else points + resize(displacement, shape)


def augment_intensity(image, log_gamma, log_gain):
    """Image (B, X, Y, Z, 1) in 0..1, times a smooth gain, to the power gamma (darker for gamma > 1)."""
    gain = tf.exp(resize(log_gain, image.shape[1:4]))
    return tf.clip_by_value(image * gain, 1e-4, 1) ** tf.exp(log_gamma)


# -- Points through a field (NumPy) --------------------------------------------------------------------------------


def map_points(points, ddf, offset):
    """From the fixed to the moving grid: i -> i + offset + ddf(i), points (N, 3) voxels, ddf (X, Y, Z, 3).

    Beyond the fixed grid the DDF keeps its border value.
    """
    ddf = [ndimage.map_coordinates(ddf[..., k], np.transpose(points), order=1, mode="nearest") for k in range(3)]
    return points + offset + np.stack(ddf, axis=-1)


def invert_points(points, ddf, offset, iterations=100):
    """From the moving to the fixed grid, the inverse of map_points by fixed-point iteration: points (N, 3) voxels.

    Where the field does not fold and stretches less than twofold it converges (Chen et al. 2008, doi
    10.1118/1.2816107); map_points of the result shows how far.
    """
    result = points - offset
    for _ in range(iterations):
        error = map_points(result, ddf, offset) - points
        result -= error
        if np.abs(error).max() < 1e-4:
            break
    return result


def invert_ddf(ddf, offset):
    """The DDF (X, Y, Z, 3) the other way: moving voxel k goes to k - offset + inverse(k).

    Returns inverse (..., 3), which covers the moving grid and all that the fixed one is mapped to, and its first index.
    """
    shape = np.array(ddf.shape[:3])
    moving_shape = np.round(2 * offset).astype(int) + shape
    mapped = np.moveaxis(np.indices(shape), 0, -1) + offset + ddf
    mapped = np.clip(mapped, -shape, moving_shape + shape)  # a wild field would ask for more memory than there is
    first = np.minimum(0, np.floor(mapped.min(axis=(0, 1, 2))).astype(int))
    end = np.maximum(moving_shape, np.ceil(mapped.max(axis=(0, 1, 2))).astype(int) + 1)
    index = np.indices(end - first, float).reshape(3, -1).T + first
    inverse = invert_points(index, ddf, offset) - index + offset
    return inverse.reshape(*(end - first), 3).astype(np.float32), first


# -- Full resolution (NumPy): displacements y - x in mm from a world point x to y -----------------------------------


def displacement_on(shape, affine, ddf, fixed_grid, moving_grid, offset):
    """The network's DDF as displacement y - x in mm (RAS) at every voxel of a grid.

    shape, affine: that grid, mostly the fixed image's own; ddf: (X, Y, Z, 3) voxels; fixed_grid, moving_grid: (4, 4)
    voxel to world; offset: (3,). A fixed point x lies at j = inv(fixed_grid) x and goes to
    y = moving_grid (j + offset + ddf(j)). Beyond the network grid the DDF keeps its border value.
    """
    to_grid, shift = np.linalg.inv(fixed_grid) @ affine, np.eye(4)
    shift[:3, 3] = offset
    undeformed = voxel_to_world(shape, moving_grid @ shift @ to_grid - affine)  # what a DDF of zero would give
    return undeformed + interpolate(ddf @ moving_grid[:3, :3].T.astype(np.float32), to_grid, shape)


def interpolate(field, to_field, shape):
    """A field (X, Y, Z, C) at voxel to_field @ i for every voxel i of a grid: linear, its border value outside."""
    position = to_field[:3, :3], to_field[:3, 3], shape
    channels = np.moveaxis(field, -1, 0)
    return np.stack([ndimage.affine_transform(c, *position, order=1, mode="nearest") for c in channels], axis=-1)


def voxel_to_world(shape, affine):
    """Affine map of every voxel index of a grid: (X, Y, Z, 3) float32."""
    affine, index = np.asarray(affine, np.float32), np.ogrid[: shape[0], : shape[1], : shape[2]]
    return sum((index[k].astype(np.float32)[..., None] * affine[:3, k] for k in range(3)), affine[:3, 3])


def in_view(points, shape):
    """Which points (..., 3), in voxels, lie in a volume: up to half a voxel beyond its outer centres, as ITK has it."""
    return ((points >= -0.5) & (points <= np.array(shape) - 0.5)).all(axis=-1)


def warp_to_fixed(data, affine, displacement, fixed_affine, order=1, outside=0):
    """Resample a volume once, at x + displacement(x) for every voxel x of the fixed image.

    data: (any shape) or labels (any shape, L), on the grid of matrix `affine`; displacement: (X, Y, Z, 3) mm, RAS.
    order: 1 trilinear, 0 nearest voxel; outside: the value beyond `in_view`. Returns (X, Y, Z) or (X, Y, Z, L).
    """
    inverse = np.linalg.inv(affine)
    points = voxel_to_world(displacement.shape[:3], inverse @ fixed_affine)  # where a displacement of zero leads to
    points += displacement @ inverse[:3, :3].T.astype(np.float32)
    inside, points = in_view(points, data.shape[:3]), np.moveaxis(points, -1, 0)

    def warp_channel(channel):
        values = ndimage.map_coordinates(channel, points, order=order, mode="nearest")
        return np.where(inside, values, np.asarray(outside, data.dtype))

    with ThreadPoolExecutor() as threads:
        warped = list(threads.map(warp_channel, np.moveaxis(data, -1, 0) if data.ndim == 4 else [data]))
    return np.stack(warped, axis=-1) if data.ndim == 4 else warped[0]


# -- Metrics -------------------------------------------------------------------------------------------------------


def centroids(labels):
    """Centre of mass in voxels of each label: (B, X, Y, Z, L) -> (B, L, 3); voxel 0, so far away, for an empty one."""
    total = tf.maximum(tf.reduce_sum(labels, [1, 2, 3]), 1e-6)
    return tf.einsum("bxyzl,xyzk->blk", labels, reference_grid(labels.shape[1:4])) / total[..., None]


def label_metrics(warped, fixed):
    """In a training step: Dice of the labels cut at 0.5, and distance of their centroids in voxels; both (B, L)."""
    a, b = tf.cast(warped > 0.5, tf.float32), tf.cast(fixed > 0.5, tf.float32)
    dice = 2 * tf.reduce_sum(a * b, [1, 2, 3]) / tf.maximum(tf.reduce_sum(a + b, [1, 2, 3]), 1e-6)
    return dice, tf.norm(centroids(warped) - centroids(fixed), axis=-1)


def dice_score(a, b):
    """Dice overlap of two binary masks, 0 to 1; NaN where both are empty."""
    total = a.sum() + b.sum()
    return 2 * np.sum(a & b) / total if total else np.nan


def target_registration_error(warped, fixed, affine):
    """Distance in mm between the centroids of a warped and a fixed landmark; NaN where one has left the volume."""
    if min(warped.sum(), fixed.sum()) < 1e-3:
        return np.nan
    return np.linalg.norm(affine[:3, :3] @ np.subtract(*map(ndimage.center_of_mass, (warped, fixed))))


def hausdorff_95(a, b, spacing):
    """The larger of the two directed 95th percentiles of the distance in mm between the surfaces of two masks."""
    if not a.any() or not b.any():
        return np.nan
    surfaces = [mask & ~ndimage.binary_erosion(mask) for mask in (a, b)]
    to_a, to_b = (ndimage.distance_transform_edt(~surface, sampling=spacing) for surface in surfaces)
    return max(np.percentile(to_b[surfaces[0]], 95), np.percentile(to_a[surfaces[1]], 95))


def jacobian_determinant(ddf):
    """Determinant of d(i + ddf(i)) / di at every voxel: (X, Y, Z, 3) voxels -> (X, Y, Z). At or below 0 it folds."""
    gradient = np.stack(np.gradient(ddf, axis=(0, 1, 2)), axis=-1)
    return np.linalg.det(gradient + np.eye(3))
