"""MONAI's LocalNet on the same pairs, trained with the original recipe for so many minutes: a figure to compare with.

    pip install -r tests/requirements-benchmark.txt
    python tests/monai_localnet.py --train_dir mrus --folds 5 --fold 0 --minutes 36 --output_dir monai_output

The recipe of Hu et al. (arXiv 1711.01666) as MONAI's parts allow it: grid of 1.5 mm, batches of 4 pairs, one label
drawn from each, random affines on both volumes, multi-scale Dice (0 1 2 4 8 16 voxels), bending energy 0.5, Adam at
1e-3. Reading, folds and measures are this project's own, so that its metrics.csv, summary.txt and boxplot.png mean the
same as those of inference.py.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from extras import devices  # noqa: F401  before TensorFlow

# isort: split
import numpy as np
import pandas as pd
import torch
from monai.losses import BendingEnergyLoss, DiceLoss, MultiScaleLoss
from monai.networks.nets import LocalNet
from torch.nn.functional import affine_grid, grid_sample
from tqdm import tqdm
from true_centroids import measure_ddf

import helpers
from extras import files, report
from extras.cross_validation import split_fold
from extras.errors import run
from utils import moving_offset

VOXEL_SIZE, FIXED, MOVING = 1.5, (48, 64, 48), (72, 72, 64)  # LocalNet wants sizes that divide by 16
GRID = "centre", MOVING, FIXED, VOXEL_SIZE
OFFSET = moving_offset(MOVING, FIXED)


def to_torch(volume):
    """(B, X, Y, Z, C) array -> (B, C, X, Y, Z) tensor."""
    return torch.from_numpy(np.moveaxis(volume, -1, 1).copy())


def sample(volume, points):
    """Trilinear, 0 outside. volume: (B, C, MX, MY, MZ); points: (B, X, Y, Z, 3) voxels of it, in index order."""
    size = torch.tensor(volume.shape[2:])
    return grid_sample(volume, ((2 * points + 1) / size - 1).flip(-1), align_corners=False)


def random_affine(volume, amount=0.1):
    """The volume turned, scaled and shifted at random about its centre."""
    matrix = torch.eye(3, 4) + (2 * torch.rand(len(volume), 3, 4) - 1) * amount
    return grid_sample(volume, affine_grid(matrix, volume.shape, align_corners=False), align_corners=False)


def main():
    parser = argparse.ArgumentParser(description="MONAI's LocalNet with the original recipe.")
    parser.add_argument("--train_dir", required=True)
    for name, default in {"folds": 5, "fold": 0, "minutes": 36.0, "channels": 8, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--output_dir", default="monai_output")
    words = parser.parse_args()
    torch.manual_seed(words.seed)
    train_pairs, test_pairs = split_fold(helpers.find_pairs(words.train_dir), words.folds, words.fold)
    prepared = helpers.PreparedPairs(train_pairs, *GRID)
    network = LocalNet(3, 2, words.channels, extract_levels=(0, 1, 2, 3, 4), out_kernel_initializer="zeros")
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    similarity, bending = MultiScaleLoss(DiceLoss(squared_pred=True), scales=[0, 1, 2, 4, 8, 16]), BendingEnergyLoss()
    grid = torch.from_numpy(np.moveaxis(np.indices(FIXED, np.float32), 0, -1) + OFFSET)[None]

    def predict(moving_image, fixed_image):  # the network sees the moving image on the fixed grid
        aligned = sample(moving_image, grid.expand(len(fixed_image), -1, -1, -1, -1))
        return network(torch.cat([aligned, fixed_image], dim=1)).movedim(1, -1)

    step, start = 0, time.time()
    with tqdm(total=round(words.minutes, 2), desc="training", unit="min", disable=None) as progress:
        while (minutes := (time.time() - start) / 60) < words.minutes:
            rng = np.random.default_rng([words.seed, step])
            drawn = helpers.draw_pairs(rng, prepared, range(len(train_pairs)), 4, 1, 0)
            batch = helpers.read_batch(prepared, drawn)
            label = [chosen[0] for _, _, chosen in drawn]
            volumes = []
            for side in ("moving", "fixed"):
                chosen = batch[f"{side}_labels"][range(4), ..., label][..., None]
                volumes.append(random_affine(to_torch(np.concatenate([batch[f"{side}_image"], chosen], axis=-1))))
            moving, fixed = volumes
            ddf = predict(moving[:, :1], fixed[:, :1])
            warped = sample(moving[:, 1:], grid + ddf)
            loss = similarity(fixed[:, 1:], warped) + 0.5 * bending(ddf.movedim(-1, 1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            progress.update(round(minutes - progress.n, 2))
            progress.set_postfix(step=step, loss=f"{loss.item():.3f}")

    network.eval()
    rows = []
    for pair, moving, fixed in helpers.read_pairs(test_pairs, "registering"):
        network_moving, network_fixed = helpers.pair_to_network(moving, fixed, *GRID)
        with torch.no_grad():
            ddf = predict(*(to_torch(v.image[None].astype(np.float32)) for v in (network_moving, network_fixed)))
        grids = network_fixed.affine, network_moving.affine, OFFSET
        rows += measure_ddf(pair.case, moving, fixed, ddf[0].numpy(), *grids)
    folder = files.ensure_writable_dir(words.output_dir)
    summary = report.save_metrics(folder, pd.DataFrame(rows, columns=report.COLUMNS))
    print(f"{step} steps in {minutes:.1f} minutes\n{summary}", end="")


if __name__ == "__main__":
    run(main)
