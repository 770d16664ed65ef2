"""What a translation alone would reach that puts the true centroids of the two glands together: no network, but labels.

    python tests/true_centroids.py --train_dir mrus --folds 5 --fold 0 --output_dir mrus_centroids

Writes metrics.csv, summary.txt and boxplot.png of the held-out pairs, as inference.py does.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from extras import devices  # noqa: F401  before TensorFlow

# isort: split
import nibabel as nib
import numpy as np
import pandas as pd
from scipy import ndimage

import helpers
import inference
import utils
from config import TrainConfig
from extras import cross_validation, files, report
from extras.errors import run


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train_dir", required=True)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--output_dir", default="centroids")
    args = parser.parse_args(arguments)
    config, rows = TrainConfig(), []
    offset = utils.moving_offset(config.moving_shape, config.fixed_shape)
    _, pairs = cross_validation.split_fold(helpers.find_pairs(args.train_dir), args.folds, args.fold)
    for pair, moving, fixed in helpers.read_pairs(pairs, "registering"):
        on_grids = helpers.pair_to_network(moving, fixed, *config.grid_options())
        moving_centroid, fixed_centroid = (
            nib.affines.apply_affine(
                np.linalg.inv(grid.affine) @ side.affine, ndimage.center_of_mass(side.labels[..., 0])
            )
            for side, grid in zip((moving, fixed), on_grids, strict=True)
        )
        shift = np.zeros((*config.fixed_shape, 3), np.float32) + np.float32(moving_centroid - fixed_centroid - offset)
        rows += measure_ddf(pair.case, moving, fixed, shift, on_grids[1].affine, on_grids[0].affine, offset)
    folder = files.ensure_writable_dir(args.output_dir)
    print(report.save_metrics(folder, pd.DataFrame(rows, columns=report.COLUMNS)), end="")


def measure_ddf(case, moving, fixed, ddf, *geometry):
    """Rows of metrics.csv for any DDF (X, Y, Z, 3) between two Volumes with labels; geometry as of displacement_on."""
    fields, warped = {"before": np.zeros_like(ddf), "after": ddf}, {}
    for when, field in fields.items():
        displacement = utils.displacement_on(fixed.image.shape, fixed.affine, field, *geometry)
        warped[when] = inference.warp_volume(moving, displacement, fixed.affine)
    stored_labels = inference.labels_to_store(moving, warped["after"], displacement)
    return report.measure_pair(case, moving, fixed, warped, fields, geometry, stored_labels)


if __name__ == "__main__":
    run(main)
