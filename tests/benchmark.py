"""How fast, and how close to what the processor can do: this project beside MONAI with PyTorch, and its growth.

    pip install -r tests/requirements-benchmark.txt
    python tests/benchmark.py            a table in Markdown, and media/benchmark.json
    python tests/benchmark.py growth     media/growth.png, growth.json: time and memory against the size of the work

Every contender lives in a process of its own and does each part of the same work in turn with the others (interleaved
repeats); medians are shown. The work: 4 pairs on a 47x63x44 grid, one label each, label smoothing of 0 1 2 4 8 16
voxels, bending energy; Muon here, Adam there. MONAI needs sizes that divide by 16, so its grid is padded to 48x64x48.
Its LocalNet has 7x7x7 kernels in the whole first level ("as shipped"); with 3x3x3 there, as here, it is "same kernels".
Its finest level has the full resolution, this project's half of it. This project's training step also augments both
volumes at random, MONAI's does not.
What is not installed is left out.
"""

import functools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
BATCH, GRID, PADDED = 4, (47, 63, 44), (48, 64, 48)
SCALES = (0, 1, 2, 4, 8, 16)
CHANNELS = (8, 16, 32)
NETWORK_PARTS = "training step", "network, gradient", "forward, one pair"
SMALL_PARTS = "warp, gradient", "warp, value", "multi-scale Dice, gradient", "bending energy, gradient"
CONTENDERS = {
    "ours": "this project",
    "monai": "MONAI, same kernels",
    "monai-last": "MONAI, same kernels, channels last",
    "monai-shipped": "MONAI, as shipped",
    "torch": "PyTorch grid_sample",
    "scipy": "SciPy map_coordinates",
    "sitk": "SimpleITK",
}
REPEATS = 5


def example_work(shape, seed=0):
    """Images (B, X, Y, Z), a blob-shaped label for each, and a displacement (B, X, Y, Z, 3) of a few voxels."""
    rng = np.random.default_rng(seed)
    images = rng.random((2, BATCH, *shape), np.float32)
    index = np.moveaxis(np.indices(shape, np.float32), 0, -1)
    centres = np.array(shape) / 2 + rng.uniform(-4, 4, (2, BATCH, 1, 1, 1, 3))
    labels = (np.linalg.norm(index - centres, axis=-1) < 10).astype(np.float32)
    displacement = 3 * np.sin(index / 9 + rng.uniform(0, 6, (BATCH, 1, 1, 1, 3))).astype(np.float32)
    return *images, *labels, displacement


# -- The contenders: a part of the work and the channels of the network -> a function that does it once --------------


def ours(part, channels):
    from extras import devices  # isort: skip  before TensorFlow
    import keras
    import tensorflow as tf

    import train
    from extras.optimizer import Muon
    from losses import bending_energy, dice_loss, multi_scale
    from utils import reference_grid, resample

    moving, fixed, moving_label, fixed_label, displacement = map(tf.constant, example_work(GRID))
    moving, fixed, moving_label, fixed_label = (v[..., None] for v in (moving, fixed, moving_label, fixed_label))

    def with_gradient(function, variable, jit_compile=False):
        @tf.function(jit_compile=jit_compile)
        def run(variable):
            with tf.GradientTape() as tape:
                tape.watch(variable)
                value = function(variable)
            return value, tape.gradient(value, variable)

        return lambda: run(variable)[1].numpy()

    def warp(displacement):
        return resample(moving_label, reference_grid(GRID) + displacement)

    if part == "warp, gradient":  # of a sum in which each voxel has its own weight
        return with_gradient(lambda d: tf.reduce_sum(warp(d) * fixed), displacement, jit_compile=True)
    if part == "warp, value":
        compiled = tf.function(warp, jit_compile=True)
        return lambda: compiled(displacement).numpy()
    if part == "multi-scale Dice, gradient":
        return with_gradient(
            lambda label: tf.reduce_mean(multi_scale(dice_loss, label, fixed_label, SCALES)), moving_label
        )
    if part == "bending energy, gradient":
        return with_gradient(bending_energy, displacement)
    if part == "large convolution":  # the yardstick: 32 channels to 32, forward and backward
        x = tf.random.normal((BATCH, *GRID, 32))
        layer = keras.layers.Conv3D(32, 3, padding="same")
        layer.build(x.shape)

        @tf.function
        def convolve():
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x)
            return tape.gradient(y, [x, *layer.trainable_variables], output_gradients=x)

        return lambda: convolve()[1].numpy()
    config, network = our_network(channels)
    if part == "forward, one pair":
        predict, pair = tf.function(network), [moving[:1], fixed[:1]]
        return lambda: predict(pair).numpy()
    if part == "network, gradient":

        @tf.function
        def gradient():
            with tf.GradientTape() as tape:
                value = tf.reduce_sum(network([moving, fixed], training=True) * displacement)
            return [tf.reduce_sum(g) for g in tape.gradient(value, network.trainable_variables)]

        return lambda: gradient()[0].numpy()
    if part == "training step":
        optimizer = Muon(1e-5)
        optimizer.build(network.trainable_variables)
        step = devices.on_all_replicas(
            tf.distribute.get_strategy(), functools.partial(train.train_step, config, network, optimizer)
        )
        batch = {"moving_image": moving, "fixed_image": fixed, "mask": tf.ones((BATCH, 1))}
        batch |= {"moving_labels": moving_label, "fixed_labels": fixed_label}
        batch |= train.draw_augmentation(config, np.random.default_rng(0))
        return lambda: step(batch)["loss"]
    return None


