"""Coordinates and metrics: grids, affine transforms, resampling, points through a field; Dice, TRE, HD95, folding.

Shapes: B batch; X, Y, Z fixed grid; MX, MY, MZ moving grid; L labels; C channels. Coordinates and displacements are in
voxels, in index order ("ij"), unless a name or docstring says mm. README, "Multimodal image registration".
"""

import numpy as np
import tensorflow as tf
from scipy import ndimage

# -- Coordinates ---------------------------------------------------------------------------------------------------


def reference_grid(shape):
    """Voxel index of every voxel: (X, Y, Z) -> (X, Y, Z, 3) float32."""
    axes = [tf.range(n, dtype=tf.float32) for n in shape]
    return tf.stack(tf.meshgrid(*axes, indexing="ij"), axis=-1)


def transform_points(points, affine, shape):
    """Apply affines about the centre of a volume: A (p - c) + t + c.

    points: (B or 1, ..., 3) voxels; affine: (B, 3, 4), [A | t], t in voxels; shape: (X, Y, Z). Returns (B, ..., 3).
    """
    centre = (tf.constant(shape, tf.float32) - 1) / 2
    flat = tf.reshape(points - centre, [tf.shape(points)[0], -1, 3])
    moved = tf.matmul(flat, affine[:, :, :3], transpose_b=True) + affine[:, None, :, 3]
    return tf.reshape(moved, [-1, *points.shape[1:]]) + centre


def moving_offset(moving_shape, fixed_shape):
    """Voxels from fixed index to moving index that put the two volume centres together: (3,)."""
    return (np.array(moving_shape, np.float32) - np.array(fixed_shape, np.float32)) / 2


# -- Resampling ----------------------------------------------------------------------------------------------------


def resample(volume, points):
    """Trilinear interpolation; the volume fades to zero over one voxel beyond its outermost centres.

    volume: (B, X, Y, Z, C); points: (B, ..., 3) voxels, or (1, ..., 3) for all volumes alike, then without a gradient.
    Returns (B, ..., C). Differentiable in the points alone: their gradient is written out, because what automatic
    differentiation makes of the eight neighbours takes twice as long.
    """
    margin = 2  # voxels of zeros around the volume: a point further out sees the same as one among them
    padded = tf.pad(volume, [(0, 0), *[(margin, margin)] * 3, (0, 0)])
    _, *shape, channels = padded.shape
    size, strides = np.prod(shape), (shape[1] * shape[2], shape[2], 1)
    flat_volume = tf.reshape(padded, [-1, channels])
    start = tf.reshape(tf.range(tf.shape(volume)[0]) * size, [-1, *[1] * (len(points.shape) - 2)])  # of each volume

    def between(a, b, fraction):
        return a + (b - a) * fraction

    @tf.custom_gradient
    def interpolate(points):
        points = tf.clip_by_value(points + margin, 0, np.array(shape, np.float32) - margin)
        lower = tf.floor(points)
        x, y, z = tf.split(points - lower, 3, axis=-1)  # the fraction along each axis
        first = sum(tf.cast(lower[..., axis], tf.int32) * stride for axis, stride in enumerate(strides))
        first = start + tf.clip_by_value(first, 0, size - 1 - sum(strides))  # a point that is NaN has an index too

        def neighbour(a, b, c):
            return tf.gather(flat_volume, first + (a * strides[0] + b * strides[1] + c))

        ends = [[(neighbour(a, b, 0), neighbour(a, b, 1)) for b in (0, 1)] for a in (0, 1)]  # of 4 edges along z
        edges = [[between(*ends[a][b], z) for b in (0, 1)] for a in (0, 1)]
        faces = [between(*edges[a], y) for a in (0, 1)]
        dx = faces[1] - faces[0]
        dy = between(*(edges[a][1] - edges[a][0] for a in (0, 1)), x)
        dz = between(*(between(*(ends[a][b][1] - ends[a][b][0] for b in (0, 1)), y) for a in (0, 1)), x)
        slopes = tf.stack([dx, dy, dz], axis=-2)  # (B, ..., 3, C)
        return between(*faces, x), lambda upstream: tf.reduce_sum(upstream[..., None, :] * slopes, axis=-1)

    return interpolate(points)


def apply_along_axes(volume, matrices):
    """Multiply each spatial axis of (B, X, Y, Z, C) by its own (n_out, n_in) matrix; None leaves an axis alone.

    A Gaussian filter, a trilinear resize and a finite difference are all of this kind: linear, one axis at a time. On a
    CPU these small matrix products are faster than convolutions or slices, with C = 1 most of all.
    """
    for axis, matrix in enumerate(matrices, start=1):
        if matrix is None:
            continue
        shape = list(volume.shape)
        n_out, n_in = matrix.shape
        after = int(np.prod(shape[axis + 1 :]))
        if after <= 8:  # the last axis, few channels: one large product, with many zeros, in place of many small ones
            of_all_channels = np.kron(matrix, np.eye(after, dtype=np.float32))
            volume = tf.matmul(tf.reshape(volume, [-1, n_in * after]), of_all_channels, transpose_b=True)
        else:
            volume = tf.matmul(matrix, tf.reshape(volume, [-1, n_in, after]))
        volume = tf.reshape(volume, [-1, *shape[1:axis], n_out, *shape[axis + 1 :]])
    return volume


def channels_to_batch(volume):
    """(B, X, Y, Z, C) -> (B * C, X, Y, Z, 1)."""
    return tf.reshape(tf.transpose(volume, [0, 4, 1, 2, 3]), [-1, *volume.shape[1:4], 1])


