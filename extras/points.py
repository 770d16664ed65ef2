"""Points in mm as 3D Slicer and spreadsheets keep them: read, carried to the other image, written in the same format.

Files of 3D Slicer (.fcsv, .mrk.json) say whether they count right-anterior-superior (RAS) or left-posterior-superior
(LPS); a .csv file, with columns x, y and z, does not. README, "Points".
"""

import json
import re
import warnings
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from scipy import ndimage

from extras.errors import InputError, expect
from extras.files import atomic_write
from utils import in_view, invert_points, jacobian_determinant, map_points

SUFFIXES = (".fcsv", ".mrk.json", ".csv")
SIGNS = {"RAS": np.array([1, 1, 1]), "LPS": np.array([-1, -1, 1])}  # from a frame to RAS, and back
FCSV = [
    "id",
    "x",
    "y",
    "z",
    *(f"column{k}" for k in range(4, 11)),
    "label",
    "column12",
    "column13",
    "status",
    "column15",
]


@dataclass
class PointFile:
    path: Path
    suffix: str
    frame: str  # of the file, RAS or LPS
    names: list[str]
    positions: np.ndarray  # (N, 3) mm, RAS
    content: object  # a DataFrame with a row for each point, or the JSON document
    comments: str = ""  # the lines of an .fcsv file above its rows


def read_table(text, **options):
    """Comma-separated text as a DataFrame of strings. A row with more cells than the header is an error."""
    with warnings.catch_warnings(action="error"):
        return pd.read_csv(StringIO(text), dtype=str, keep_default_na=False, index_col=False, comment="#", **options)


def markup_points(document):
    return [point for markup in document["markups"] for point in markup["controlPoints"]]


def parse_points(text, suffix):
    """Names, positions, what the file says of its frame (or None), content and comments of a PointFile."""
    if suffix == ".mrk.json":
        document = json.loads(text)
        if kinds := {markup.get("type") for markup in document["markups"]} & {"Plane", "ROI"}:
            raise ValueError(f"{min(kinds)}, which is more than its points")
        for markup in document["markups"]:  # a point that was not placed yet has no position
            placed = [p for p in markup["controlPoints"] if p.get("positionStatus", "defined") == "defined"]
            markup["controlPoints"] = placed
        (frame,) = {markup.get("coordinateSystem", "LPS") for markup in document["markups"]}
        entries = markup_points(document)
        names = [str(entry.get("label") or entry.get("id", "")) for entry in entries]
        return names, [entry["position"] for entry in entries], frame, document, ""
    comments, frame = "", None
    if suffix == ".fcsv":
        comments = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
        frame = (re.findall(r"CoordinateSystem *= *(\w+)", comments) or [None])[-1]
        table = read_table(text, names=FCSV, header=None).fillna("")
        table = table[table["status"].isin(["", "2"])]  # 2: placed
    else:
        table = read_table(text)
    names = table.get("name", table.get("label", pd.Series(range(len(table))).astype(str)))
    return list(names), table[["x", "y", "z"]].to_numpy(), frame, table, comments


def read_points(path, frame="file"):
    """A PointFile; frame: "RAS" or "LPS", or "file" for what the file says of itself."""
    suffix = next((suffix for suffix in SUFFIXES if str(path).endswith(suffix)), None)
    expect(suffix, path, "another ending", ", ".join(SUFFIXES))
    try:
        names, positions, said, *content = parse_points(Path(path).read_text(encoding="utf-8-sig"), suffix)
        positions = np.array(positions, float)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a file of points") from None
    except Exception as error:  # there are many ways to write a wrong file
        form = "columns x, y, z separated by commas" if suffix == ".csv" else f"points as in {suffix} files"
        raise InputError(f"{path}: cannot be read ({' '.join(repr(error).split())}); expected {form}") from None
    is_good = positions.size and positions.shape[1:] == (3,) and np.isfinite(positions).all()
    expect(is_good, path, f"{len(positions)} points", "one or more of three numbers in mm")
    said = {"0": "RAS", "1": "LPS"}.get(said, said)
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
            table = file.content.assign(**dict(zip("xyz", positions.T, strict=True)))[keep]
            stream.write(file.comments)
            table.to_csv(stream, index=False, header=file.suffix == ".csv", lineterminator="\n")


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
    path = folder / f"{file.path.name.removesuffix(file.suffix)}_on_{other}{file.suffix}"
    write_points(path, file, world[other], seen)
    for name in np.array(file.names)[~seen]:
        where = "outside the field of view, or where the field folds or is not inverted to 0.1 mm"
        print(f"warning: point {name} lies {where}, and is left out")
    error = f", error of the inversion at most {residual[seen].max(initial=0):.4f} mm" if other == "fixed" else ""
    print(f"{path}: {seen.sum()} points{error}")
