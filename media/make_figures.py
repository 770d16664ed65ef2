"""Make the pictures of README from the example data and the model that the default commands train.

    python media/make_figures.py

after `python train.py` and `python inference.py`. Writes beside this file: overview.png, history.png,
example_summary.txt (copies of what those two wrote), similarity.png, batch.png, ddf.png,
keypoints.png, scales.png, distance.png, weight.png.
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
from scipy import ndimage
from scipy.stats import entropy
from tqdm import tqdm

import helpers
import losses
import networks
import train
import utils
from config import EXAMPLE_DIR, TrainConfig
from extras.checkpoint import load_weights
from extras.errors import run
from extras.report import BLUE, GREEN, ORANGE, RED, save_figure, show

MEDIA, CASE, CONFIG = Path(__file__).resolve().parent, "test00", TrainConfig()


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
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained", width_ratios=(1, 1, 2.4))
    show(axes[0], fixed.image[..., middle, 0], (GREEN, [fixed.labels[..., middle, 0]]))
    show(axes[1], image[..., middle], (GREEN, [fixed.labels[..., middle, 0]]))
    axes[0].set_title("ultrasound")
    axes[1].set_title("MR, truly aligned")
    for (name, values), colour in zip(measures.items(), (RED, ORANGE, GREEN), strict=True):
        values = (np.array(values) - min(values)) / np.ptp(values)
        axes[2].plot(shifts, values, color=colour, label=name, linewidth=3 if "Dice" in name else 2)
    axes[2].axvline(0, color="grey", linewidth=0.8)
    axes[2].set(title="similarity, each from its least (0) to its most (1)", xlabel="MR moved from the truth (mm)")
    axes[2].legend(loc="upper right")
    return figure


def batch():
    """README, "Data": one batch as the network gets it, and the labels that only the loss sees."""
    prepared = helpers.PreparedPairs(helpers.find_pairs(EXAMPLE_DIR / "train")[:20], *CONFIG.grid_options())
    arrays, cases = train.sample_batch(CONFIG, prepared, range(20), step=4)
    figure, axes = plt.subplots(2, CONFIG.batch_size, figsize=(11, 6), layout="constrained")
    for row, side, shape in zip(axes, ("moving", "fixed"), (CONFIG.moving_shape, CONFIG.fixed_shape), strict=True):
        points = utils.augmented_points(shape, **arrays[f"{side}_transform"])
        images = utils.augment_intensity(utils.resample(arrays[f"{side}_image"], points), **arrays[f"{side}_intensity"])
        labels = utils.resample(arrays[f"{side}_labels"], points).numpy()
        for axis, image, label, mask in zip(row, images.numpy(), labels, arrays["mask"], strict=True):
            middle = round(ndimage.center_of_mass(label[..., 0])[2])
            count = round(mask.sum())
            show(axis, image[:, :, middle, 0], (GREEN, np.moveaxis(label[:, :, middle, :count], -1, 0)))
        row[0].set_ylabel(f"{side} image\n{' x '.join(map(str, shape))} voxels", fontsize=12)
    for column, case in zip(axes.T, cases.split(", "), strict=True):
        for axis, patient in zip(column, case.split(" to "), strict=True):
            axis.set_title(patient.replace("train", "patient "), fontsize=11)
    return figure


def ddf():
    """README, "Networks": what a displacement field says at one voxel, on the true field of a test pair."""
    moving, fixed, truth = load_pair()
    middle = round(ndimage.center_of_mass(fixed.labels[..., 0])[2])
    inside = np.argwhere(fixed.labels[:, :, middle, 0] > 0.9)
    starts = np.insert(inside, 2, middle, axis=1) + utils.moving_offset(CONFIG.moving_shape, CONFIG.fixed_shape)
    ends = starts + truth[0, inside[:, 0], inside[:, 1], middle]
    chosen = np.abs(ends % 1 - 0.5)[:, :2].max(axis=1).argmin()  # an arrow that ends well between voxels
    voxel, start, end = inside[chosen], starts[chosen], ends[chosen]
    depth = round(end[2])
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.4), layout="constrained")
    show(axes[0], fixed.image[:, :, middle, 0])
    axes[0].plot(*voxel, "s", color=GREEN, markersize=8, fillstyle="none", markeredgewidth=2.5)
    axes[0].set_title("fixed image: voxel i asks", fontsize=12)
    for axis, window in zip(axes[1:], (None, 3), strict=True):
        show(axis, moving.image[:, :, depth, 0])
        axis.plot(*start[:2], "s", color=GREEN, markersize=8, fillstyle="none", markeredgewidth=2.5)
        axis.annotate("", end[:2], start[:2], arrowprops={"arrowstyle": "->", "color": ORANGE, "lw": 2.5})
        if window:
            corner = np.floor(end[:2])
            axis.plot(*(corner + np.array([[0, 0], [0, 1], [1, 0], [1, 1]])).T, "o", color=BLUE, markersize=10)
            axis.plot(*end[:2], "x", color=ORANGE, markersize=13, markeredgewidth=3)
            low, high = np.minimum(start, end)[:2] - 1.5, np.maximum(start, end)[:2] + 1.5
            centre, half = (low + high) / 2, max(high - low) / 2
            axis.set(xlim=(centre[0] + half, centre[0] - half), ylim=(centre[1] - half, centre[1] + half))
    axes[1].indicate_inset((*(centre - half), 2 * half, 2 * half), edgecolor="white", alpha=1)
    axes[1].set_title("moving image: from i + offset (square)\nalong ddf(i) (arrow)", fontsize=12)
    axes[2].set_title(
        "the value there (cross) is interpolated from the\nvoxels around it (dots: those on this slice)", fontsize=12
    )
    return figure


def keypoints():
    """README, "Networks": heat maps of three of GlobalNet's points, and every third point, on a test pair."""
    moving, fixed, _ = load_pair()
    network = networks.NETWORKS[CONFIG.network](**CONFIG.network_options())
    load_weights(network, "model", "best")
    heads = [network.get_layer(f"{side}_points") for side in ("fixed", "moving")]
    model = keras.Model(network.inputs, [(head.input, head.output) for head in heads])
    figure, axes = plt.subplots(2, 4, figsize=(12, 6.6), layout="constrained")
    found = model([moving.image[None], fixed.image[None]])
    colours = plt.colormaps["hsv"](np.linspace(0, 1, networks.KEYPOINTS, endpoint=False))
    for row, volume, (scores, points), name in zip(axes, (fixed, moving), found, ("fixed", "moving"), strict=True):
        shape = np.array(volume.image.shape[:3])
        middle = round(ndimage.center_of_mass(volume.labels[..., 0])[2])
        *_, log_bumps = networks.heat_map_priors(scores.shape[1:4], networks.KEYPOINTS)
        heat = keras.ops.softmax(scores[0] + log_bumps, axis=(0, 1, 2)).numpy()
        points = points[0].numpy() + (shape - 1) / 2
        for axis, k in zip(row, (0, 6, 15), strict=False):
            show(axis, volume.image[:, :, round(points[k, 2]), 0])
            extent = (-0.5, shape[0] - 0.5, -0.5, shape[1] - 0.5)
            flat = heat[..., k].sum(axis=2)
            axis.imshow(flat.T, origin="lower", extent=extent, cmap="magma", alpha=0.55, interpolation="bilinear")
            axis.plot(*points[k, :2], "o", color=colours[k], markeredgecolor="white", markersize=9)
            axis.set_title(f"heat map {k + 1}" if name == "fixed" else "", fontsize=12)
        show(row[3], volume.image[:, :, middle, 0], (GREEN, [volume.labels[:, :, middle, 0]]))
        for k in range(0, networks.KEYPOINTS, 3):
            row[3].plot(*points[k, :2], "o", color=colours[k], markeredgecolor="white")
            row[3].annotate(k + 1, points[k, :2], (4, 4), textcoords="offset points", color="white", fontsize=11)
        row[3].set_title("six of the points, on one slice" if name == "fixed" else "", fontsize=12)
        row[0].set_ylabel(f"{name} image", fontsize=12)
    return figure


