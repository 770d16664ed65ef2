"""Register image pairs with a trained network. Images are enough; labels, where there are any, only measure.

    python inference.py                                         every pair of the test folder
    python inference.py --moving mr.nii.gz --fixed us.nii.gz    one new pair
    ... --points targets.mrk.json                               and carry points on the MR to the ultrasound

Writes to --output_dir, for each pair, on the fixed image's own grid: warped_image.nii.gz, warped_labels.nii.gz and
displacement.nii.gz (opens in ITK and 3D Slicer); on the moving image's grid displacement_inverse.nii.gz; overview.png,
and pair.txt, which names the two images. For all of them metrics.csv, summary.txt, boxplot.png and report.html.
"""

from extras import devices  # first: it sets what TensorFlow reads when it is imported

# isort: split
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import tensorflow as tf

import helpers
import utils
from config import EXAMPLE_DIR, InferenceConfig, load_config, parse_config
from extras import checkpoint, cross_validation, files, outliers, points, report
from extras.errors import InputError, run
from networks import NETWORKS

TTA_SHARE = 0.25  # of affine_augmentation: copies far from the pair as it is are registered worse than it is


def main():
    config = parse_config(InferenceConfig)
    trained = load_config(config.model_dir)
    print(devices.describe())

    # -- Data: all pairs are checked before the first is registered
    pairs = find_test_pairs(config, trained)
    for pair, *_ in helpers.read_pairs(pairs, "checking"):
        files.warn_of_frame(pair.moving_image)
        files.warn_of_frame(pair.fixed_image)
    point_file = points.read_points(config.points, config.points_frame) if config.points else None
    output_dir = files.ensure_writable_dir(config.output_dir)

    # -- Network: as it was trained
    network = NETWORKS[trained.network](**trained.network_options())
    checkpoint.load_weights(network, config.model_dir, config.weights)
    signatures, reference = outliers.signature_model(network), outliers.read_reference(config.model_dir)
    affines = test_time_affines(trained, config.tta_samples)
    grid = (config.initial_alignment or trained.initial_alignment, *trained.grid_options()[1:])
    offset = utils.moving_offset(trained.moving_shape, trained.fixed_shape)

    table_dir = output_dir / pairs[0].case if config.moving else output_dir
    report.claim_folders(output_dir, table_dir, pairs)
    rows, pages = [], []
    for pair, moving, fixed in helpers.read_pairs(pairs, "registering"):
        network_moving, network_fixed = helpers.pair_to_network(moving, fixed, *grid)
        geometry = network_fixed.affine, network_moving.affine, offset  # the last arguments of utils.displacement_on

        # -- Predict: images in, DDF out, both on the network grid
        ddf = predict(network, network_moving.image[None], network_fixed.image[None], affines)
        outlier_score = outliers.outlier_score(signatures, reference, network_moving.image, network_fixed.image)

        # -- Warp: the original volumes, each resampled once, onto the fixed image's own grid
        fields, warped, displacement = {"before": np.zeros_like(ddf), "after": ddf}, {}, None
        for when, field in fields.items():
            displacement = utils.displacement_on(fixed.image.shape, fixed.affine, field, *geometry)
            warped[when] = warp_volume(moving, displacement, fixed.affine)

        # -- Measure: where there are labels
        stored_labels = labels_to_store(moving, warped["after"], displacement)
        case_rows = report.measure_pair(pair.case, moving, fixed, warped, fields, geometry, stored_labels)
        case_rows[0]["outlier_score"] = outlier_score
        outliers.warn_of_outlier(pair.case, outlier_score)
        rows += case_rows

        # -- Write: volumes and fields, points, a picture
        folder = output_dir / pair.case
        write_volumes(folder, moving, fixed, warped["after"].image, stored_labels, displacement, ddf, geometry)
        if point_file:
            points.transfer_points(point_file, folder, config.points_on, moving, fixed, ddf, *geometry)
        pages.append(report.report_pair(folder, case_rows, {"fixed": fixed, **warped}, ddf, trained.voxel_size))
    report.write_report(table_dir, rows, pages)


# -- Data ----------------------------------------------------------------------------------------------------------


def find_test_pairs(config, trained):
    """One new pair; or those of test_dir; or else the held-out fold, or the example's test patients."""
    if config.moving:
        name = f"{helpers.case_name(config.moving)}_to_{helpers.case_name(config.fixed)}"
        files.check_path(Path(config.output_dir) / name)
        return [helpers.Pair(name, name, Path(config.moving), Path(config.fixed))]
    if config.test_dir:
        return helpers.find_pairs(config.test_dir, labels="optional")
    train_dir = config.train_dir or trained.train_dir
    if trained.folds:
        pairs = helpers.find_pairs(EXAMPLE_DIR / "train" if train_dir == "example" else train_dir)
        return cross_validation.held_out(pairs, trained, config.model_dir)
    if train_dir == "example":
        return helpers.find_pairs(EXAMPLE_DIR / "test")
    raise InputError("--test_dir: found none; expected a folder of pairs, or --moving FILE --fixed FILE")