def gaussian_matrix(size, sigma):
    """(size, size) matrix of a Gaussian filter, sigma in voxels; each row sums to 1 also at the border."""
    distance = np.arange(size)[:, None] - np.arange(size)[None, :]
    weights = np.exp(-0.5 * (distance / sigma) ** 2)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def smooth(volume, sigma):
    """Gaussian filter of (B, X, Y, Z, C), sigma in voxels; 0 leaves it as it is."""
    return apply_along_axes(volume, [gaussian_matrix(n, sigma) for n in volume.shape[1:4]]) if sigma > 0 else volume


def stencil_matrix(size, stencil):
    """(size - 2, size) matrix that applies three weights to each voxel and its two neighbours."""
    return sum(w * np.eye(size - 2, size, k) for k, w in enumerate(stencil)).astype(np.float32)


def resize_matrix(size_in, size_out):
    """(size_out, size_in) matrix of linear interpolation, voxel edges aligned, constant beyond the outer centres."""
    position = np.clip((np.arange(size_out) + 0.5) * size_in / size_out - 0.5, 0, size_in - 1)
    hat = 1 - np.abs(position[:, None] - np.arange(size_in)[None, :])
    return np.maximum(hat, 0).astype(np.float32)


def resize(volume, shape):
    """Trilinear resize of (B, X, Y, Z, C) to the given (X, Y, Z)."""
    sizes = zip(volume.shape[1:4], shape, strict=True)
    return apply_along_axes(volume, [None if n == m else resize_matrix(n, m) for n, m in sizes])


# -- Augmentation --------------------------------------------------------------------------------------------------


def random_affine(seed, batch_size, shape, amount, mirror, mirror_axis):
    """Random affines about the centre, for `transform_points`: (B, 3, 4).

    Every entry of the matrix departs from the identity by up to `amount`, and the shift is up to `amount` of half the
    volume. mirror: (B,) +1 or -1, the sign along `mirror_axis` (-1 = none), so that both sides of a pair turn alike.
    """
    noise = tf.random.stateless_uniform([batch_size, 3, 4], seed, -amount, amount)
    matrix = tf.eye(3) + noise[:, :, :3]
    shift = noise[:, :, 3] * tf.constant(shape, tf.float32) / 2
    if mirror_axis >= 0:
        axis = tf.one_hot(mirror_axis, 3)
        matrix *= (1 - axis + axis * mirror[:, None])[:, :, None]
    return tf.concat([matrix, shift[..., None]], axis=-1)


def random_smooth(seed, batch_size, shape, places, channels, amount):
    """Random numbers that vary slowly: (B, *shape, channels).

    They are normal with standard deviation `amount` at places^3 points, and interpolated between.
    """
    numbers = tf.random.stateless_normal([batch_size, places, places, places, channels], seed)
    return resize(numbers * amount, shape)


def change_greys(image, gamma, gain):
    """Image in 0..1, times a gain, to the power gamma: darker greys for gamma > 1, brighter for gamma < 1.

    image, gain: (B, X, Y, Z, 1); gamma: (B, 1, 1, 1, 1).
    """
    return tf.clip_by_value(image * gain, 1e-4, 1) ** gamma


# -- Metrics in a training step ------------------------------------------------------------------------------------


def centroids(labels):
    """Centre of mass in voxels of each label: (B, X, Y, Z, L) -> (B, L, 3); voxel 0 for an empty one."""
    total = tf.maximum(tf.reduce_sum(labels, [1, 2, 3]), 1e-6)
    return tf.einsum("bxyzl,xyzk->blk", labels, reference_grid(labels.shape[1:4])) / total[..., None]


def label_metrics(warped, fixed):
    """Dice of the labels cut at 0.5, and distance of their centroids in voxels; both (B, L).

    The centroid of a label that has left the volume counts as voxel 0, a large distance rather than none.
    """
    a, b = tf.cast(warped > 0.5, tf.float32), tf.cast(fixed > 0.5, tf.float32)
    dice = 2 * tf.reduce_sum(a * b, [1, 2, 3]) / tf.maximum(tf.reduce_sum(a + b, [1, 2, 3]), 1e-6)
    return dice, tf.norm(centroids(warped) - centroids(fixed), axis=-1)


# -- Points through a field (NumPy) --------------------------------------------------------------------------------


def map_points(points, ddf, offset):
    """From the fixed to the moving grid: j -> j + offset + ddf(j), points (N, 3) voxels, ddf (X, Y, Z, 3).

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


# -- Metrics of one case (NumPy) -----------------------------------------------------------------------------------


def dice_score(a, b):
    """Dice overlap of two binary masks, 0 to 1; NaN where both are empty."""
    total = a.sum() + b.sum()
    return 2 * np.sum(a & b) / total if total else np.nan


def centroid(label, affine):
    """Centre of mass (3,) of a label (X, Y, Z), through the matrix `affine` (4, 4); NaN for an empty label."""
    total = label.sum(dtype=float)
    if total < 1e-3:
        return np.full(3, np.nan)
    index = [
        np.arange(n) @ label.sum(axis=tuple({0, 1, 2} - {k}), dtype=float) / total for k, n in enumerate(label.shape)
    ]
    return affine[:3, :3] @ index + affine[:3, 3]


def target_registration_error(warped, fixed, affine):
    """Distance in mm between the centroids of a warped and a fixed landmark; NaN where one has left the volume."""
    return np.linalg.norm(centroid(warped, affine) - centroid(fixed, affine))


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