def our_network(channels):
    """LocalNet with channels that double to the last level, as MONAI has it."""
    from extras import devices  # noqa: F401  isort: skip  before TensorFlow
    import networks
    from config import TrainConfig

    networks.MAX_CHANNELS = 16 * channels
    config = TrainConfig(
        network="local", voxel_size=1.5, fixed_shape=GRID, moving_shape=GRID, channels=channels,
        similarity_scales=SCALES,
    )  # fmt: skip
    return config, networks.local_net(**config.network_options())


def convolution_operations(channels):
    """Multiplications and additions of a step's convolutions with both gradients (only one where images enter)."""
    total = 0
    for layer in our_network(channels)[1].layers:
        if type(layer).__name__ == "Conv3D":
            backward = 1 if layer.input.shape[-1] == 2 else 2
            total += (1 + backward) * 2 * BATCH * np.prod(layer.output.shape[1:4]) * np.prod(layer.kernel.shape)
    return float(total)


def monai(part, channels, channels_last=False, shipped=False):
    import torch
    from monai.losses import BendingEnergyLoss, DiceLoss, MultiScaleLoss
    from monai.networks.blocks import Warp
    from monai.networks.blocks.regunet_block import RegistrationResidualConvBlock, get_conv_block
    from monai.networks.nets import LocalNet

    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    *volumes, displacement = map(torch.from_numpy, example_work(PADDED))
    moving, fixed, moving_label, fixed_label = (v[:, None].contiguous(memory_format=layout) for v in volumes)
    displacement = displacement.permute(0, 4, 1, 2, 3).contiguous(memory_format=layout)
    warp, bending = Warp(padding_mode="zeros"), BendingEnergyLoss()
    similarity = MultiScaleLoss(DiceLoss(squared_pred=True), scales=list(SCALES))

    def with_gradient(function, variable):
        def run():
            variable.grad = None
            function(variable).backward()
            return variable.grad

        variable.requires_grad_()
        return run

    if part == "warp, gradient":
        return with_gradient(lambda d: (warp(moving_label, d) * fixed).sum(), displacement)
    if part == "warp, value":
        return lambda: warp(moving_label, displacement)
    if part == "multi-scale Dice, gradient":
        return with_gradient(lambda label: similarity(fixed_label, label), moving_label)
    if part == "bending energy, gradient":
        return with_gradient(bending, displacement)
    if part not in NETWORK_PARTS:
        return None
    network = LocalNet(3, 2, channels, extract_levels=(0, 1, 2, 3, 4), out_kernel_initializer="zeros")
    if not shipped:
        first = get_conv_block(3, 2, channels, kernel_size=3)
        network.encode_convs[0] = torch.nn.Sequential(
            first, RegistrationResidualConvBlock(3, channels, channels, kernel_size=3)
        )
    network = network.to(memory_format=layout)
    optimizer = torch.optim.Adam(network.parameters(), 1e-5)
    images = torch.cat([moving, fixed], dim=1).contiguous(memory_format=layout)
    if part == "forward, one pair":
        network.eval()

        def forward():
            with torch.inference_mode():
                return network(images[:1])

        return forward

    def network_gradient():
        optimizer.zero_grad()
        (network(images) * displacement).sum().backward()

    def step():
        optimizer.zero_grad()
        ddf = network(images)
        loss = similarity(fixed_label, warp(moving_label, ddf)) + 0.5 * bending(ddf)
        loss.backward()
        optimizer.step()
        return loss.item()

    return {"network, gradient": network_gradient, "training step": step}[part]


