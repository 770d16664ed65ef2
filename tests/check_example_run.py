"""Hold the default run on the example data against what it promises (minutes to train, so not part of the tests).

    python train.py && python inference.py && python tests/check_example_run.py

Reads model/ and output/. Scores each test pair three times by its own labels and true deformation: with its own
images, with another patient's MR in place of its own, and with both images replaced by noise. A network that reads
the images does far worse in the last two. Exit status 1 if a promise is broken.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import config as settings

settings.import_tensorflow()

# isort: split
import csv

import numpy as np

import helpers
import inference
from networks import build_network
from utils import dice_score, moving_offset, target_registration_error


def main():
    config = settings.parse_for_inference()
    network = build_network(config)
    helpers.load_weights(network, Path(config.model_dir) / settings.WEIGHTS[config.weights])
    predict = inference.make_predict(config, network)
    cases = []
    for pair in helpers.find_pairs(config.test_dir):
        moving, fixed = helpers.read_pair(pair)
        on_grids = helpers.pair_to_network(pair, moving, fixed, *settings.grid_settings(config))
        cases.append((pair, moving, fixed, *on_grids))

    rng = np.random.default_rng(0)
    results = {"no registration": [], "own images": [], "another patient's MR": [], "noise": []}
    offset = moving_offset(config.moving_shape, config.fixed_shape)
    for number, (*originals, moving, fixed) in enumerate(cases):
        other = cases[(number + 1) % len(cases)][3].image
        noise = [rng.random(volume.image.shape, np.float32) for volume in (moving, fixed)]
        inputs = {
            "own images": (moving.image, fixed.image),
            "another patient's MR": (other, fixed.image),
            "noise": noise,
        }
        for name, result in results.items():
            ddf = np.zeros((*config.fixed_shape, 3), np.float32)
            if name in inputs:
                ddf = predict(*(image[None].astype(np.float32) for image in inputs[name]))
            result.append(score(*originals, ddf, fixed.affine, moving.affine, offset))
    print(f"{len(cases)} test pairs            median gland Dice  median TRE, mm  mean true error in the gland, mm")
    medians = {}
    for name, result in results.items():
        tre = np.nanmedian(np.concatenate([r["tre"] for r in result]))
        medians[name] = np.median([r["dice"] for r in result]), tre, np.mean([r["true_error"] for r in result])
        print(f"{name:<30}{medians[name][0]:>17.3f}{medians[name][1]:>16.2f}{medians[name][2]:>34.2f}")

    with (Path(config.output_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    value = {
        name: [float(row[name]) for row in rows if row[name] and (row["label"] == "0") != name.startswith("tre")]
        for name in rows[0]
        if name not in ("case", "label")
    }
    own = medians["own images"]
    promises = {
        "every test pair was measured": len(value["dice_after"]) == len(cases),
        "gland Dice about 0.6 or lower at the start, median": np.median(value["dice_before"]) <= 0.65,
        "no landmark was lost": not np.isnan(value["tre_after_mm"]).any(),
        "gland Dice at least 0.90, median": np.median(value["dice_after"]) >= 0.90,
        "TRE at most a third of the start, median": np.median(value["tre_after_mm"])
        <= np.median(value["tre_before_mm"]) / 3,
        "true error at most a third of the start, mean": np.mean(value["true_error_after_mm"])
        <= np.mean(value["true_error_before_mm"]) / 3,
        "under 0.1 % of voxels folded": np.mean(value["folded_percent"]) < 0.1,
        "another patient's MR is clearly worse": medians["another patient's MR"][2] > 1.5 * own[2],
        "noise is clearly worse": medians["noise"][2] > 2 * own[2],
    }
    for promise, kept in promises.items():
        print(f"{'kept  ' if kept else 'BROKEN'}  {promise}")
    sys.exit(0 if all(promises.values()) else 1)


def score(pair, moving, fixed, ddf, *grids):
    """Gland Dice, landmark TREs and mean true error in the gland (mm) of a DDF, by the pair's own labels and truth."""
    displacement = helpers.displacement_on(fixed.image.shape, fixed.affine, ddf, *grids)
    warped = helpers.warp_to_fixed(moving.labels, moving.affine, displacement, fixed.affine)
    truth, affine = helpers.read_displacement(pair.true_displacement)
    gland = helpers.warp_to_fixed(fixed.labels[..., 0], fixed.affine, np.zeros_like(truth), affine) >= 0.5
    error = np.linalg.norm(helpers.displacement_on(truth.shape[:3], affine, ddf, *grids) - truth, axis=-1)
    labels = zip(np.moveaxis(warped, -1, 0)[1:], np.moveaxis(fixed.labels, -1, 0)[1:], strict=True)
    return {
        "dice": dice_score(warped[..., 0] >= 0.5, fixed.labels[..., 0] >= 0.5),
        "tre": [target_registration_error(*pair_of_labels, fixed.affine) for pair_of_labels in labels],
        "true_error": error[gland].mean(),
    }


if __name__ == "__main__":
    settings.run(main)
