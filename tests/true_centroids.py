"""What a translation alone would reach that puts the true centroids of the two glands together: no network, but labels.

    python tests/true_centroids.py --train_dir mrus --folds 5 --fold 0 --output_dir mrus_centroids

Writes metrics.csv, summary.txt and boxplot.png of the held-out pairs, as inference.py does.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import config as settings

settings.import_tensorflow()

# isort: split
import numpy as np
from tqdm import tqdm

import helpers
import inference
import results
from utils import centroid, moving_offset


def main():
    config = settings.parse_for_training()
    rows, offset = [], moving_offset(config.moving_shape, config.fixed_shape)
    pairs = helpers.find_test_pairs(config.folds, config.fold, config.train_dir, config.test_dir)
    for pair in tqdm(pairs, "registering", unit="pair", disable=None):
        moving, fixed = helpers.read_pair(pair)
        on_grids = helpers.pair_to_network(pair, moving, fixed, *settings.grid_settings(config))
        there, here = (
            centroid(side.labels[..., 0], np.linalg.inv(grid.affine) @ side.affine)  # voxels of the network grid
            for side, grid in zip((moving, fixed), on_grids, strict=True)
        )
        shift = np.zeros((*config.fixed_shape, 3), np.float32) + (there - here - offset).astype(np.float32)
        rows += measure_ddf(pair.case, moving, fixed, shift, on_grids[1].affine, on_grids[0].affine, offset)
    print(results.save(helpers.make_folder(config.output_dir), rows), end="")


def measure_ddf(case, moving, fixed, ddf, *grids):
    """Rows of metrics.csv for any DDF (X, Y, Z, 3) between two Volumes with labels; grids as of displacement_on."""
    labels = {"fixed": fixed.labels}
    for when, field in (("before", np.zeros_like(ddf)), ("after", ddf)):
        displacement = helpers.displacement_on(fixed.image.shape, fixed.affine, field, *grids)
        labels[when] = helpers.warp_to_fixed(moving.labels, moving.affine, displacement, fixed.affine)
    return inference.measure_pair(case, labels, fixed.affine, ddf)


if __name__ == "__main__":
    settings.run(main)
