"""What a person looks at: training curves, metrics in a table, box plots, the picture of a pair, report.html.

README, "Reading the metrics".
"""

import base64
import html
import io
from itertools import product

import matplotlib

matplotlib.use("Agg")  # pictures go to files, whatever screen there is
import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pandas as pd
import tensorflow as tf
from matplotlib.colors import LogNorm, to_rgb
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

import utils
from extras.errors import expect, reading
from extras.files import atomic_write, ensure_writable_dir, warn, write_csv, write_text

GREEN, ORANGE, BLUE, RED = "#33dd77", "#ffaa22", "#3388ff", "#c03028"

# -- Tables: a row of metrics.csv for each label of each pair ------------------------------------------------------

MEASURES = {  # columns of metrics.csv, before and after registration -> title, and the labels that count
    "dice_{}": ("gland Dice", "gland"),
    "hd95_{}_mm": ("gland HD95, mm", "gland"),
    "tre_{}_mm": ("landmark TRE, mm", "landmarks"),
    "rms_tre_{}_mm": ("RMS TRE of a pair, mm", "gland"),  # stands in the gland's row, the first of each pair
    "true_error_{}_mm": ("true error in the gland, mm", "gland"),  # mean over its voxels
}
TIMES = "before", "after"
BEST = ["true_error_best_shift_mm", "true_error_best_affine_mm"]  # what these two would leave of the true displacement
MEASURED = [name.format(when) for name in MEASURES for when in TIMES]
COLUMNS = ["case", "label", *MEASURED, "folded_percent", "lost", "outlier_score", *BEST]


def claim_folders(output_dir, table_dir, pairs):
    """Make each pair's folder, with pair.txt, which names its two files; none may hold the results of other files.

    Patients' files often have the same names in other folders. The tables of an earlier run go before its volumes do.
    """
    records = {
        output_dir / p.case / "pair.txt": f"{p.moving_image.resolve()}\n{p.fixed_image.resolve()}\n" for p in pairs
    }
    for record, paths in records.items():
        known = record.read_text() if record.exists() else paths
        found = f"results of {' and '.join(known.splitlines())}"
        expect(known == paths, record.parent, found, "none; name another --output_dir")
    for record, paths in records.items():
        write_text(ensure_writable_dir(record.parent) / record.name, paths)
    for name in ("metrics.csv", "summary.txt", "boxplot.png", "report.html"):
        (table_dir / name).unlink(missing_ok=True)


def read_metrics(path):
    """A metrics.csv as a DataFrame, checked."""
    with reading(path, "the metrics.csv of inference.py"):
        table = pd.read_csv(path, dtype={"case": str})
        table = table[[name for name in COLUMNS if name in table or "true" not in name]].reindex(columns=COLUMNS)
        expect(len(table) and table["case"].notna().all(), path, "no rows with a case", "a row for each label")
        summarise(table)  # which raises what it misses
        return table


def measure_pair(case, moving, fixed, warped, fields, geometry, stored_labels):
    """Rows of metrics.csv, one for each label. warped: Volumes, and fields: DDFs, "before" and "after".

    stored_labels: as in warped_labels.nii.gz; a label without a voxel in them is lost, and a warning says why.
    """
    spacing = np.linalg.norm(fixed.affine[:3, :3], axis=0)
    rows = [{"case": case, "label": k} for k in range(0 if fixed.labels is None else fixed.labels.shape[-1])]
    for row, (when, volume) in product(rows, warped.items()):
        ours, theirs = volume.labels[..., row["label"]], fixed.labels[..., row["label"]]
        row[f"dice_{when}"] = utils.dice_score(ours >= 0.5, theirs >= 0.5)
        row[f"tre_{when}_mm"] = utils.target_registration_error(ours, theirs, fixed.affine)
        if row["label"] == 0:
            row[f"hd95_{when}_mm"] = utils.hausdorff_95(ours >= 0.5, theirs >= 0.5, spacing)
    for row in rows:
        if not stored_labels[..., row["label"]].any():
            row["lost"] = why_lost(moving, fixed, row["label"], fields["after"], geometry)
            warn(f"{case}: label {row['label']} is not in warped_labels.nii.gz: {row['lost']}")
    first, *landmarks = rows or [{"case": case}]
    for when in warped if landmarks else ():
        first[f"rms_tre_{when}_mm"] = pd.Series([row[f"tre_{when}_mm"] for row in landmarks]).pow(2).mean() ** 0.5
    first["folded_percent"] = 100 * np.mean(utils.jacobian_determinant(fields["after"]) <= 0)
    if fixed.truth and rows:
        first |= true_errors(fixed, fields, geometry)
    return [first, *landmarks]