def torch(part, channels):
    if part != "warp, gradient":
        return None
    from torch import from_numpy, linspace, meshgrid, stack
    from torch.nn.functional import grid_sample

    _, _, label, weight, displacement = example_work(GRID)
    axes = [linspace(-1, 1, n) for n in GRID[::-1]]
    grid = stack(meshgrid(*axes, indexing="ij")[::-1], -1)  # coordinates x, y, z of a volume (B, C, Z, Y, X)
    points = (
        grid + from_numpy(displacement.transpose(0, 3, 2, 1, 4) * 2 / np.array(GRID, np.float32))
    ).requires_grad_()
    label, weight = (from_numpy(v.transpose(0, 3, 2, 1)[:, None].copy()) for v in (label, weight))

    def run():
        points.grad = None
        (grid_sample(label, points, align_corners=True) * weight).sum().backward()

    return run


def scipy(part, channels):
    if part != "warp, value":
        return None
    from scipy import ndimage

    _, _, label, _, displacement = example_work(GRID)
    points = np.moveaxis(np.moveaxis(np.indices(GRID, np.float32), 0, -1) + displacement, -1, 1)
    return lambda: [ndimage.map_coordinates(*pair, order=1) for pair in zip(label, points, strict=True)]


def sitk(part, channels):
    if part != "warp, value":
        return None
    import SimpleITK

    _, _, label, _, displacement = example_work(GRID)
    images = [SimpleITK.GetImageFromArray(v.T) for v in label]
    fields = [SimpleITK.GetImageFromArray(d.transpose(2, 1, 0, 3).astype(float), isVector=True) for d in displacement]
    transforms = [SimpleITK.DisplacementFieldTransform(field) for field in fields]
    return lambda: [SimpleITK.Resample(i, i, t, SimpleITK.sitkLinear) for i, t in zip(images, transforms, strict=True)]


MAKERS = {
    "ours": ours,
    "monai": monai,
    "monai-last": lambda *work: monai(*work, channels_last=True),
    "monai-shipped": lambda *work: monai(*work, shipped=True),
    "torch": torch,
    "scipy": scipy,
    "sitk": sitk,
}

# -- A contender's process: reads requests, answers with seconds -----------------------------------------------------


