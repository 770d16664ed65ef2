"""What a person looks at: training curves, box plots, the overview of a pair, and the report of a whole run.

README, "Reading the metrics".
"""

import base64
import html

import matplotlib

matplotlib.use("Agg")  # pictures go to files, whatever screen there is
import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm, to_rgb
from scipy import ndimage

from helpers import written_aside

GREEN, ORANGE, BLUE, RED = "#33dd77", "#ffaa22", "#3388ff", "#c03028"


def plot_history(path, history):
    """Loss, Dice and TRE against the step, training and validation."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    steps = [row["step"] for row in history]
    titles = {"loss": "loss", "dice": "Dice, all labels", "tre": "centroid distance, all labels (mm)"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for prefix, label in (("", "training (augmented)"), ("valid_", "validation")):
            if prefix + name in history[0]:
                axis.plot(steps, [row[prefix + name] for row in history], ".-", label=label)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    axes[0].legend()
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=100)
    plt.close(figure)


def plot_boxes(path, measured):
    """Box plots before and after, and every value as a dot. measured: title -> (values before, values after)."""
    figure, axes = plt.subplots(1, len(measured), figsize=(2.4 * len(measured), 3.2), layout="constrained")
    for axis, (title, both) in zip(np.atleast_1d(axes), measured.items(), strict=True):
        both = [values[~np.isnan(values)] for values in both]
        axis.boxplot(both, widths=0.6, showfliers=False, medianprops={"color": RED, "linewidth": 2})
        for place, values in enumerate(both, start=1):
            aside = np.random.default_rng(0).uniform(-0.15, 0.15, len(values))
            axis.plot(place + aside, values, "o", color=BLUE, alpha=0.4, markersize=3, zorder=0)
        axis.set_title(title, fontsize=10)
        axis.set(xticks=[1, 2], xticklabels=["before", "after"])
        axis.set_ylim(0, 1 if "Dice" in title else None)
        axis.grid(axis="y", alpha=0.3)
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=100)
    plt.close(figure)


def plot_overview(path, title, fixed, warped, affine, labels, ddf, determinant, voxel_size):
    """Three orthogonal slices of a registered pair: labels before and after, a checkerboard, and the deformation.

    fixed and warped["before"], ["after"]: (X, Y, Z) on the fixed image's own grid; labels: empty, or (X, Y, Z, L)
    arrays under "fixed", "before", "after"; on the network's grid, ddf: (GX, GY, GZ, 3) voxels of `voxel_size` mm, and
    determinant: (GX, GY, GZ).
    """
    spacing, volumes, labels = canonical(affine, {"fixed": fixed, **warped}, labels)
    size, grid_size = np.array(volumes["fixed"].shape), np.array(ddf.shape[:3])
    focus = ndimage.center_of_mass(labels["fixed"][..., 0]) if labels else (size - 1) / 2
    focus = np.round(focus).astype(int)
    limits = {name: grey_limits(v) for name, v in volumes.items()}
    shift = ddf.mean(axis=(0, 1, 2))
    points = (np.moveaxis(np.indices(grid_size), 0, -1) - (grid_size - 1) / 2 + ddf - shift) * voxel_size
    depth = (focus - (size - 1) / 2) * spacing / voxel_size + (grid_size - 1) / 2  # both grids have one centre
    depth = np.clip(np.round(depth), 0, grid_size - 1).astype(int)
    outlines = {"fixed": {"fixed": GREEN}, "before": {"before": ORANGE, "fixed": GREEN}, "change": {"fixed": GREEN}}
    outlines["after"] = {"after": ORANGE, "fixed": GREEN}

    figure, axes = plt.subplots(3, 5, figsize=(16, 10), layout="constrained")
    figure.suptitle(title, parse_math=False)  # a name may have dollars in it
    headings = {
        "fixed": "fixed image",
        "before": "moving image, before",
        "after": "moving image, warped",
        "checkerboard": "checkerboard, fixed and warped",
        "change": "volume change; grid without\nthe mean shift of {:.1f}, {:.1f}, {:.1f} mm".format(
            *shift * voxel_size
        ),
    }
    for row, (name, normal) in zip(axes, (("axial", 2), ("coronal", 1), ("sagittal", 0)), strict=True):
        u, v = (k for k in range(3) if k != normal)
        extent, grid_extent = (
            [side * n[k] * step[k] / 2 for k in (u, v) for side in (-1, 1)]
            for n, step in ((size, spacing), (grid_size, [voxel_size] * 3))
        )
        row[0].set_ylabel(name)
        cuts = {
            kind: (np.take(v, focus[normal], normal) - limits[kind][0]) / np.ptp(limits[kind])
            for kind, v in volumes.items()
        }
        square = np.maximum(np.round(12 / spacing[[u, v]]), 1)[:, None, None]
        odd = (np.indices(cuts["fixed"].shape) // square).sum(axis=0) % 2
        cuts["checkerboard"] = np.where(odd, cuts["fixed"], cuts["after"])
        for axis, (kind, heading) in zip(row, headings.items(), strict=True):
            if kind == "change":
                colours = matplotlib.colormaps["RdBu_r"].with_extremes(bad="black")  # where there is no logarithm
                cut, scale = np.take(determinant, depth[normal], normal), {"norm": LogNorm(0.5, 2), "cmap": colours}
                change = axis.imshow(cut.T, **scale, origin="lower", extent=grid_extent)
                plane = np.take(points, depth[normal], normal)[..., [u, v]]
                lines = [*plane[::2], *np.swapaxes(plane, 0, 1)[::2]]
                axis.add_collection(LineCollection(lines, colors="black", linewidths=0.6, alpha=0.7))
            else:
                axis.imshow(cuts[kind].T, cmap="gray", origin="lower", extent=extent, vmin=0, vmax=1)
            for shown, colour in outlines.get(kind, {}).items() if labels else ():
                for label in np.moveaxis(np.take(labels[shown], focus[normal], normal), -1, 0):
                    if label.max() > 0.5:
                        line = {"colors": colour, "linestyles": "-" if shown == "fixed" else "--", "linewidths": 1.2}
                        axis.contour(label.T, [0.5], extent=extent, origin="lower", **line)
            axis.set(xticks=[], yticks=[], xlim=extent[:2], ylim=extent[2:], aspect="equal")
            axis.set_title(heading if name == "axial" else "", fontsize=11)
    bar = figure.colorbar(change, ax=axes[:, 4], ticks=[0.5, 0.7, 1, 1.4, 2], format="%.1f", shrink=0.6)
    bar.ax.minorticks_off()
    bar.set_label("Jacobian determinant: above 1 the warp\nshrinks tissue, below 1 it swells; black = folded")
    if labels:
        axes[0, 0].plot([], [], "-", color=GREEN, label="fixed labels")
        axes[0, 0].plot([], [], "--", color=ORANGE, label="moving labels")
        figure.legend(loc="outside lower center", ncols=2)
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=80)
    plt.close(figure)


def canonical(affine, *volumes):
    """Voxel size in mm, and each dictionary of volumes, in the axis order and direction nearest to RAS+."""
    turn = nib.io_orientation(affine)
    spacing = nib.affines.voxel_sizes(affine)[np.argsort(turn[:, 0])]
    return spacing, *({k: nib.apply_orientation(v, turn).astype(np.float32) for k, v in d.items()} for d in volumes)


def grey_limits(volume):
    """The intensities to show as black and as white; from about a million voxels, which is enough."""
    low, high = np.percentile(volume.ravel()[:: max(1, volume.size // 10**6)], [0.2, 99.8])
    return low, max(high, low + 1e-6)


# -- Report: one page for a whole run ------------------------------------------------------------------------------


def viewer(fixed, warped, affine, labels):
    """A part of a page: axial slices of the fixed image and of the moving one before and after, under one slider.

    Arguments as of `plot_overview`. Shown at no more than 72 voxels along the longest side, in 64 greys.
    """
    import plotly.express as px

    spacing, volumes, labels = canonical(affine, {"fixed": fixed, **warped}, labels)
    shape = np.array(volumes["fixed"].shape)
    factor = spacing / max(spacing.min(), (spacing * shape).max() / 72)
    factor = np.maximum(factor, 2 / shape)  # a slider wants two slices
    colours = {"fixed": GREEN, "before": ORANGE, "after": ORANGE}
    panels = []
    for kind, volume in volumes.items():
        small = ndimage.zoom(volume, factor, order=1)
        low, high = grey_limits(small)
        grey = 4 * np.clip((small - low) / (high - low) * 63, 0, 63).astype(np.uint8)
        panel = np.repeat(grey[..., None], 3, axis=-1)
        for shown in dict.fromkeys(["fixed", kind]) if labels else ():
            for label in np.moveaxis(labels[shown], -1, 0):
                inside = ndimage.zoom(label, factor, order=1) > 0.5
                outline = inside & ~ndimage.binary_erosion(inside, ndimage.generate_binary_structure(3, 1)[:, :, 1:2])
                panel[outline] = np.round(255 * np.array(to_rgb(colours[shown])))
        panels.append(np.moveaxis(panel, (2, 1, 0), (0, 1, 2)))  # slice, row, column, colour
    names = "fixed", "moving, before", "moving, warped"
    figure = px.imshow(
        np.stack(panels), facet_col=0, animation_frame=1, facet_col_spacing=0.01, origin="lower", height=540
    )
    for note, name in zip(figure.layout.annotations, names, strict=True):
        note.text = name
    figure.update_xaxes(visible=False).update_yaxes(visible=False).update_layout(
        margin={"l": 0, "r": 0, "t": 30, "b": 90}
    )
    figure.layout.updatemenus = None  # no animation; the slider is enough
    slider = figure.layout.sliders[0]
    slider.active = len(figure.frames) // 2
    slider.currentvalue.prefix = "axial slice "
    for trace, middle in zip(figure.data, figure.frames[slider.active].data, strict=True):
        trace.update(middle)
    return figure.to_html(full_html=False, include_plotlyjs=False, auto_play=False, config={"displaylogo": False})


def embedded(path):
    """A PNG file as a part of a page."""
    return f'<img alt="{path.stem}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'


def write_report(path, title, summary, pictures, cases):
    """One HTML file that holds all it shows, so that it opens without a network.

    summary: text; pictures: PNG files; cases: (heading, PNG file, what `viewer` returned) of each pair.
    """
    from plotly.offline import get_plotlyjs

    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
        '<link rel="icon" href="data:,"><style>body { font-family: sans-serif; max-width: 75em; margin: 2em auto }',
        f"img {{ max-width: 100% }}</style><script>{get_plotlyjs()}</script></head><body>",
        f"<h1>{html.escape(title)}</h1><pre>{html.escape(summary)}</pre>",
        *map(embedded, pictures),
    ]
    for heading, overview, slices in cases:
        parts += [f"<h2>{html.escape(heading)}</h2>", embedded(overview), slices]
    with written_aside(path) as aside:
        aside.write_text("\n".join([*parts, "</body></html>\n"]), encoding="utf-8")
