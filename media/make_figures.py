"""Make the pictures of README from the example data and the model that the default commands train.

    python media/make_figures.py

after `python train.py` and `python inference.py`. Writes beside this file: overview.png, history.png,
example_summary.txt and example_history.csv (copies of what those two wrote), similarity.png, scales.png, distance.png,
weight.png.
"""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from extras import devices  # noqa: F401  before TensorFlow

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
import utils
from config import EXAMPLE_DIR, TrainConfig
from extras.errors import run
from extras.report import BLUE, GREEN, ORANGE, RED, intensity_limits

MEDIA, CASE, CONFIG = Path(__file__).resolve().parent, "test03", TrainConfig()


def load_pair(voxel_size=CONFIG.voxel_size, moving_shape=CONFIG.moving_shape, fixed_shape=CONFIG.fixed_shape):
    """One test pair on the network's grids: moving and fixed Volume, and the true field as a DDF (1, X, Y, Z, 3)."""
    pair = next(p for p in helpers.find_pairs(EXAMPLE_DIR / "test") if p.case == CASE)
    volumes = helpers.read_pair(pair)
    moving, fixed = helpers.pair_to_network(*volumes, "centre", moving_shape, fixed_shape, voxel_size)
    truth, affine = volumes[1].truth
    displacement = utils.interpolate(truth, np.linalg.inv(affine) @ fixed.affine, fixed_shape)
    target = utils.voxel_to_world(fixed_shape, fixed.affine) + displacement
    inverse = np.linalg.inv(moving.affine)
    ddf = target @ inverse[:3, :3].T + inverse[:3, 3] - utils.reference_grid(fixed_shape).numpy()
    return moving, fixed, (ddf - utils.moving_offset(moving_shape, fixed_shape)).astype(np.float32)[None]


def show(axis, image, labels=(), colours=()):
    """An axial slice (X, Y) in grey, and outlines of labels."""
    low, high = intensity_limits(image)
    axis.imshow(image.T, cmap="gray", origin="lower", vmin=low, vmax=high)
    for label, colour in zip(labels, colours, strict=True):
        if label.max() > 0.5 > label.min():
            axis.contour(label.T, [0.5], colors=colour, linewidths=1.5)
    axis.set(xticks=[], yticks=[])


def save(figure, name):
    figure.savefig(MEDIA / name, dpi=90)
    plt.close(figure)


def similarity():
    """README, "Multimodal image registration": what intensities say of a shift, and what labels say."""
    moving, fixed, truth = load_pair(1.5, (72, 72, 64), (48, 64, 44))
    shifts = np.arange(-20, 20.1, 1)  # mm
    measures = {"correlation": [], "mutual information": [], "Dice of the gland": []}
    for shift in shifts:
        ddf = truth + np.array([0, shift / 1.5, 0], np.float32)
        image, label = (utils.warp(v[None], ddf)[0].numpy() for v in (moving.image, moving.labels))
        joint, *_ = np.histogram2d(image.ravel(), fixed.image.ravel(), bins=32)
        measures["correlation"].append(np.corrcoef(image.ravel(), fixed.image.ravel())[0, 1])
        measures["mutual information"].append(entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint.ravel()))
        measures["Dice of the gland"].append(1 - losses.dice_loss(label[None], fixed.labels[None])[0, 0].numpy())
    image = utils.warp(moving.image[None], truth)[0, ..., 0].numpy()
    middle = round(ndimage.center_of_mass(fixed.labels[..., 0])[2])
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained", width_ratios=(1, 1, 1.1, 1.9))
    for axis, volume, title in zip(
        axes, (fixed.image[..., 0], image), ("ultrasound", "MR, truly aligned"), strict=False
    ):
        show(axis, volume[..., middle], [fixed.labels[..., middle, 0]], [GREEN])
        axis.set_title(title)
    axes[2].hist2d(image.ravel(), fixed.image.ravel(), bins=48, norm="log", cmap="magma")
    axes[2].set(title="how often two intensities meet", xlabel="MR, truly aligned", ylabel="ultrasound")
    for (name, values), colour in zip(measures.items(), (RED, ORANGE, GREEN), strict=True):
        values = (np.array(values) - min(values)) / np.ptp(values)
        axes[3].plot(shifts, values, color=colour, label=name, linewidth=3 if "Dice" in name else 1.5)
        axes[3].plot(shifts[values.argmax()], 1, "o", color=colour)
    axes[3].axvline(0, color="grey", linewidth=0.8)
    axes[3].set(title="similarity (0 = least, 1 = most)", xlabel="displacement, front to back (mm)")
    axes[3].legend(loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, "similarity.png")


def scales():
    """README, "Label similarity measures": a large and a small label at each scale."""
    _, fixed, _ = load_pair()
    figure, axes = plt.subplots(2, len(CONFIG.similarity_scales), figsize=(11, 5.6), layout="constrained")
    smallest = 1 + fixed.labels.sum(axis=(0, 1, 2))[1:].argmin()
    for row, k, name in zip(axes, (0, smallest), ("gland", "smallest landmark"), strict=True):
        middle = round(ndimage.center_of_mass(fixed.labels[..., k])[2])
        for axis, sigma in zip(row, CONFIG.similarity_scales, strict=True):
            label = np.array(utils.smooth(fixed.labels[None], sigma))[0, :, :, middle, k]
            axis.imshow(label.T, origin="lower", cmap="viridis")
            scale = f"{sigma * CONFIG.voxel_size:g} mm" if sigma else "as it is"
            axis.set(title=f"{scale}, peak {label.max():.2g}", xticks=[], yticks=[])
        row[0].set_ylabel(name)
    save(figure, "scales.png")


