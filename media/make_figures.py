"""Make the pictures of README from the example data and the model that the default commands train.

    python media/make_figures.py

after `python train.py` and `python inference.py`. Writes beside this file: overview.png, history.png,
example_summary.txt and example_history.csv (copies of what those two wrote), similarity.png, scales.png, distance.png,
levels.png, weight.png.
"""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import config as settings

settings.import_tensorflow()

# isort: split
import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf
from matplotlib.collections import LineCollection
from scipy import ndimage
from scipy.stats import entropy
from tqdm import tqdm

import helpers
import losses
from networks import build_network
from pictures import BLUE, GREEN, ORANGE, RED, grey_limits
from utils import (
    dice_score,
    jacobian_determinant,
    moving_offset,
    reference_grid,
    resample,
    resize,
    smooth,
    target_registration_error,
)

MEDIA = Path(__file__).resolve().parent
CASE = "test03"


def load_pair(config, voxel_size, moving_shape, fixed_shape):
    """One test pair on the network's grids: moving and fixed Volume, and the true field as a DDF (X, Y, Z, 3)."""
    pair = next(p for p in helpers.find_pairs(config.test_dir) if p.case == CASE)
    volumes = helpers.read_pair(pair)
    moving, fixed = helpers.pair_to_network(pair, *volumes, "centre", moving_shape, fixed_shape, voxel_size)
    truth, affine = helpers.read_displacement(pair.true_displacement)
    world = helpers.voxel_to_world(fixed_shape, fixed.affine)
    u = helpers.interpolate(truth, np.linalg.inv(affine) @ fixed.affine, fixed_shape)
    inverse = np.linalg.inv(moving.affine)
    target = (world + u) @ inverse[:3, :3].T + inverse[:3, 3]
    ddf = target - reference_grid(fixed_shape).numpy() - moving_offset(moving_shape, fixed_shape)
    return moving, fixed, ddf.astype(np.float32)


def warp(volume, ddf, offset):
    """(MX, MY, MZ, C) -> (X, Y, Z, C) at i + offset + ddf(i)."""
    return resample(volume[None], reference_grid(ddf.shape[:3])[None] + offset + ddf)[0].numpy()


def show(axis, image, labels=(), colours=()):
    """The axial slice (X, Y) of an image in grey, and outlines of labels."""
    low, high = grey_limits(image)
    axis.imshow(image.T, cmap="gray", origin="lower", vmin=low, vmax=high)
    for label, colour in zip(labels, colours, strict=True):
        if label.max() > 0.5 > label.min():
            axis.contour(label.T, [0.5], colors=colour, linewidths=1.3)


def save(figure, name):
    for axis in figure.axes:
        if axis.images and not axis.get_xlabel() and axis.get_label() != "<colorbar>":
            axis.set(xticks=[], yticks=[])
    figure.savefig(MEDIA / name, dpi=90)
    plt.close(figure)


def similarity(config):
    """README, "Multimodal image registration": what the greys say of a shift, and what labels say."""
    shapes = (72, 72, 64), (48, 64, 44)
    moving, fixed, truth = load_pair(config, 1.5, *shapes)
    offset = moving_offset(*shapes)
    shifts = np.arange(-20, 20.1, 1)  # mm
    measures = {"correlation": [], "mutual information": [], "Dice of the gland": []}

    for shift in shifts:
        ddf = truth + np.array([0, shift / 1.5, 0], np.float32)
        image = warp(moving.image, ddf, offset)[..., 0]
        label = warp(moving.labels, ddf, offset)
        measures["correlation"].append(np.corrcoef(image.ravel(), fixed.image.ravel())[0, 1])
        joint, *_ = np.histogram2d(image.ravel(), fixed.image.ravel(), bins=32)
        measures["mutual information"].append(entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint.ravel()))
        measures["Dice of the gland"].append(1 - losses.dice(label[None], fixed.labels[None])[0, 0].numpy())
    image = warp(moving.image, truth, offset)[..., 0]
    middle = round(ndimage.center_of_mass(fixed.labels[..., 0])[2])
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained", width_ratios=(1, 1, 1.1, 1.9))
    for axis, volume, title in zip(
        axes, (fixed.image[..., 0], image), ("ultrasound", "MR, truly aligned"), strict=False
    ):
        show(axis, volume[..., middle], [fixed.labels[..., middle, 0]], [GREEN])
        axis.set_title(title)
    axes[2].hist2d(image.ravel(), fixed.image.ravel(), bins=48, norm="log", cmap="magma")
    axes[2].set(title="how often two greys meet", xlabel="MR, truly aligned", ylabel="ultrasound")
    for (name, values), colour in zip(measures.items(), (RED, ORANGE, GREEN), strict=True):
        values = (np.array(values) - min(values)) / np.ptp(values)
        axes[3].plot(shifts, values, color=colour, label=name, linewidth=3 if "Dice" in name else 1.5)
        axes[3].plot(shifts[values.argmax()], 1, "o", color=colour)
    axes[3].axvline(0, color="grey", linewidth=0.8)
    axes[3].set(title="similarity (0 = least, 1 = most)", xlabel="mm that the MR is off, front to back")
    axes[3].legend(loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, "similarity.png")


