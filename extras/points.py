"""Points in mm as 3D Slicer and spreadsheets keep them: read, carried to the other image, written in the same format.

Files of 3D Slicer (.fcsv, .mrk.json) say whether they count right-anterior-superior (RAS) or left-posterior-superior
(LPS); a .csv file does where its columns are r, a, s or l, p, s, and not where they are x, y, z.
docs/your_data.md, "Points".
"""

import csv
import json
import re
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from scipy import ndimage

from extras.errors import expect, reading
from extras.files import atomic_write
from utils import in_view, invert_points, jacobian_determinant, map_points

SUFFIXES = (".fcsv", ".mrk.json", ".csv")
SIGNS = {"RAS": np.array([1, 1, 1]), "LPS": np.array([-1, -1, 1])}  # from a frame to RAS, and back
FRAMES = {"0": "RAS", "1": "LPS"}  # as old files say it
FCSV, STATUS = {1: "x", 2: "y", 3: "z", 11: "label"}, 14  # of its columns, which have no header


@dataclass
class PointFile:
    path: Path
    suffix: str
    frame: str  # of the file, RAS or LPS
    names: list[str]
    positions: np.ndarray  # (N, 3) mm, RAS
    content: object  # a DataFrame with a row for each point, or the JSON document
    columns: list[int] = ()  # of a table: those of the coordinates
    separator: str = ","
    decimal_comma: bool = False
    comments: str = ""  # the lines above a table


def parse_markups(text):
    """names, positions, frame and content of a .mrk.json file."""
    document = json.loads(text)
    if kinds := {markup.get("type") for markup in document["markups"]} & {"Plane", "ROI"}:
        raise ValueError(f"{min(kinds)}, which is more than its points")
    for markup in document["markups"]:  # a point that was not placed yet has no position
        placed = [p for p in markup["controlPoints"] if p.get("positionStatus", "defined") == "defined"]
        markup["controlPoints"] = placed
    (frame,) = {markup.get("coordinateSystem", "LPS") for markup in document["markups"]}
    entries = [point for markup in document["markups"] for point in markup["controlPoints"]]
    names = [str(entry.get("label") or entry.get("id", "")) for entry in entries]
    return names, [entry["position"] for entry in entries], frame, document


def parse_table(text, path):
    """names, positions, frame and the other fields of a PointFile, of a .csv or .fcsv file.

    The header's separator counts, and where it is no comma, decimal commas are read and written.
    """
    is_fcsv = str(path).lower().endswith(".fcsv")
    lines = text.splitlines(keepends=True)
    comments = "".join(takewhile(lambda line: line.startswith("#"), lines))
    lines = lines[comments.count("\n") :]
    first = next(filter(str.strip, lines), "")
    separator = "," if is_fcsv else next((mark for mark in "\t;, " if mark in first), ",")
    rows = [row for row in csv.reader(lines, delimiter=separator, skipinitialspace=True) if any(row)]
    header = [FCSV.get(k, f"column {k}") for k in range(max([16, *map(len, rows)]))] if is_fcsv else rows.pop(0)
    if any(any(row[len(header) :]) for row in rows):
        raise ValueError("a row with more cells than the header")
    rows = [(row + [""] * len(header))[: len(header)] for row in rows]
    if is_fcsv:
        rows = [row for row in rows if row[STATUS] in ("", "2")]  # 2: placed
    short = [re.sub(r"[ _]*[(\[]?mm[)\]]?$", "", name.strip().lower()) for name in header]  # "X (mm)" is x
    known = [axes for axes in ("xyz", "ras", "lps") if all(short.count(axis) == 1 for axis in axes)]
    expect(len(known) == 1, f"{path}: columns", ", ".join(header), "x, y, z or r, a, s or l, p, s")
    columns = [short.index(axis) for axis in known[0]]
    cells = [[row[k] for k in columns] for row in rows]
    decimal_comma = separator != "," and any("," in cell for row in cells for cell in row)
    if decimal_comma:
        cells = [[cell.replace(",", ".") for cell in row] for row in cells]
    said = {known[0].upper()} if known[0] != "xyz" else set()
    said |= {FRAMES.get(word, word) for word in re.findall(r"CoordinateSystem *= *(\w+)", comments)[-1:]}
    expect(len(said) <= 1, f"{path}: coordinates", " and ".join(sorted(said)), "one frame")
    title = next((short.index(word) for word in ("name", "label") if word in short), None)
    names = [str(number) if title is None else row[title] for number, row in enumerate(rows)]
    content = pd.DataFrame(rows, columns=range(len(header))) if is_fcsv else pd.DataFrame(rows, columns=header)
    return names, cells, min(said, default=None), content, columns, separator, decimal_comma, comments