def serve(contender, part, channels):
    """Answer each line of standard input with the seconds of one run, or null where there is no such part."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    count, run = 1, None
    try:
        run = MAKERS[contender](part, channels)
    except ImportError as error:
        print(f"{contender}: {error}", file=sys.stderr)
    if run:
        run()  # compile, allocate
        start = time.perf_counter()
        run()
        count = max(1, round(0.5 / (time.perf_counter() - start)))  # half a second each time
    for _request in sys.stdin:
        start = time.perf_counter()
        for _ in range(count if run else 0):
            run()
        print(json.dumps((time.perf_counter() - start) / count if run else None), file=answers)
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20), file=answers)  # GB at the end


class Process:
    def __init__(self, contender, part, channels):
        words = [sys.executable, __file__, "serve", contender, part, str(channels)]
        errors = subprocess.DEVNULL if "--verbose" not in sys.argv else None
        self.process = subprocess.Popen(words, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)

    def ask(self):
        print(file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"{' '.join(self.process.args)}: ended without an answer; --verbose shows why")
        return json.loads(answer)

    def end(self):
        """Stop it; returns its peak resident memory in GB."""
        answer, _ = self.process.communicate()
        return json.loads(answer)


def measure(part, channels, names):
    """Median seconds of each contender that knows the part, and the peak memory of its process in GB."""
    processes, times = {}, {}
    for name in names:  # one after the other, so that none starts while another works
        processes[name] = Process(name, part, channels)
        times[name] = [processes[name].ask()]
    times = {name: values for name, values in times.items() if values[0] is not None}
    for _ in range(REPEATS - 1 if sum(map(sum, times.values())) < 20 else 2):  # three where a round takes long
        for name, values in times.items():
            values.append(processes[name].ask())
    memory = {name: process.end() for name, process in processes.items()}
    return {name: float(np.median(v)) for name, v in times.items()}, {name: memory[name] for name in times}


def compare():
    rows = []
    for part in (*NETWORK_PARTS, *SMALL_PARTS):
        for channels in CHANNELS if part in NETWORK_PARTS else (0,):
            names = list(CONTENDERS) if part in SMALL_PARTS else ["ours", "monai", "monai-last"]
            if channels == CHANNELS[0]:
                names.append("monai-shipped")
            times, memory = measure(part, channels, names)
            rows.append({"part": part, "channels": channels, **times})
            show(rows[-1])
            if part == "training step":
                rows.append({"part": "its peak memory", "channels": channels, **memory})
                show(rows[-1])
    operations = {channels: convolution_operations(channels) for channels in CHANNELS}
    work = (1 + 2) * 2 * BATCH * np.prod(GRID) * 27 * 32 * 32
    rate = work / measure("large convolution", 0, ["ours"])[0]["ours"]
    print(f"\none large convolution (3x3x3, 32 to 32 channels, with gradients): {rate / 1e9:.0f} GFLOP/s")
    limit = {}
    for row in rows:
        if row["part"] in ("training step", "network, gradient"):
            share = operations[row["channels"]] / rate / row["ours"]
            limit[f"{row['part']}, {row['channels']} channels"] = share
            print(f"{row['part']}, {row['channels']} channels: {100 * share:.0f} % of the convolution limit")
    print("\n".join(["", *markdown(rows)]))
    return {"rows": rows, "operations": operations, "large convolution, FLOP/s": rate, "share of limit": limit}


def describe(row):
    """What a row measured, and this project's figure with its unit."""
    title = row["part"] + (f", {row['channels']} channels" if row["channels"] else "")
    value, unit = (row["ours"], "GB") if "memory" in row["part"] else (1e3 * row["ours"], "ms")
    return title, f"{value:.{0 if value >= 10 else 1}f} {unit}"


def show(row):
    """One line: this project's figure, then how many times as much each other one takes."""
    others = [f"{CONTENDERS[n]} {row[n] / row['ours']:.2f}x" for n in row if n in CONTENDERS and n != "ours"]
    print("{:<34}{:>9}   ".format(*describe(row)) + "; ".join(others), flush=True)


