"""Register image pairs with a trained network. Images are enough; labels, where there are any, only measure.

    python inference.py                                         every pair of the test folder
    python inference.py --moving mr.nii.gz --fixed us.nii.gz    one new pair
    ... --points targets.mrk.json                               and carry points on the MR to the ultrasound
    python inference.py --help                                  every setting

Writes to --output_dir, per case and on the fixed image's own grid: warped_image.nii.gz, warped_labels.nii.gz,
displacement.nii.gz (ITK convention, opens in 3D Slicer), overview.png; on the moving one's displacement_inverse.nii.gz;
with pair.txt, which names the two images. For all cases (for one new pair in its folder, with the points): metrics.csv,
summary.txt, boxplot.png and report.html.
"""

import config as settings

settings.import_tensorflow()  # before anything else does

# isort: split
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
import tensorflow as tf
from scipy import ndimage
from tqdm import tqdm

import helpers
import pictures
import results
from losses import dice, multi_scale
from networks import build_network
from points import read_points, write_points
from utils import (
    dice_score,
    hausdorff_95,
    invert_points,
    jacobian_determinant,
    map_points,
    moving_offset,
    random_affine,
    reference_grid,
    resample,
    smooth,
    target_registration_error,
    transform_points,
)


def main():
    config = settings.parse_for_inference()
    settings.share_cores(config)

    # -- Data: one pair at a time; all are checked before the first is registered ----------------------------------
    if config.moving:
        name = f"{helpers.case_name(config.moving)}_to_{helpers.case_name(config.fixed)}"
        pairs = [helpers.Pair(name, name, Path(config.moving), Path(config.fixed))]
    else:
        pairs = helpers.find_test_pairs(config.folds, config.fold, config.train_dir, config.test_dir)
        if not config.test_dir:
            helpers.check_patients(Path(config.model_dir) / settings.PATIENTS_NAME, held_out=pairs)
    helpers.check_pairs(pairs)
    point_file = read_points(config.points, config.points_frame) if config.points else None
    output_dir = helpers.make_folder(config.output_dir)

    # -- Network: as it was trained --------------------------------------------------------------------------------
    network = build_network(config)
    helpers.load_weights(network, Path(config.model_dir) / settings.WEIGHTS[config.weights])
    predict = make_predict(config, network)
    offset = moving_offset(config.moving_shape, config.fixed_shape)

    # -- Folders: one for each pair; the tables of an earlier run go before its volumes do -------------------------
    claim_folders(output_dir, pairs)
    table_dir = output_dir / name if config.moving else output_dir
    for table in ("metrics.csv", "summary.txt", "boxplot.png", "report.html"):
        (table_dir / table).unlink(missing_ok=True)

    rows, cases, threads = [], [], ThreadPoolExecutor()
    for pair in tqdm(pairs, "registering", unit="pair", disable=None):
        for path in (pair.moving_image, pair.fixed_image):
            helpers.warn_of_frame(path)
        moving, fixed = helpers.read_pair(pair)
        network_moving, network_fixed = helpers.pair_to_network(pair, moving, fixed, *settings.grid_settings(config))
        grids = network_fixed.affine, network_moving.affine, offset

        # -- Predict: images in, DDF out, both on the network grid -------------------------------------------------
        ddf = predict(network_moving.image[None], network_fixed.image[None])

        # -- Warp: the original volumes, each resampled once, onto the fixed image's own grid ----------------------
        fields = {"before": np.zeros_like(ddf), "after": ddf}
        images, labels = {}, {}
        for when, field in fields.items():
            displacement = helpers.displacement_on(fixed.image.shape, fixed.affine, field, *grids)
            images[when] = helpers.warp_to_fixed(moving.image, moving.affine, displacement, fixed.affine)
            if moving.labels is not None:
                labels[when] = helpers.warp_to_fixed(moving.labels, moving.affine, displacement, fixed.affine)

        # -- Measure: where there are labels; and the error where there is a true deformation too -------------------
        if labels:
            labels["fixed"] = fixed.labels
        case_rows = measure_pair(pair.case, labels, fixed.affine, ddf)
        if pair.true_displacement and labels:
            truth, affine = helpers.read_displacement(pair.true_displacement)
            gland = helpers.warp_to_fixed(fixed.labels[..., 0], fixed.affine, np.zeros_like(truth), affine) >= 0.5
            for when, field in fields.items():
                error = helpers.displacement_on(truth.shape[:3], affine, field, *grids) - truth
                case_rows[0][f"true_error_{when}_mm"] = np.linalg.norm(error[gland], axis=-1).mean()
        rows += case_rows

        # -- Write: the large files are packed while this goes on ---------------------------------------------------
        folder = output_dir / pair.case
        inverse_ddf, first = invert(ddf, config.moving_shape, offset)
        inverse_grid = network_moving.affine @ nib.affines.from_matvec(np.eye(3), first)
        inverse = helpers.displacement_on(
            moving.image.shape, moving.affine, inverse_ddf, inverse_grid, network_fixed.affine, first - offset
        )
        writing = [
            threads.submit(helpers.write_nifti, folder / "warped_image.nii.gz", images["after"], fixed.affine),
            threads.submit(helpers.write_displacement, folder / "displacement.nii.gz", displacement, fixed.affine),
            threads.submit(helpers.write_displacement, folder / "displacement_inverse.nii.gz", inverse, moving.affine),
        ]
        if point_file:
            carry_points(point_file, folder, config.points_on, moving, fixed, ddf, *grids)
        (folder / "warped_labels.nii.gz").unlink(missing_ok=True)  # an earlier run may have had labels
        if labels:
            cut = labels["after"] >= 0.5
            if moving.is_map:  # back to a map, by the nearest voxel, so that no gap opens between two labels
                stored = moving.labels @ np.arange(1, cut.shape[-1] + 1, dtype=np.float32)
                cut = helpers.warp_to_fixed(stored, moving.affine, displacement, fixed.affine, order=0)
            elif cut.shape[-1] == 1:
                cut = cut[..., 0]
            helpers.write_nifti(folder / "warped_labels.nii.gz", cut.astype(np.uint8), fixed.affine)
        shown = fixed.image, images, fixed.affine, labels
        pictures.plot_overview(
            folder / "overview.png", pair.case, *shown, ddf, jacobian_determinant(ddf), config.voxel_size
        )
        cases.append((results.line(case_rows), folder / "overview.png", pictures.viewer(*shown)))
        for written in writing:
            written.result()  # raises what went wrong there

    summary = results.save(table_dir, rows)
    plots = table_dir.glob("boxplot.png")  # none without labels
    pictures.write_report(table_dir / "report.html", f"Registration: {table_dir}", summary, plots, cases)
    print(f"{summary}written to {table_dir}: warped volumes and displacements of each pair, metrics.csv, report.html")