def distance():
    """README, "Label similarity measures": loss and gradient against the distance of two small landmarks."""
    grid = utils.reference_grid((40, 16, 16)).numpy()

    def landmark(x):
        return np.clip(2 - np.linalg.norm(grid - [x, 7.5, 7.5], axis=-1), 0, 1).astype(np.float32)[None, ..., None]

    figure, axes = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
    for name, measure, sigmas, colour in (
        ("Dice, one scale", losses.dice_loss, (0,), BLUE),
        ("Dice, all scales", losses.dice_loss, CONFIG.similarity_scales, GREEN),
        ("cross-entropy, one scale", losses.cross_entropy, (0,), RED),
    ):
        values, steps = [], np.arange(0, 12.1, 0.25)
        for step in steps:
            shift = tf.Variable([step, 0, 0], dtype=tf.float32)
            with tf.GradientTape() as tape:
                warped = utils.resample(landmark(25), grid[None] - shift + tf.constant([12.0, 0, 0]))  # to 13 + step
                loss = losses.multi_scale(measure, warped, landmark(13), sigmas)[0, 0]
            values.append((loss.numpy(), abs(tape.gradient(loss, shift).numpy()[0])))
        for axis, column in zip(axes, np.transpose(values), strict=True):
            axis.plot(steps * CONFIG.voxel_size, column, color=colour, label=name)
    for axis, title in zip(axes, ("loss", "gradient: the pull per voxel of shift"), strict=True):
        axis.set(title=title, xlabel=f"mm between two landmarks of about {3 * CONFIG.voxel_size:g} mm")
        axis.grid(alpha=0.3)
    axes[0].legend()
    save(figure, "distance.png")


def weight():
    """README, "Deformation regularisation": one pair, its labels matched with three weights of the bending energy.

    No network: the field itself is what Adam changes, in 400 steps from zero, so only labels and regulariser speak.
    """
    moving, fixed, _ = load_pair()
    middle = round(ndimage.center_of_mass(fixed.labels[..., 1])[2])
    figure, axes = plt.subplots(1, 3, figsize=(12, 5), layout="constrained")
    for axis, (name, size) in zip(
        axes, {"too small": 0.001, "about right": 5.0, "too large": 100.0}.items(), strict=True
    ):
        ddf = tf.Variable(tf.zeros([1, *CONFIG.fixed_shape, 3]))
        optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.2, 400))

        @tf.function
        def gradient(ddf=ddf, size=size):
            with tf.GradientTape() as tape:
                warped = utils.warp(moving.labels[None], ddf)
                similarities = losses.multi_scale(
                    losses.dice_loss, warped, fixed.labels[None], CONFIG.similarity_scales
                )
                loss = tf.reduce_mean(similarities) + size * losses.bending_energy(ddf)
            return tape.gradient(loss, ddf)

        for _ in tqdm(range(400), name, disable=None):
            optimizer.apply_gradients([(gradient(), ddf)])
        field, warped = ddf[0].numpy(), utils.warp(moving.labels[None], ddf)[0].numpy()
        labels = [*np.moveaxis(fixed.labels[:, :, middle], -1, 0), *np.moveaxis(warped[:, :, middle], -1, 0)]
        count, folded = warped.shape[-1], utils.jacobian_determinant(field) <= 0
        show(axis, fixed.image[:, :, middle, 0], labels, [GREEN] * count + [ORANGE] * count)
        points = (utils.reference_grid(folded.shape).numpy() + field - field.mean(axis=(0, 1, 2)))[:, :, middle, :2]
        lines = [*points[::2], *np.swapaxes(points, 0, 1)[::2]]
        axis.add_collection(LineCollection(lines, colors=BLUE, linewidths=0.8))
        axis.plot(*np.argwhere(folded[:, :, middle]).T, "x", color=RED, markersize=5)
        overlap = utils.dice_score(warped[..., 0] >= 0.5, fixed.labels[..., 0] >= 0.5)
        mm = np.diag([CONFIG.voxel_size] * 3 + [1])
        tre = [utils.target_registration_error(warped[..., k], fixed.labels[..., k], mm) for k in range(1, count)]
        measures = f"Dice {overlap:.2f}, TRE {np.mean(tre):.1f} mm, {100 * folded.mean():.1f} % folded (red)"
        axis.set(xlim=(-0.5, folded.shape[0] - 0.5), ylim=(-0.5, folded.shape[1] - 0.5))
        axis.set_title(f"weight {size:g}: {name}\n{measures}", fontsize=11)
    save(figure, "weight.png")


def main():
    shutil.copy(Path("output") / CASE / "overview.png", MEDIA)
    shutil.copy(Path("model") / "history.png", MEDIA)
    shutil.copy(Path("output") / "summary.txt", MEDIA / "example_summary.txt")
    shutil.copy(Path("model") / "history.csv", MEDIA / "example_history.csv")
    for draw in (similarity, scales, distance, weight):
        draw()


if __name__ == "__main__":
    run(main)
