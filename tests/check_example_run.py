"""Hold the default run on the example data against what it promises (minutes to train, so not part of the tests).

    python train.py && python inference.py && python tests/check_example_run.py

Reads model/ and output/. Scores each test pair three times by its own labels and true deformation: with its own
images, with another patient's MR in place of its own, and with both images replaced by noise. A network that reads
the images does far worse in the last two. Exit status 1 if a promise is broken.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from extras import devices  # noqa: F401  before TensorFlow

# isort: split
import numpy as np
import pandas as pd
from true_centroids import measure_ddf

import helpers
import inference
from config import InferenceConfig, load_config, parse_config
from extras import checkpoint, report
from extras.errors import run
from networks import NETWORKS
from utils import moving_offset

GLAND, LANDMARKS, TRUE = "gland Dice", "landmark TRE, mm", "true error in the gland, mm"


def main():
    config = parse_config(InferenceConfig)
    trained = load_config(config.model_dir)
    network = NETWORKS[trained.network](**trained.network_options())
    checkpoint.load_weights(network, config.model_dir, config.weights)
    affines = inference.test_time_affines(trained, config.tta_samples)
    cases = []
    for pair, moving, fixed in helpers.read_pairs(inference.find_test_pairs(config, trained), "reading"):
        cases.append((pair.case, moving, fixed, *helpers.pair_to_network(moving, fixed, *trained.grid_options())))

    rng = np.random.default_rng(0)
    results = {"own images": [], "another patient's MR": [], "noise": []}
    offset = moving_offset(trained.moving_shape, trained.fixed_shape)
    for number, (*originals, moving, fixed) in enumerate(cases):
        other = cases[(number + 1) % len(cases)][3].image
        noise = [rng.random(volume.image.shape, np.float32) for volume in (moving, fixed)]
        inputs = (moving.image, fixed.image), (other, fixed.image), noise
        for result, images in zip(results.values(), inputs, strict=True):
            ddf = inference.predict(network, *(image[None].astype(np.float32) for image in images), affines)
            result += measure_ddf(*originals, ddf, fixed.affine, moving.affine, offset)
    measured = {name: report.measured(pd.DataFrame(r, columns=report.COLUMNS)) for name, r in results.items()}
    table = report.read_metrics(Path(config.output_dir) / "metrics.csv")
    value = report.measured(table)
    print(f"{len(cases)} test pairs            median gland Dice  median TRE, mm  mean true error in the gland, mm")
    for name, measures in {"no registration": None, **measured}.items():
        when, measures = ("after", measures) if measures else ("before", value)
        figures = measures[GLAND][when].median(), measures[LANDMARKS][when].median(), measures[TRUE][when].mean()
        print("{:<30}{:>17.3f}{:>16.2f}{:>34.2f}".format(name, *figures))
    errors = {name: measures[TRUE]["after"].mean() for name, measures in measured.items()}
    dice, tre, error = (value[name].median() for name in (GLAND, LANDMARKS, TRUE))
    promises = {
        "every test pair was measured": len(value[GLAND]) == len(cases),
        "gland Dice about 0.6 or lower at the start, median": dice["before"] <= 0.65,
        "no landmark was lost": value[LANDMARKS]["after"].notna().all(),
        "gland Dice at least 0.88, median": dice["after"] >= 0.88,
        "TRE at most a third of the start, median": tre["after"] <= tre["before"] / 3,
        "true error below what the best shift leaves, median": error["after"] < table[report.BEST[0]].median(),
        "under 0.1 % of voxels folded": table["folded_percent"].mean() < 0.1,
        "another patient's MR is clearly worse": errors["another patient's MR"] > 1.5 * errors["own images"],
        "noise is clearly worse": errors["noise"] > 2 * errors["own images"],
    }
    for promise, kept in promises.items():
        print(f"{'kept  ' if kept else 'BROKEN'}  {promise}")
    sys.exit(0 if all(promises.values()) else 1)


if __name__ == "__main__":
    run(main)