def scales(config):
    """README, "Label similarity measures": a large and a small label at each scale."""
    _, fixed, _ = load_pair(config, config.voxel_size, config.moving_shape, config.fixed_shape)
    figure, axes = plt.subplots(2, len(config.similarity_scales), figsize=(11, 5.6), layout="constrained")
    sizes = fixed.labels.sum(axis=(0, 1, 2))
    for row, k, name in zip(axes, (0, 1 + sizes[1:].argmin()), ("gland", "smallest landmark"), strict=True):
        middle = round(ndimage.center_of_mass(fixed.labels[..., k])[2])
        for axis, sigma in zip(row, config.similarity_scales, strict=True):
            label = np.array(smooth(fixed.labels[None], sigma))[0, :, :, middle, k]
            axis.imshow(label.T, origin="lower", cmap="viridis")
            scale = "as it is" if sigma == 0 else f"{sigma * config.voxel_size:g} mm"
            axis.set_title(f"{scale}, peak {label.max():.2g}")
        row[0].set_ylabel(name)
    save(figure, "scales.png")


def distance(config):
    """README, "Label similarity measures": loss and gradient against the distance of two small landmarks."""
    shape = (40, 16, 16)
    grid = reference_grid(shape).numpy()

    def landmark(x):
        return np.clip(2 - np.linalg.norm(grid - [x, 7.5, 7.5], axis=-1), 0, 1).astype(np.float32)[None, ..., None]

    kinds = {
        "Dice, one scale": (losses.dice, (0,), BLUE),
        "Dice, all scales": (losses.dice, config.similarity_scales, GREEN),
        "cross-entropy, one scale": (losses.cross_entropy, (0,), RED),
    }
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
    steps = np.arange(0, 12.1, 0.25)
    for name, (measure, sigmas, colour) in kinds.items():
        values = []
        for step in steps:
            shift = tf.Variable([step, 0, 0], dtype=tf.float32)
            with tf.GradientTape() as tape:
                warped = resample(landmark(25), grid[None] - shift + tf.constant([12.0, 0, 0]))  # its centre: 13 + step
                loss = losses.multi_scale(measure, warped, landmark(13), sigmas)[0, 0]
            values.append((loss.numpy(), abs(tape.gradient(loss, shift).numpy()[0])))
        for axis, column in zip(axes, np.transpose(values), strict=True):
            axis.plot(steps * config.voxel_size, column, color=colour, label=name)
    for axis, title in zip(axes, ("loss", "gradient: the pull per voxel of shift"), strict=True):
        axis.set(title=title, xlabel=f"mm between two landmarks of about {3 * config.voxel_size:g} mm")
        axis.grid(alpha=0.3)
    axes[0].legend()
    save(figure, "distance.png")


def levels(config, network):
    """README, "Networks": what the shift and each of the ddf_levels contribute to one registration."""
    moving, fixed, truth = load_pair(config, config.voxel_size, config.moving_shape, config.fixed_shape)
    heads = [layer.output for layer in network.layers if isinstance(layer, keras.layers.Conv3D) and layer.filters == 3]
    *parts, whole = keras.Model(network.inputs, [*heads, network.output["ddf"]])(
        [moving.image[None], fixed.image[None]]
    )
    names = [f"level {level}" for level in sorted(config.ddf_levels, reverse=True)]
    parts = {name: resize(part, config.fixed_shape)[0].numpy() for name, part in zip(names, parts, strict=True)}
    local = sum(parts.values())
    shift, voxel = whole[0].numpy() - local, config.voxel_size
    parts |= {"all levels": local, "true field\nless the shift": truth - shift}
    middle = round(ndimage.center_of_mass(fixed.labels[..., 0])[2])
    figure, axes = plt.subplots(1, len(parts), figsize=(13, 3.7), layout="constrained")
    gland = fixed.labels[..., 0] >= 0.5
    errors = [np.linalg.norm((truth - field)[gland], axis=-1).mean() * voxel for field in (shift, shift + local)]
    moved = "after the shift of the glands by {:.1f}, {:.1f}, {:.1f} mm".format(*shift[0, 0, 0] * voxel)
    figure.suptitle(f"{moved} the gland is {errors[0]:.1f} mm off on average, with all levels {errors[1]:.1f} mm")
    for axis, (name, part) in zip(axes, parts.items(), strict=True):
        plane = part[:, :, middle] * voxel
        shown = axis.imshow(np.linalg.norm(plane, axis=-1).T, origin="lower", cmap="viridis", vmin=0, vmax=4)
        at = np.mgrid[1 : plane.shape[0] : 3, 1 : plane.shape[1] : 3]
        axis.quiver(*at, *np.moveaxis(plane[at[0], at[1]], -1, 0)[:2], color="white", angles="xy", scale=25, width=0.01)
        axis.contour(fixed.labels[:, :, middle, 0].T, [0.5], colors=ORANGE, linewidths=1)
        axis.set_title(name, fontsize=11)
    figure.colorbar(shown, ax=axes, label="displacement, mm", shrink=0.8, extend="max")
    save(figure, "levels.png")