def invert(ddf, moving_shape, offset):
    """The DDF (X, Y, Z, 3) the other way: moving voxel k goes to k - offset + inverse(k). Returns inverse and first.

    inverse: (..., 3) on the box of voxels, from `first` (3,) on, that holds the moving grid and all that the fixed grid
    is mapped to, should that be more.
    """
    shape = np.array(ddf.shape[:3])
    mapped = np.moveaxis(np.indices(shape), 0, -1) + offset + ddf
    mapped = np.clip(mapped, -shape, moving_shape + shape)  # a wild field would ask for more memory than there is
    first = np.minimum(0, np.floor(mapped.min(axis=(0, 1, 2))).astype(int))
    end = np.maximum(moving_shape, np.ceil(mapped.max(axis=(0, 1, 2))).astype(int) + 1)
    index = np.indices(end - first, float).reshape(3, -1).T + first
    inverse = invert_points(index, ddf, offset) - index + offset
    return inverse.reshape(*(end - first), 3).astype(np.float32), first


def claim_folders(output_dir, pairs):
    """Make each pair's folder, with pair.txt, which names its two files; none may hold the results of other files.

    Patients' files often have the same names in other folders.
    """
    texts = [f"{pair.moving_image.resolve()}\n{pair.fixed_image.resolve()}\n" for pair in pairs]
    records = {output_dir / pair.case / "pair.txt": text for pair, text in zip(pairs, texts, strict=True)}
    for record, paths in records.items():
        if record.exists() and (found := record.read_text()) != paths:
            found = " and ".join(found.splitlines())
            raise settings.InputError(f"{record.parent}: holds results of {found}; name another --output_dir")
    for record, paths in records.items():
        helpers.make_folder(record.parent)
        with helpers.written_aside(record) as aside:
            aside.write_text(paths)


