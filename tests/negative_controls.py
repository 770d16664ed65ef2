"""Does the network read the images? Each test pair again with another patient's MR, and with noise in place of both.

    python tests/negative_controls.py --model_dir model

Each pair is scored by its own labels, whatever images the network sees. A network that reads them does far worse on the
wrong ones. On the example data, whose true displacement is known, this and what inference.py measured (--output_dir)
are held against what the default run promises. Exit status 1 if a promise is broken.
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
from extras.errors import expect, run
from networks import NETWORKS
from utils import moving_offset

GLAND, LANDMARKS, TRUE = "gland Dice", "landmark TRE, mm", "true error in the gland, mm"


def main():
    config = parse_config(InferenceConfig)
    trained = load_config(config.model_dir)
    network = NETWORKS[trained.network](**trained.network_options())
    checkpoint.load_weights(network, config.model_dir, config.weights)
    affines = inference.test_time_affines(trained, config.tta_samples)
    pairs = inference.find_test_pairs(config, trained)
    cases = []
    for pair, moving, fixed in helpers.read_pairs(pairs, "reading"):
        cases.append((pair, moving, fixed, *helpers.pair_to_network(moving, fixed, *trained.grid_options())))

    rng = np.random.default_rng(0)
    results = {"own images": [], "another patient's MR": [], "noise": []}
    offset = moving_offset(trained.moving_shape, trained.fixed_shape)
    for pair, *originals, moving, fixed in cases:
        strangers = [case[3].image for case in cases if case[0].patient != pair.patient]
        expect(strangers, pair.moving_image.parent, "one patient", "two or more")
        stranger = strangers[rng.integers(len(strangers))]
        noise = [rng.random(volume.image.shape, np.float32) for volume in (moving, fixed)]
        inputs = (moving.image, fixed.image), (stranger, fixed.image), noise
        for result, images in zip(results.values(), inputs, strict=True):
            ddf = inference.predict(network, *(image[None].astype(np.float32) for image in images), affines)
            result += measure_ddf(pair.case, *originals, ddf, fixed.affine, moving.affine, offset)
    controls = {name: report.measured(pd.DataFrame(r, columns=report.COLUMNS)) for name, r in results.items()}
    print_table(len(cases), controls)
    if TRUE in controls["noise"]:
        check_promises(len(cases), report.read_metrics(Path(config.output_dir) / "metrics.csv"), controls)


def print_table(count, controls):
    """A line for each kind of input, and one for no registration, which is the same whatever the input."""
    titles = [title for title in (GLAND, LANDMARKS, TRUE) if title in controls["noise"]]
    print(f"{f'{count} test pairs: median, mean':<30}" + "".join(f"{title:>30}" for title in titles))
    for name, when in {"no registration": "before", **dict.fromkeys(controls, "after")}.items():
        values = [controls.get(name, controls["noise"])[title][when] for title in titles]
        print(f"{name:<30}" + "".join(f"{f'{v.median():.2f}, {v.mean():.2f}':>30}" for v in values))


def check_promises(count, table, controls):
    """Print what the default run promises and whether metrics.csv keeps it."""
    value = report.measured(table)
    errors = {name: measures[TRUE]["after"].mean() for name, measures in controls.items()}
    dice, tre, error = (value[name].median() for name in (GLAND, LANDMARKS, TRUE))
    promises = {
        "every test pair was measured": len(value[GLAND]) == count,
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