def weight(config):
    """README, "Deformation regularisation": one pair, its labels matched with three weights of the bending energy.

    No network: the field itself is what Adam changes, in 400 steps from zero, so only labels and regulariser speak.
    """
    moving, fixed, _ = load_pair(config, config.voxel_size, config.moving_shape, config.fixed_shape)
    grid, offset = reference_grid(config.fixed_shape), moving_offset(config.moving_shape, config.fixed_shape)
    middle = round(ndimage.center_of_mass(fixed.labels[..., 1])[2])
    weights = {"too small": 0.001, "about right": 5.0, "too large": 100.0}
    figure, axes = plt.subplots(1, 3, figsize=(12, 5), layout="constrained")
    for axis, (name, size) in zip(axes, weights.items(), strict=True):
        ddf = tf.Variable(tf.zeros([1, *config.fixed_shape, 3]))
        optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.2, 400))

        @tf.function
        def step(ddf=ddf, size=size):
            with tf.GradientTape() as tape:
                warped = resample(moving.labels[None], grid + offset + ddf)
                similarities = losses.multi_scale(losses.dice, warped, fixed.labels[None], config.similarity_scales)
                loss = tf.reduce_mean(similarities) + size * losses.bending_energy(ddf)
            return tape.gradient(loss, ddf)

        for _ in tqdm(range(400), name, disable=None):
            optimizer.apply_gradients([(step(), ddf)])
        field = ddf[0].numpy()
        folded = jacobian_determinant(field) <= 0
        show(axis, fixed.image[:, :, middle, 0])
        points = (grid.numpy() + field - field.mean(axis=(0, 1, 2)))[:, :, middle, :2]
        lines = [*points[::2], *np.swapaxes(points, 0, 1)[::2]]
        axis.add_collection(LineCollection(lines, colors=BLUE, linewidths=0.8))
        warped = warp(moving.labels, field, offset)
        for labels, colour in ((fixed.labels, GREEN), (warped, ORANGE)):
            for label in np.moveaxis(labels[:, :, middle], -1, 0):
                if label.max() > 0.5:
                    axis.contour(label.T, [0.5], colors=colour, linewidths=1.5)
        axis.plot(*np.argwhere(folded[:, :, middle]).T, "x", color=RED, markersize=5)
        overlap = dice_score(warped[..., 0] >= 0.5, fixed.labels[..., 0] >= 0.5)
        count, spacing = warped.shape[-1], np.diag([config.voxel_size] * 3 + [1])
        tre = [target_registration_error(warped[..., k], fixed.labels[..., k], spacing) for k in range(1, count)]
        measures = f"Dice {overlap:.2f}, TRE {np.mean(tre):.1f} mm, {100 * folded.mean():.1f} % folded (red)"
        axis.set(xlim=(-0.5, config.fixed_shape[0] - 0.5), ylim=(-0.5, config.fixed_shape[1] - 0.5))
        axis.set_title(f"weight {size:g}: {name}\n{measures}", fontsize=11)
    save(figure, "weight.png")


def main():
    config = settings.load(settings.Path("model") / settings.CONFIG_NAME)
    network = build_network(config)
    helpers.load_weights(network, Path("model") / settings.WEIGHTS["best"])
    shutil.copy(Path("output") / CASE / "overview.png", MEDIA)
    shutil.copy(Path("model") / "history.png", MEDIA)
    shutil.copy(Path("output") / "summary.txt", MEDIA / "example_summary.txt")
    shutil.copy(Path("model") / "history.csv", MEDIA / "example_history.csv")
    similarity(config)
    scales(config)
    distance(config)
    levels(config, network)
    weight(config)


if __name__ == "__main__":
    settings.run(main)