def carry_points(file, folder, points_on, moving, fixed, ddf, fixed_grid, moving_grid, offset):
    """Write the points of `file` where they lie in the other image; name those out of view, folded or not inverted.

    ddf, fixed_grid, moving_grid, offset: as of helpers.displacement_on.
    """
    if points_on == "moving":
        on_moving = nib.affines.apply_affine(np.linalg.inv(moving_grid), file.positions)
        on_fixed = invert_points(on_moving, ddf, offset)
    else:
        on_fixed = nib.affines.apply_affine(np.linalg.inv(fixed_grid), file.positions)
        on_moving = map_points(on_fixed, ddf, offset)
    residual = np.linalg.norm((map_points(on_fixed, ddf, offset) - on_moving) @ moving_grid[:3, :3].T, axis=-1)
    folded = ndimage.map_coordinates(jacobian_determinant(ddf), on_fixed.T, order=1, mode="nearest") <= 0
    seen = helpers.in_view(on_fixed, ddf.shape[:3]) & (residual < 0.1) & ~folded
    sides = [(moving, moving_grid, on_moving), (fixed, fixed_grid, on_fixed)]
    for volume, grid, points in sides:
        voxels = nib.affines.apply_affine(np.linalg.inv(volume.affine) @ grid, points)
        seen &= helpers.in_view(voxels, volume.image.shape)
    other = "fixed" if points_on == "moving" else "moving"
    path = folder / f"{file.stem}_on_{other}{file.suffix}"
    _, grid, points = sides[other == "fixed"]
    write_points(path, file, nib.affines.apply_affine(grid, points), seen)
    for name in np.array(file.names)[~seen]:
        where = "outside the field of view, or where the field folds or is not inverted to 0.1 mm"
        print(f"warning: point {name} lies {where}, and is left out")
    error = f", error of the inversion at most {residual[seen].max(initial=0):.4f} mm" if other == "fixed" else ""
    print(f"{path}: {seen.sum()} points{error}")