# -- Predict -------------------------------------------------------------------------------------------------------


def test_time_affines(trained, samples):
    """Affines (N, 3, 4) of the augmented copies of a pair, drawn as in training but smaller and without a shift.

    They come in opposites, A and 2 I - A, so that errors proportional to the change cancel (antithetic variates,
    Hammersley and Morton 1956, doi 10.1017/S0305004100031455). A single one is the pair as it is.
    """
    count, amount = (samples + 1) // 2, TTA_SHARE * trained.affine_augmentation if samples > 1 else 0.0
    mirror = trained.mirror_axis, (-1) ** np.arange(count)
    rng, shape = np.random.default_rng(trained.seed), trained.fixed_shape
    plain, drawn = (utils.random_affine(rng, count, shape, size, *mirror) for size in (0.0, amount))
    return np.concatenate([drawn, 2 * plain - drawn])[:samples] * np.float32([1, 1, 1, 0])


def predict(network, moving_image, fixed_image, affines):
    """Test-time augmentation: the mean DDF (X, Y, Z, 3) over copies of the pair, each under one of the affines."""
    ddfs = [predict_augmented(network, moving_image, fixed_image, affine[None]) for affine in affines]
    return tf.reduce_mean(ddfs, axis=0)[0].numpy()


@tf.function(autograph=False)
def predict_augmented(network, moving_image, fixed_image, affine):
    """The DDF (1, X, Y, Z, 3) of a pair, predicted with both volumes under one affine A about their centres.

    The network sees at p what the pair has at A p. So the pair's own field is ddf(i) = A seen_ddf(A^-1 i).
    """
    seen = [utils.resample(v, utils.augmented_points(v.shape[1:4], affine)) for v in (moving_image, fixed_image)]
    seen_ddf = network(seen)
    inverse = tf.concat([tf.linalg.inv(affine[:, :, :3]), affine[:, :, 3:]], axis=-1)
    shape = fixed_image.shape[1:4]
    points = tf.clip_by_value(utils.augmented_points(shape, inverse), 0, np.array(shape, np.float32) - 1)
    return tf.einsum("bxyzk,blk->bxyzl", utils.resample(seen_ddf, points), affine[:, :, :3])


# -- Warp, measure, write --------------------------------------------------------------------------------------------


def warp_volume(moving, displacement, fixed_affine):
    """The moving Volume on the fixed image's grid. Beyond its own border the image is as dark as it ever is."""
    place = moving.affine, displacement, fixed_affine
    image = utils.warp_to_fixed(moving.image, *place, outside=moving.image.min())
    labels = None if moving.labels is None else utils.warp_to_fixed(moving.labels, *place)
    return helpers.Volume(image, fixed_affine, labels=labels)


def labels_to_store(moving, warped, displacement):
    """The warped labels (X, Y, Z, L), each voxel in or out, or None.

    Those of a map are taken from the nearest voxel, so that no gap opens between two labels.
    """
    if not moving.is_map:
        return None if warped.labels is None else warped.labels >= 0.5
    numbers = np.arange(1, moving.labels.shape[-1] + 1, dtype=np.float32)
    label_map = utils.warp_to_fixed(moving.labels @ numbers, moving.affine, displacement, warped.affine, order=0)
    return label_map[..., None] == numbers


def write_volumes(folder, moving, fixed, warped_image, labels, displacement, ddf, geometry):
    """The warped image and labels, the displacement, and its inverse on the moving image's grid."""
    fixed_grid, moving_grid, offset = geometry
    inverse_ddf, first = utils.invert_ddf(ddf, offset)
    inverse_grid = moving_grid @ nib.affines.from_matvec(np.eye(3), first)
    inverse = utils.displacement_on(
        moving.image.shape, moving.affine, inverse_ddf, inverse_grid, fixed_grid, first - offset
    )
    outputs = [
        (files.write_nifti, "warped_image.nii.gz", warped_image, fixed.affine),
        (files.write_displacement, "displacement.nii.gz", displacement, fixed.affine),
        (files.write_displacement, "displacement_inverse.nii.gz", inverse, moving.affine),
    ]
    if labels is not None:
        as_map = labels @ np.arange(1, labels.shape[-1] + 1) if moving.is_map else np.squeeze(labels)
        outputs.append((files.write_nifti, "warped_labels.nii.gz", as_map.astype(np.uint8), fixed.affine))
    (folder / "warped_labels.nii.gz").unlink(missing_ok=True)  # an earlier run may have had labels
    with ThreadPoolExecutor() as threads:  # compression takes longest
        list(threads.map(lambda file: file[0](folder / file[1], *file[2:]), outputs))


if __name__ == "__main__":
    run(main)