def scales():
    """README, "Label similarity measures": a landmark's two labels, apart at first, at each scale."""
    moving, fixed, _ = load_pair()
    warped = utils.warp(moving.labels[None], tf.zeros((1, *CONFIG.fixed_shape, 3))).numpy()
    smallest = 1 + fixed.labels.sum(axis=(0, 1, 2))[1:].argmin()
    figure, axes = plt.subplots(1, len(CONFIG.similarity_scales), figsize=(12, 4), layout="constrained")
    for axis, sigma in zip(axes, CONFIG.similarity_scales, strict=True):
        labels = [np.array(utils.smooth(v, sigma))[0, ..., smallest].max(axis=2) for v in (warped, fixed.labels[None])]
        first, second = (label / label.max() for label in labels)
        axis.imshow(np.stack([first, second, first], axis=-1).transpose(1, 0, 2), origin="lower")
        loss = losses.multi_scale(losses.dice_loss, warped, fixed.labels[None], [sigma])[0, smallest]
        scale = f"{sigma * CONFIG.voxel_size:g} mm" if sigma else "as they are"
        axis.set(title=f"{scale}\nDice loss {loss:.2f}", xticks=[], yticks=[], xlim=(len(first) - 0.5, -0.5))
    return figure


def distance():
    """README, "Label similarity measures": every loss against the distance of two small landmarks."""
    grid = utils.reference_grid((48, 16, 16)).numpy()

    def landmark(x):
        return np.clip(2 - np.linalg.norm(grid - [x, 7.5, 7.5], axis=-1), 0, 1).astype(np.float32)[None, ..., None]

    figure, axis = plt.subplots(figsize=(9, 3.6), layout="constrained")
    voxels = np.arange(14)  # whole ones, so that a landmark looks the same everywhere
    for (name, loss), colour in zip(losses.LABEL_LOSSES.items(), (GREEN, BLUE, RED, "grey"), strict=True):
        for scales, sigmas, style in (("all scales", CONFIG.similarity_scales, "-"), ("one scale", (0,), ":")):
            values = [losses.multi_scale(loss, landmark(15 + n), landmark(15), sigmas)[0, 0].numpy() for n in voxels]
            share = (np.array(values) - values[0]) / (values[-1] - values[0])
            axis.plot(voxels * CONFIG.voxel_size, share, style, color=colour, label=f"{name}, {scales}", linewidth=2)
    axis.set_xlabel(f"distance of two landmarks, each about {3 * CONFIG.voxel_size:g} mm wide (mm)")
    axis.set_ylabel("loss (1 = far apart)")
    axis.grid(alpha=0.3)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def weight():
    """README, "Deformation regularisation": one pair, its labels matched with three weights of the bending energy.

    No network: the field itself is what Adam changes, in 400 steps from zero, so only labels and regulariser speak.
    """
    moving, fixed, _ = load_pair()
    middle = round(ndimage.center_of_mass(fixed.labels[..., 1])[2])
    figure, axes = plt.subplots(1, 3, figsize=(12, 5), layout="constrained")
    weights = {"too small": 0.001, "about right": 5.0, "too large": 100.0}
    for axis, (name, size) in zip(axes, weights.items(), strict=True):
        ddf = tf.Variable(tf.zeros([1, *CONFIG.fixed_shape, 3]))
        optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.2, 400))

        @tf.function
        def gradient(ddf=ddf, size=size):
            with tf.GradientTape() as tape:
                warped = utils.warp(moving.labels[None], ddf)
                pair = warped, fixed.labels[None], CONFIG.similarity_scales
                loss = tf.reduce_mean(losses.multi_scale(losses.dice_loss, *pair)) + size * losses.bending_energy(ddf)
            return tape.gradient(loss, ddf)

        for _ in tqdm(range(400), name, disable=None):
            optimizer.apply_gradients([(gradient(), ddf)])
        field, warped = ddf[0].numpy(), utils.warp(moving.labels[None], ddf)[0].numpy()
        folded = utils.jacobian_determinant(field) <= 0
        fixed_cut, warped_cut = (np.moveaxis(v[:, :, middle], -1, 0) for v in (fixed.labels, warped))
        show(axis, fixed.image[:, :, middle, 0], (GREEN, fixed_cut), (ORANGE, warped_cut))
        points = (utils.reference_grid(folded.shape).numpy() + field - field.mean(axis=(0, 1, 2)))[:, :, middle, :2]
        for lines in (points[:, ::2], np.swapaxes(points[::2], 0, 1)):
            axis.plot(lines[..., 0], lines[..., 1], color=BLUE, linewidth=0.8, zorder=1)
        axis.plot(*points[folded[:, :, middle]].T, "x", color=RED, markersize=5)
        dice, distances = (values[0].numpy() for values in utils.label_metrics(warped[None], fixed.labels[None]))
        tre = CONFIG.voxel_size * distances[1:].mean()
        measures = f"Dice {dice[0]:.2f}, TRE {tre:.1f} mm, {100 * folded.mean():.1f} % folded"
        axis.set_title(f"weight {size:g}: {name}\n{measures}", fontsize=11)
    return figure


def main():
    shutil.copy(Path("output") / CASE / "overview.png", MEDIA)
    shutil.copy(Path("model") / "history.png", MEDIA)
    shutil.copy(Path("output") / "summary.txt", MEDIA / "example_summary.txt")
    for draw in (similarity, batch, ddf, keypoints, scales, distance, weight):
        save_figure(draw(), MEDIA / f"{draw.__name__}.png", dpi=90)


if __name__ == "__main__":
    run(main)