def make_predict(config, network):
    """A function from the images (1, ..., 1) of a pair to its ddf (X, Y, Z, 3), the mean over `views` of the pair.

    A view is the pair as training might have shown it, both volumes under one affine A about their centres: at p it
    shows what the pair has at A p, so ddf(i) = A ddf_of_view(A^-1 i). Mistakes differ between views. For each (of an
    odd number but one) there is its opposite, turned and scaled as much the other way, so that what is wrong in
    proportion cancels (antithetic variates, Hammersley and Morton 1956, doi 10.1017/S0305004100031455). Where the
    network finds the gland, its maps are averaged alike, and `refine_steps` of make_refine_step follow.
    """
    moving_grid, fixed_grid = reference_grid(config.moving_shape)[None], reference_grid(config.fixed_shape)[None]
    count = (config.views + 1) // 2
    mirror = tf.constant([(-1.0) ** k for k in range(count)]), config.mirror_axis
    largest = config.affine_augmentation if config.views > 1 else 0.0
    drawn, plain = (
        random_affine([config.seed, 0], count, config.fixed_shape, amount, *mirror) for amount in (largest, 0.0)
    )
    affines = tf.concat([drawn, 2 * plain - drawn], axis=0)[: config.views]
    affines *= tf.constant([1.0, 1.0, 1.0, 0.0])  # no shift
    inverses = tf.concat([tf.linalg.inv(affines[:, :, :3]), affines[:, :, 3:]], axis=-1)

    @tf.function(autograph=False)
    def predict_view(moving, fixed, affine, inverse):
        moving = resample(moving, transform_points(moving_grid, affine, config.moving_shape))
        fixed = resample(fixed, transform_points(fixed_grid, affine, config.fixed_shape))
        outputs = network([moving, fixed])

        def turned_back(volume, grid, shape):
            points = transform_points(grid, inverse, shape)
            return resample(volume, tf.clip_by_value(points, 0, np.array(shape, np.float32) - 1))  # border value beyond

        ddf = turned_back(outputs["ddf"], fixed_grid, config.fixed_shape)
        ddf = tf.einsum("bxyzk,blk->bxyzl", ddf, affine[:, :, :3])
        sides = {"moving_gland": (moving_grid, config.moving_shape), "fixed_gland": (fixed_grid, config.fixed_shape)}
        return [ddf, *(turned_back(outputs[name], *side) for name, side in sides.items() if name in outputs)]

    refine_step = make_refine_step(config)

    def predict(moving, fixed):
        views = zip(affines[:, None], inverses[:, None], strict=True)
        seen = zip(*[predict_view(moving, fixed, *view) for view in views], strict=True)
        ddf, *glands = (tf.reduce_mean(tf.stack(of_all_views), axis=0) for of_all_views in seen)
        for _ in range(config.refine_steps if glands else 0):
            ddf = refine_step(ddf, *glands)
        return ddf[0].numpy()

    return predict


def make_refine_step(config):
    """A function from a ddf (1, X, Y, Z, 3) and the gland's maps (1, ..., 1) in both images to a better ddf.

    A step down the multi-scale Dice loss of training, with the maps that the centred network found in place of labels
    (VoxelMorph's instance-specific optimisation is of this kind, Balakrishnan et al. 2019). It is smooth over 12 mm,
    and so long that by the slope the loss would halve, but 1 mm at most (root mean square).
    """
    points = reference_grid(config.fixed_shape) + moving_offset(config.moving_shape, config.fixed_shape)

    @tf.function(autograph=False)
    def refine_step(ddf, moving_gland, fixed_gland):
        with tf.GradientTape() as tape:
            tape.watch(ddf)
            warped = resample(moving_gland, points + ddf)
            loss = tf.reduce_mean(multi_scale(dice, warped, fixed_gland, config.similarity_scales))
        gradient = tape.gradient(loss, ddf)
        uphill = smooth(gradient, 12 / config.voxel_size)
        halving = 0.5 * loss / (tf.reduce_sum(uphill * gradient) + 1e-12)
        longest = 1 / config.voxel_size / (tf.sqrt(tf.reduce_mean(tf.reduce_sum(uphill**2, axis=-1))) + 1e-12)
        return ddf - tf.minimum(halving, longest) * uphill

    return refine_step


def measure_pair(case, labels, affine, ddf):
    """Rows of metrics.csv, one for each label. labels: empty, or arrays under "fixed", "before", "after", all of them
    (X, Y, Z, L) on the fixed image's own grid; ddf: on the network's.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    rows = [{"case": case, "label": k} for k in range(labels["fixed"].shape[-1] if labels else 0)]
    for row, when in product(rows, results.TIMES):
        warped, fixed = (labels[name][..., row["label"]] for name in (when, "fixed"))
        row[f"dice_{when}"] = dice_score(warped >= 0.5, fixed >= 0.5)
        row[f"tre_{when}_mm"] = target_registration_error(warped, fixed, affine)
        if row["label"] == 0:
            row[f"hd95_{when}_mm"] = hausdorff_95(warped >= 0.5, fixed >= 0.5, spacing)
    first, *landmarks = rows or [{"case": case, "label": ""}]
    first |= results.rms_tre(landmarks) | {"folded_percent": 100 * np.mean(jacobian_determinant(ddf) <= 0)}
    return [first, *landmarks]


if __name__ == "__main__":
    settings.run(main)