def read_points(path, frame="file"):
    """A PointFile; frame: "RAS" or "LPS", or "file" for what the file says of itself."""
    suffix = next((suffix for suffix in SUFFIXES if str(path).lower().endswith(suffix)), None)
    expect(suffix, path, "another ending", ", ".join(SUFFIXES))
    form = "a header with x, y, z and a row for each point" if suffix == ".csv" else f"points as in {suffix} files"
    with reading(path, form):
        text = Path(path).read_text(encoding="utf-8-sig")
        names, positions, said, *content = parse_markups(text) if suffix == ".mrk.json" else parse_table(text, path)
        positions = np.array(positions, float)
    is_good = positions.size and positions.shape[1:] == (3,) and np.isfinite(positions).all()
    expect(is_good, path, f"{len(positions)} points", "one or more of three numbers in mm")
    frame = said if frame == "file" else frame
    expect(said in (None, frame), path, f"coordinates in {said}", f"{frame}; leave --points_frame out")
    expect(frame in SIGNS, path, "no frame of coordinates", "RAS or LPS; name it with --points_frame")
    return PointFile(Path(path), suffix, frame, names, positions * SIGNS[frame], *content)


def write_points(path, file, positions, keep):
    """Another file like `file`, of those points that `keep` (N,) marks, at `positions` (N, 3) mm, RAS."""
    positions, keep = (positions * SIGNS[file.frame]).round(4), np.array(keep, bool)
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        if file.suffix == ".mrk.json":
            moved = iter(zip(positions.tolist(), keep, strict=True))
            markups = []
            for markup in file.content["markups"]:
                entries = [(entry, *next(moved)) for entry in markup["controlPoints"]]
                entries = [entry | {"position": position} for entry, position, kept in entries if kept]
                markups.append(markup | {"controlPoints": entries})
            json.dump(file.content | {"markups": markups}, stream, indent=2)
        else:
            table, decimal = file.content.copy(), "," if file.decimal_comma else "."
            for column, values in zip(file.columns, positions.T, strict=True):
                table.isetitem(column, values)
            stream.write(file.comments)
            layout = {"sep": file.separator, "decimal": decimal, "lineterminator": "\n", "index": False}
            table[keep].to_csv(stream, header=file.suffix == ".csv", **layout)


def transfer_points(file, folder, points_on, moving, fixed, ddf, fixed_grid, moving_grid, offset):
    """Write the points of `file` where they lie in the other image; name those out of view, folded or not inverted.

    ddf, fixed_grid, moving_grid, offset: as of utils.displacement_on.
    """
    if points_on == "moving":
        on_moving = nib.affines.apply_affine(np.linalg.inv(moving_grid), file.positions)
        on_fixed = invert_points(on_moving, ddf, offset)
    else:
        on_fixed = nib.affines.apply_affine(np.linalg.inv(fixed_grid), file.positions)
        on_moving = map_points(on_fixed, ddf, offset)
    residual = np.linalg.norm((map_points(on_fixed, ddf, offset) - on_moving) @ moving_grid[:3, :3].T, axis=-1)
    folded = ndimage.map_coordinates(jacobian_determinant(ddf), on_fixed.T, order=1, mode="nearest") <= 0
    seen = in_view(on_fixed, ddf.shape[:3]) & (residual < 0.1) & ~folded
    other = {"moving": "fixed", "fixed": "moving"}[points_on]
    sides = {"moving": (moving, moving_grid, on_moving), "fixed": (fixed, fixed_grid, on_fixed)}
    world = {side: nib.affines.apply_affine(grid, points) for side, (_, grid, points) in sides.items()}
    for side, (volume, _, _) in sides.items():
        seen &= in_view(nib.affines.apply_affine(np.linalg.inv(volume.affine), world[side]), volume.image.shape)
    path = folder / f"{file.path.name[: -len(file.suffix)]}_on_{other}{file.suffix}"
    write_points(path, file, world[other], seen)
    for name in np.array(file.names)[~seen]:
        where = "outside the field of view, or where the field folds or is not inverted to 0.1 mm"
        print(f"warning: point {name} lies {where}, and is left out")
    error = f", error of the inversion at most {residual[seen].max(initial=0):.4f} mm" if other == "fixed" else ""
    print(f"{path}: {seen.sum()} points{error}")
