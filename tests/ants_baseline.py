"""Registration by intensities with ANTs on the same pairs, as most people would try it first: no training, no labels.

    pip install -r tests/requirements-benchmark.txt
    python tests/ants_baseline.py --train_dir data/mrus --folds 5 --fold 1 --output_dir ants_output

Mutual information; a translation, then an affine, then SyN (antspyx's "Translation", "Affine" and "SyN" with their
defaults), each beginning where the one before ended. Writes translation/, affine/ and syn/ with metrics.csv,
summary.txt and boxplot.png, which mean the same as those of inference.py.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from extras import devices  # noqa: F401  before TensorFlow

# isort: split
import ants
import numpy as np
import pandas as pd
from true_centroids import measure_ddf

import helpers
from extras import files, report
from extras.cross_validation import split_fold
from extras.errors import run
from utils import moving_offset

VOXEL_SIZE, FIXED, MOVING = 1.5, (48, 64, 44), (70, 70, 64)  # the images' own resolution
GRID = "centre", MOVING, FIXED, VOXEL_SIZE
OFFSET = moving_offset(MOVING, FIXED)


def to_ants(volume):
    """A Volume on a grid of helpers.py as an ANTs image with its centre at the origin."""
    image = volume.image[..., 0].astype(np.float32)
    origin = [-VOXEL_SIZE * (n - 1) / 2 for n in image.shape]
    return ants.from_numpy(image, origin=origin, spacing=[VOXEL_SIZE] * 3)


def to_ddf(transforms):
    """ANTs' transforms from the fixed to the moving image as a DDF (X, Y, Z, 3) in voxels."""
    indices = np.moveaxis(np.indices(FIXED), 0, -1).reshape(-1, 3)
    fixed = VOXEL_SIZE * (indices - (np.array(FIXED) - 1) / 2)
    moving = ants.apply_transforms_to_points(3, pd.DataFrame(fixed, columns=["x", "y", "z"]), transforms)
    return ((moving[["x", "y", "z"]].to_numpy() - fixed) / VOXEL_SIZE).reshape(*FIXED, 3).astype(np.float32)


def main():
    parser = argparse.ArgumentParser(description="ANTs with mutual information.")
    parser.add_argument("--train_dir", required=True)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default="ants_output")
    args = parser.parse_args()
    _, pairs = split_fold(helpers.find_pairs(args.train_dir), args.folds, args.fold)
    rows = {"Translation": [], "Affine": [], "SyN": []}
    for pair, moving, fixed in helpers.read_pairs(pairs, "registering"):
        moving_on_grid, fixed_on_grid = helpers.pair_to_network(moving, fixed, *GRID)
        images = {"fixed": to_ants(fixed_on_grid), "moving": to_ants(moving_on_grid)}
        transforms = "Identity"  # the two centres on each other
        for kind in rows:
            result = ants.registration(
                **images, type_of_transform=kind, initial_transform=transforms, aff_metric="mattes", random_seed=1
            )
            transforms = result["fwdtransforms"]
            ddf = to_ddf(transforms)
            rows[kind] += measure_ddf(
                pair.case, moving, fixed, ddf, fixed_on_grid.affine, moving_on_grid.affine, OFFSET
            )
    for kind, table in rows.items():
        folder = files.ensure_writable_dir(args.output_dir / kind.lower())
        print(kind, report.save_metrics(folder, pd.DataFrame(table, columns=report.COLUMNS)), sep="\n")


if __name__ == "__main__":
    run(main)