def why_lost(moving, fixed, label, ddf, geometry):
    """The reason for which no voxel of the fixed image shows a moving label."""
    place = nib.affines.apply_affine(moving.affine, ndimage.center_of_mass(moving.labels[..., label]))
    shape, affine = fixed.image.shape, fixed.affine
    shown = utils.voxel_to_world(shape, affine) + utils.displacement_on(shape, affine, ddf, *geometry)
    is_near = np.linalg.norm(shown - place, axis=-1).min() < np.linalg.norm(nib.affines.voxel_sizes(affine))
    return "too small for the fixed image's grid" if is_near else "outside the fixed image"


def true_errors(fixed, fields, geometry):
    """Mean distance in mm from the true displacement over the gland: of two DDFs, and of the best shift and affine."""
    truth, affine = fixed.truth
    gland = utils.warp_to_fixed(fixed.labels[..., 0], fixed.affine, np.zeros_like(truth), affine) >= 0.5
    errors = {
        f"true_error_{when}_mm": (utils.displacement_on(truth.shape[:3], affine, field, *geometry) - truth)[gland]
        for when, field in fields.items()
    }
    before, ones = errors["true_error_before_mm"], np.ones((gland.sum(), 1))
    for name, terms in zip(BEST, (ones, np.hstack([ones, np.argwhere(gland)])), strict=True):
        errors[name] = before - terms @ np.linalg.lstsq(terms, before, rcond=None)[0]
    return {name: np.linalg.norm(error, axis=-1).mean() for name, error in errors.items()}


def save_metrics(folder, table):
    """Write metrics.csv, summary.txt and boxplot.png of a DataFrame of metrics; returns the summary."""
    text = summarise(table)
    write_csv(folder / "metrics.csv", table.drop(columns=[c for c in table if "true" in c and table[c].isna().all()]))
    write_text(folder / "summary.txt", text)
    if measured(table):
        plot_boxes(folder / "boxplot.png", measured(table))
    return text


def measured(table):
    """title -> DataFrame "before", "after". TRE has a row for each landmark, the others have one for each pair.

    A landmark that was warped out of the fixed image has the value NaN.
    """
    counted = {"gland": table[~(table["label"] > 0)], "landmarks": table[table["label"] > 0]}
    result = {}
    for name, (title, labels) in MEASURES.items():
        values = counted[labels][[name.format(when) for when in TIMES]].set_axis(TIMES, axis="columns").astype(float)
        if values["before"].notna().any():
            result[title] = values
    return result


def summarise(table):
    """Median [quartiles] and worst of each measure, before and after, as text."""

    def cell(values, worst):
        low, middle, high = values.quantile([0.25, 0.5, 0.75])
        return f"{middle:.2f} [{low:.2f} {high:.2f}] {worst(values):.2f}"

    lines = [f"{table['case'].nunique()} pairs: median [quartiles] worst{'before':>15}{'after':>29}"]
    for title, values in measured(table).items():
        worst = pd.Series.min if "Dice" in title else pd.Series.max
        lines.append(f"{title:<30}{cell(values['before'], worst):>29}{cell(values['after'], worst):>29}")
    for name, title in zip(BEST, ("  of the best possible shift", "  of the best possible affine"), strict=True):
        if table[name].notna().any():
            lines.append(f"{title:<30}{cell(table[name].astype(float), pd.Series.max):>58}")
    lost = table[table["lost"].notna()]
    if table["label"].notna().any():
        lines.append(f"labels that are not in warped_labels.nii.gz: {len(lost)} of {table['label'].notna().sum()}")
    lines += [f"  {row.case}, label {row.label:.0f}: {row.lost}" for row in lost.itertuples()]
    if table["outlier_score"].notna().any():  # there were held-out pairs to judge by
        outliers = table[table["outlier_score"] > 1]
        lines.append(f"outliers, unlike the training pairs, to be looked at: {len(outliers)}")
        lines += [f"  {row.case}: outlier score {row.outlier_score:.2f}, limit 1" for row in outliers.itertuples()]
    folded = table["folded_percent"]
    lines.append(f"voxels folded: {folded.mean():.4f} % on average, {folded.max():.4f} % at worst")
    return "\n".join(lines) + "\n"


