"""Register image pairs with a trained network. Images are enough; labels, where there are any, only measure.

    python inference.py                                         every pair of the test folder
    python inference.py --moving mr.nii.gz --fixed us.nii.gz    one new pair
    python inference.py --help                                  every setting

Writes to --output_dir, per case and on the fixed image's own grid: warped_image.nii.gz, warped_labels.nii.gz,
displacement.nii.gz (ITK convention, opens in 3D Slicer), overview.png; and metrics.csv and summary.txt for all cases.
"""

import config as settings  # first: it prepares TensorFlow's environment

# isort: split
from pathlib import Path

import numpy as np
import tensorflow as tf
from tqdm import tqdm

import helpers
from networks import build_network
from utils import dice_score, hausdorff_95, jacobian_determinant, moving_offset, target_registration_error


def main():
    config = settings.parse_for_inference()

    # -- Data: one pair at a time; all are checked before the first is registered ----------------------------------
    if config.moving:
        name = f"{helpers.case_name(config.moving)}_to_{helpers.case_name(config.fixed)}"
        pairs = [helpers.Pair(name, name, Path(config.moving), Path(config.fixed))]
    else:
        pairs = helpers.find_test_pairs(config.folds, config.fold, config.train_dir, config.test_dir)
    for pair in tqdm(pairs, "checking", unit="pair", disable=None):
        helpers.read_case(pair)
    output_dir = helpers.make_folder(config.output_dir)

    # -- Network: as it was trained --------------------------------------------------------------------------------
    network = build_network(**settings.network_settings(config))
    weights = settings.BEST_NAME if config.weights == "best" else settings.LAST_NAME
    helpers.load_weights(network, Path(config.model_dir) / weights)
    predict = tf.function(network)
    offset = moving_offset(config.moving_shape, config.fixed_shape)

    rows = []
    for pair in tqdm(pairs, "registering", unit="pair", disable=None):
        case = helpers.read_case(pair)
        moving_args = case.moving_image, case.moving_affine, config.moving_shape, config.voxel_size
        fixed_args = case.fixed_image, case.fixed_affine, config.fixed_shape, config.voxel_size
        moving_image, _, moving_grid = helpers.to_network(*moving_args)
        fixed_image, _, fixed_grid = helpers.to_network(*fixed_args)

        # -- Predict: images in, DDF out, both on the network grid -------------------------------------------------
        ddf = predict([moving_image[None], fixed_image[None]])[0].numpy()

        # -- Warp: the original volumes, each resampled once, onto the fixed image's own grid ----------------------
        def displacement(shape, affine, ddf, grids=(fixed_grid, moving_grid, offset)):
            return helpers.displacement_on(shape, affine, ddf, *grids)

        place = case.fixed_image.shape, case.fixed_affine
        fields = {"before": displacement(*place, np.zeros_like(ddf)), "after": displacement(*place, ddf)}
        images, labels = {}, {}
        for when, field in fields.items():
            images[when] = helpers.warp_volume(case.moving_image, case.moving_affine, field, case.fixed_affine)
            if case.moving_labels is not None:
                labels[when] = helpers.warp_labels(case.moving_labels, case.moving_affine, field, case.fixed_affine)

        # -- Measure: where there are labels, or a true deformation ------------------------------------------------
        case_rows = [{"case": pair.case, "label": ""}]
        if labels:
            labels["fixed"] = case.fixed_labels
            count = case.fixed_labels.shape[-1]
            case_rows = [{"case": pair.case, "label": k, **measure_label(labels, k, case)} for k in range(count)]
        case_rows[0]["folded_percent"] = 100 * np.mean(jacobian_determinant(ddf) <= 0)
        if pair.true_displacement:
            truth, truth_affine = helpers.read_displacement(pair.true_displacement)
            gland = helpers.nearest(case.fixed_labels[..., 0], case.fixed_affine, truth.shape[:3], truth_affine) > 0.5
            for when, field in (("before", np.zeros_like(ddf)), ("after", ddf)):
                error = np.linalg.norm(displacement(truth.shape[:3], truth_affine, field) - truth, axis=-1)
                case_rows[0][f"true_error_{when}_mm"] = error[gland].mean()
        rows += case_rows

        # -- Write -------------------------------------------------------------------------------------------------
        folder = helpers.make_folder(output_dir / pair.case)
        helpers.write_nifti(folder / "warped_image.nii.gz", images["after"], case.fixed_affine)
        helpers.write_displacement(folder / "displacement.nii.gz", fields["after"], case.fixed_affine)
        if labels:
            cut = (labels["after"] >= 0.5).astype(np.uint8)
            helpers.write_nifti(folder / "warped_labels.nii.gz", cut, case.fixed_affine)
        helpers.plot_overview(
            folder / "overview.png", pair.case, case.fixed_image, images, case.fixed_affine, labels, ddf, config.voxel_size
        )
        helpers.write_csv(output_dir / "metrics.csv", [{name: row.get(name, "") for name in COLUMNS} for row in rows])

    text = summary(rows)
    with helpers.written_aside(output_dir / "summary.txt") as aside:
        aside.write_text(text)
    print(f"{text}written to {output_dir}: metrics.csv, and per case the warped volumes, displacement and overview.png")


# -- Metrics: README, "How to read the metrics" ------------------------------------------------------------------------

MEASURES = {  # column: title in the summary; each before and after registration
    "dice": "gland Dice",
    "hd95_mm": "gland HD95, mm",
    "tre_mm": "landmark TRE, mm",
    "true_error_mm": "true error in the gland, mm",
}
BEFORE_AFTER = {name: [name.replace("_mm", "") + f"_{when}" + "_mm" * name.endswith("_mm") for when in ("before", "after")] for name in MEASURES}
COLUMNS = ["case", "label", *sum(BEFORE_AFTER.values(), []), "folded_percent"]


def measure_label(labels, k, case):
    """Dice, TRE and, for the gland (label 0), HD95 of one label, before and after."""
    row = {}
    fixed = labels["fixed"][..., k]
    spacing = np.linalg.norm(case.fixed_affine[:3, :3], axis=0)
    for when in ("before", "after"):
        warped = labels[when][..., k]
        row[f"dice_{when}"] = dice_score(warped >= 0.5, fixed >= 0.5)
        row[f"tre_{when}_mm"] = target_registration_error(warped, fixed, case.fixed_affine)
        if k == 0:
            row[f"hd95_{when}_mm"] = hausdorff_95(warped >= 0.5, fixed >= 0.5, spacing)
    return row


def summary(rows):
    """A table of medians and quartiles before and after, over the cases (over the landmarks for TRE)."""
    lines = [f"{len({row['case'] for row in rows})} pairs{'before':>34}{'after':>24}"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    settings.run(main)