def markdown(rows):
    """A table in Markdown: the same for MONAI alone."""
    others = "monai", "monai-last", "monai-shipped"
    lines = ["| part | this project | MONAI, same kernels | the same, channels last | MONAI as shipped |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    for row in rows:
        cells = [f"{row[name] / row['ours']:.1f}" if name in row else "" for name in others]
        lines.append(f"| {' | '.join([*describe(row), *cells])} |")
    return lines


# -- Growth ----------------------------------------------------------------------------------------------------------

GROWTH = {  # panel -> (axis title, the changes of each point); all else as in config.py, with random volumes
    "voxels": ("voxels of either grid, one pair per step", [
        (n**3, {"fixed_shape": (n, n, n), "moving_shape": (n, n, n), "batch_size": 1}) for n in (32, 64, 96, 128)
    ]),
    "channels": ("channels of the first level", [(c, {"channels": c}) for c in (4, 8, 16, 32)]),
    "labels": ("labels of each pair", [(n, {"labels": n}) for n in (1, 4, 8, 16)]),
    "cases": ("pairs to train on", [(n, {"cases": n}) for n in (10, 200, 2000)]),
}  # fmt: skip


def grow_point(cores, cases=4, labels=4, **changes):
    """Median seconds of a step with its sampling, and the peak resident memory in GB, on so many cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    from extras import devices  # isort: skip  before TensorFlow
    import nibabel as nib
    import tensorflow as tf

    import helpers
    import train
    from config import TrainConfig
    from networks import NETWORKS

    config = TrainConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()})
    affine = np.diag([config.voxel_size] * 3 + [1.0])
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for side, shape in (("moving", config.moving_shape), ("fixed", config.fixed_shape)):
            label = np.zeros((*shape, labels), np.uint8)
            label[tuple(slice(n // 3, 2 * n // 3) for n in shape)] = 1
            for kind in ("images", "labels"):
                Path(folder, f"{side}_{kind}").mkdir()
            for case in range(cases):
                image = nib.Nifti1Image(rng.integers(0, 255, shape, np.uint8), affine)
                image.to_filename(Path(folder, f"{side}_images", f"{case}.nii"))
                nib.Nifti1Image(label, affine).to_filename(Path(folder, f"{side}_labels", f"{case}.nii"))
        prepared = helpers.PreparedPairs(helpers.find_pairs(folder), *config.grid_options())
    network = NETWORKS[config.network](**config.network_options())
    optimizer = train.build_optimizer(config, network.trainable_variables)
    step = devices.on_all_replicas(
        tf.distribute.get_strategy(), functools.partial(train.train_step, config, network, optimizer)
    )
    times = []
    for number in range(10):
        start = time.perf_counter()
        step(train.sample_batch(config, prepared, range(cases), number)[0])
        times.append(time.perf_counter() - start)
        if number >= 3 and sum(times[2:]) > 10:
            break
    return {"seconds": np.median(times[2:]), "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def grow():
    results = []
    for panel, (_, points) in GROWTH.items():
        for cores in sorted({1, min(2, len(os.sched_getaffinity(0)))}):
            for value, changes in points:
                words = [sys.executable, __file__, "point", json.dumps({"cores": cores, **changes})]
                done = subprocess.run(words, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{' '.join(words)}\n{done.stderr[-2000:]}")
                measured = json.loads(done.stdout.split("\n")[-2])
                results.append({"panel": panel, "value": value, "cores": cores, **measured})
                print(json.dumps(results[-1]), flush=True)
    plot_growth(results)
    return results


def plot_growth(results):
    """media/growth.png: seconds of a step above, peak memory below, one column for each panel of GROWTH."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(GROWTH), figsize=(14, 6), layout="constrained", sharex="col")
    for column, (panel, (title, _)) in zip(axes.T, GROWTH.items(), strict=True):
        rows = [row for row in results if row["panel"] == panel]
        for axis, name in zip(column, ("seconds", "memory"), strict=True):
            for cores in sorted({row["cores"] for row in rows}):
                points = [(row["value"], row[name]) for row in rows if row["cores"] == cores]
                axis.plot(*zip(*points, strict=True), "o-", label=f"{cores} core{'s' * (cores > 1)}")
            if panel == "voxels":
                axis.set_yscale("log")
            else:
                axis.set_ylim(0, 1.2 * max(row[name] for row in rows))
            axis.set_xscale("log" if panel in ("voxels", "cases") else "linear")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}" if (panel, name) == ("voxels", "memory") else "")
            axis.grid(alpha=0.3)
        column[1].set_xlabel(title)
    axes[0, 0].set_ylabel("seconds per training step")
    axes[1, 0].set_ylabel("peak memory, GB")
    axes[0, 0].legend()
    figure.savefig(ROOT / "media" / "growth.png", dpi=80)


if __name__ == "__main__":
    mode, *rest = [word for word in sys.argv[1:] if word != "--verbose"] or ["compare"]
    if mode == "serve":
        serve(*rest[:2], int(rest[2]))
    elif mode == "point":
        print(json.dumps(grow_point(**json.loads(rest[0]))))
    else:
        name, result = ("growth.json", grow()) if mode == "growth" else ("benchmark.json", compare())
        (ROOT / "media" / name).write_text(json.dumps(result, indent=1) + "\n")