def summarise_pair(case, table):
    """The measures of one pair in a line: its name, and each median before and after."""
    medians = {title: values.median() for title, values in measured(table).items()}
    warning = ["OUTLIER"] if (table["outlier_score"] > 1).any() else []
    parts = [f"{title} {m['before']:.2f} → {m['after']:.2f}" for title, m in medians.items()]
    return "; ".join([case, *warning, *parts])


# -- Pictures ----------------------------------------------------------------------------------------------------


def save_figure(figure, path, dpi=100):
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=dpi)
    plt.close(figure)


def write_history(model_dir, history, events):
    """Write what a training has reached: history.csv, history.png, TensorBoard events, and a line to read.

    history: a dictionary of numbers for each validation, the last one new; events: a tf.summary writer.
    """
    write_csv(model_dir / "history.csv", history)
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    titles = {"loss": "loss", "dice": "Dice, all labels", "tre": "centroid distance, all labels (mm)"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        curves = pd.DataFrame(history).set_index("step").filter(regex=f"^(valid_)?{name}$")
        labels = ["training (augmented)", "validation"][: curves.shape[1]]
        curves.set_axis(labels, axis="columns").plot(ax=axis, title=title, style=".-", grid=True)
    save_figure(figure, model_dir / "history.png")
    with events.as_default(history[-1]["step"]):
        for name, value in history[-1].items():
            tf.summary.scalar(name, value)
    events.flush()
    tqdm.write(", ".join(f"{name} {value}" for name, value in history[-1].items()))


def plot_boxes(path, measures):
    """Box plots before and after, and every value as a dot. measures: title -> DataFrame "before", "after"."""
    figure, axes = plt.subplots(1, len(measures), figsize=(2.4 * len(measures), 3.2), layout="constrained")
    for axis, (title, table) in zip(np.atleast_1d(axes), measures.items(), strict=True):
        table.boxplot(ax=axis, widths=0.6, showfliers=False, medianprops={"color": RED, "linewidth": 2})
        for position, when in enumerate(TIMES, start=1):
            jitter = np.random.default_rng(0).uniform(-0.15, 0.15, len(table))
            axis.plot(position + jitter, table[when], "o", color=BLUE, alpha=0.4, markersize=3, zorder=0)
        axis.set_title(title, fontsize=10)
        axis.set_ylim(0, 1 if "Dice" in title else None)
    save_figure(figure, path)


def show(axis, image, *outlines, extent=None):
    """A slice (X, Y), right and front on the left as in 3D Slicer. outlines: (colour, labels (L, X, Y))."""
    extent = axis.imshow(brightness(image).T, cmap="gray", origin="lower", extent=extent).get_extent()
    for colour, labels in outlines:
        style = {"colors": colour, "linestyles": "--" if colour == ORANGE else "-", "linewidths": 1.2}
        for label in labels:
            if label.max() > 0.5 > label.min():
                axis.contour(label.T, [0.5], extent=extent, origin="lower", **style)
    axis.set(xticks=[], yticks=[], xlim=extent[1::-1], ylim=extent[2:])


def plot_overview(path, title, volumes, ddf, voxel_size):
    """Three orthogonal slices of a registered pair: fixed image, moving image before and after, and the deformation.

    volumes: Volumes "fixed", "before" and "after" on the fixed image's own grid, with or without labels; ddf: (X, Y, Z,
    3), on the network grid, in voxels of `voxel_size` mm.
    """
    spacing, images, labels = canonical(volumes)
    size, grid_size = np.array(images["fixed"].shape), np.array(ddf.shape[:3])
    focus = ndimage.center_of_mass(labels["fixed"][..., 0]) if labels else (size - 1) / 2
    depth = (focus - (size - 1) / 2) * spacing / voxel_size + (grid_size - 1) / 2  # both grids have one centre
    focus, depth = (np.clip(np.round(v), 0, n - 1).astype(int) for v, n in ((focus, size), (depth, grid_size)))
    determinant, shift = utils.jacobian_determinant(ddf), ddf.mean(axis=(0, 1, 2))
    points = (np.moveaxis(np.indices(grid_size), 0, -1) - (grid_size - 1) / 2 + ddf - shift) * voxel_size
    colours = matplotlib.colormaps["RdBu_r"].with_extremes(bad="black")  # where there is no logarithm
    change = "volume change; grid less the mean\nshift of {:.1f}, {:.1f}, {:.1f} mm".format(*shift * voxel_size)
    headings = "fixed image", "moving image, before", "moving image, warped", change
    figure, axes = plt.subplots(3, 4, figsize=(13, 10), layout="constrained")
    figure.suptitle(title, parse_math=False)  # a name may have dollars in it
    for axis, heading in zip(axes[0], headings, strict=True):
        axis.set_title(heading, fontsize=11)
    for row, (name, normal) in zip(axes, (("axial", 2), ("coronal", 1), ("sagittal", 0)), strict=True):
        row[0].set_ylabel(name)
        plane = [axis for axis in range(3) if axis != normal]
        extent, grid_extent = (
            [side * length / 2 for length in lengths[plane] for side in (-1, 1)]
            for lengths in (size * spacing, grid_size * voxel_size)
        )
        cuts = {kind: np.moveaxis(np.take(label, focus[normal], normal), -1, 0) for kind, label in labels.items()}
        for axis, kind in zip(row, (*images, "fixed"), strict=True):
            shown = [k for k in dict.fromkeys((kind, "fixed")) if k in cuts]
            outlines = [(GREEN if k == "fixed" else ORANGE, cuts[k]) for k in shown]
            show(axis, np.take(images[kind], focus[normal], normal), *outlines, extent=extent)
        cut, mesh = np.take(determinant, depth[normal], normal), np.take(points, depth[normal], normal)[..., plane]
        picture = row[3].imshow(cut.T, cmap=colours, norm=LogNorm(0.5, 2), origin="lower", extent=grid_extent)
        for lines in (mesh[:, ::2], np.swapaxes(mesh[::2], 0, 1)):
            row[3].plot(lines[..., 0], lines[..., 1], color="black", linewidth=0.6, alpha=0.7, zorder=1)
    bar = figure.colorbar(picture, ax=axes[:, 3], ticks=[0.5, 0.7, 1, 1.4, 2], format="%.1f", shrink=0.6)
    bar.ax.minorticks_off()
    bar.set_label("Jacobian determinant: above 1 the warp\nshrinks tissue, below 1 it swells; black = folded")
    if labels:
        axes[0, 0].plot([], [], "-", color=GREEN, label="fixed labels")
        axes[0, 0].plot([], [], "--", color=ORANGE, label="moving labels")
        figure.legend(loc="outside lower center", ncols=2)
    save_figure(figure, path, dpi=80)


def canonical(volumes):
    """Voxel size in mm, images and labels of Volumes, in the axis order and direction nearest to RAS+."""
    turn = nib.io_orientation(volumes["fixed"].affine)
    spacing = nib.affines.voxel_sizes(volumes["fixed"].affine)[np.argsort(turn[:, 0])]
    images = {name: nib.apply_orientation(v.image, turn) for name, v in volumes.items()}
    labels = {name: nib.apply_orientation(v.labels, turn) for name, v in volumes.items() if v.labels is not None}
    return spacing, images, labels


def brightness(image):
    """An image or a slice from 0, black, to 1, white; the limits are of about a million voxels, which is enough."""
    low, high = np.percentile(image.ravel()[:: max(1, image.size // 10**6)], [0.2, 99.8]).astype(np.float32)
    return np.clip((image - low) / max(high - low, 1e-6), 0, 1)


# -- Report: one page for a whole run ------------------------------------------------------------------------------


def viewer(volumes):
    """A part of a page: axial slices of the fixed image and of the moving one before and after, under one slider.

    volumes: as of `plot_overview`. One tall picture holds all slices; the slider moves it behind a window of one slice.
    """
    spacing, images, labels = canonical(volumes)
    shape = np.array(images["fixed"].shape)
    factor = spacing / max(spacing.min(), (spacing * shape).max() / 120)  # cubes, at most 120 along the longest side
    factor = np.maximum(factor, 2 / shape)  # a slider wants two slices
    in_plane = ndimage.generate_binary_structure(3, 1)[:, :, 1:2]
    panels = []
    for kind, image in images.items():
        cubes = ndimage.zoom(image, factor, order=1, grid_mode=True, mode="nearest")
        panel = np.repeat((255 * brightness(cubes)).astype(np.uint8)[..., None], 3, axis=-1)
        for shown in dict.fromkeys(("fixed", kind)) if labels else ():
            colour = np.round(255 * np.array(to_rgb(GREEN if shown == "fixed" else ORANGE)))
            for label in np.moveaxis(labels[shown], -1, 0):
                inside = ndimage.zoom(label, factor, order=1, grid_mode=True, mode="nearest") > 0.5
                panel[inside & ~ndimage.binary_erosion(inside, in_plane)] = colour
        panels.append(np.moveaxis(panel, (2, 1), (0, 1))[:, ::-1, ::-1])  # slice, row from A, column from R, colour
    slices, height, width, _ = (tall := np.concatenate(panels, axis=2)).shape
    Image.fromarray(tall.reshape(-1, width, 3)).save(picture := io.BytesIO(), "JPEG", quality=85, subsampling=0)
    middle = f"0 {100 * (slices // 2) / (slices - 1)}%"
    window = f"aspect-ratio: {width} / {height}; object-fit: cover; object-position: {middle}"
    move = "this.nextElementSibling.style.objectPosition = `0 ${100 * this.value / this.max}%`"
    return (
        "<p>axial slices: fixed image; moving image before; moving image warped</p>"
        f'<input type="range" min="0" max="{slices - 1}" value="{slices // 2}" oninput="{move}">'
        + embedded(picture.getvalue(), f'alt="slices" style="{window}"')
    )


def embedded(picture, attributes=""):
    """The bytes of a picture as a part of a page."""
    return f'<img {attributes} src="data:image;base64,{base64.b64encode(picture).decode()}">'


def report_pair(folder, rows, volumes, ddf, voxel_size):
    """Draw overview.png of a pair; returns its part of the page. Arguments as of `plot_overview`."""
    plot_overview(folder / "overview.png", folder.name, volumes, ddf, voxel_size)
    heading = html.escape(summarise_pair(folder.name, pd.DataFrame(rows, columns=COLUMNS)))
    return f"<h2>{heading}</h2>{embedded((folder / 'overview.png').read_bytes())}{viewer(volumes)}"


def write_report(folder, rows, parts):
    """Write the tables, and report.html: one file that holds all it shows, so that it opens without a network.

    rows: dictionaries with keys of COLUMNS; parts: what `report_pair` returned for each pair.
    """
    summary, title = save_metrics(folder, pd.DataFrame(rows, columns=COLUMNS)), html.escape(f"Registration: {folder}")
    page = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        '<link rel="icon" href="data:,"><style>body { font-family: sans-serif; max-width: 75em; margin: 2em auto }',
        "img, input { width: 100%; margin: 0 }</style></head><body>",
        f"<h1>{title}</h1><pre>{html.escape(summary)}</pre>",
        *(embedded(path.read_bytes()) for path in folder.glob("boxplot.png")),  # none without labels
        *parts,
        "</body></html>\n",
    ]
    write_text(folder / "report.html", "\n".join(page))
    print(f"{summary}written to {folder}: warped volumes and displacements of each pair, metrics.csv, report.html")
