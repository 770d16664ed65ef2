"""Points in mm as 3D Slicer and spreadsheets keep them: read, moved, and written in the same format.

Files of 3D Slicer (.fcsv, .mrk.json) say whether they count right-anterior-superior (RAS) or left-posterior-superior
(LPS); a .csv file, with columns x, y and z, does not. README, "Points".
"""

import csv
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import InputError
from helpers import written_aside

SUFFIXES = (".fcsv", ".mrk.json", ".csv")
SIGNS = {"RAS": np.array([1, 1, 1]), "LPS": np.array([-1, -1, 1])}  # from a frame to RAS, and back


@dataclass
class PointFile:
    names: list[str]
    positions: np.ndarray  # (N, 3) mm, RAS
    frame: str  # of the file, RAS or LPS
    stem: str
    suffix: str
    entries: list  # one of each point, as the format has it
    document: object  # what the file holds beside


def read_points(path, frame="file"):
    """A PointFile; frame: "RAS" or "LPS", or "file" for what the file says of itself."""
    suffix = next((suffix for suffix in SUFFIXES if str(path).endswith(suffix)), None)
    if not suffix:
        raise InputError(f"{path}: found another ending, expected {', '.join(SUFFIXES)}")
    try:
        text, said = Path(path).read_text(encoding="utf-8-sig"), None
        if suffix == ".fcsv":
            document = [line for line in text.splitlines() if line.startswith("#")]
            entries = list(csv.reader(line for line in text.splitlines() if line and line not in document))
            entries = [entry for entry in entries if entry[14:15] in ([], [""], ["2"])]  # 2: placed
            said = (re.findall(r"CoordinateSystem *= *(\w+)", text) or [None])[-1]
            positions = [entry[1:4] for entry in entries]
            names = [entry[11] if len(entry) > 11 else entry[0] for entry in entries]
        elif suffix == ".mrk.json":
            document = json.loads(text)
            if kinds := {markup.get("type") for markup in document["markups"]} & {"Plane", "ROI"}:
                raise ValueError(f"{min(kinds)}, which is more than its points")
            for markup in document["markups"]:  # a point that was not placed yet has no position
                placed = [p for p in markup["controlPoints"] if p.get("positionStatus", "defined") == "defined"]
                markup["controlPoints"] = placed
            entries = [point for markup in document["markups"] for point in markup["controlPoints"]]
            (said,) = {markup.get("coordinateSystem", "LPS") for markup in document["markups"]}
            positions = [entry["position"] for entry in entries]
            names = [str(entry.get("label") or entry.get("id", "")) for entry in entries]
        else:
            reader = csv.DictReader(io.StringIO(text))
            document, entries = reader.fieldnames, list(reader)
            if any(None in entry for entry in entries):
                raise ValueError("a row has more cells than the header")
            positions = [[entry[axis] for axis in "xyz"] for entry in entries]
            names = [entry.get("name") or entry.get("label") or str(number) for number, entry in enumerate(entries)]
        positions = np.array(positions, float)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a file of points") from None
    except Exception as error:  # there are many ways to write a wrong file
        form = "columns x, y, z separated by commas" if suffix == ".csv" else f"points as in {suffix} files"
        raise InputError(f"{path}: cannot be read ({error!r}); expected {form}") from None
    if positions.shape[1:] != (3,) or not np.isfinite(positions).all():
        raise InputError(f"{path}: found {len(positions)} points, expected one or more of three numbers in mm")
    said = {"0": "RAS", "1": "LPS"}.get(said, said)
    frame = said if frame == "file" else frame
    if said in SIGNS and said != frame:
        raise InputError(f"{path}: found coordinates in {said}, expected {frame}; leave --points_frame out")
    if frame not in SIGNS:
        raise InputError(f"{path}: found no frame of coordinates that is RAS or LPS; name it with --points_frame")
    return PointFile(
        names, positions * SIGNS[frame], frame, Path(path).name.removesuffix(suffix), suffix, entries, document
    )


def write_points(path, file, positions, keep):
    """Another file like `file`, of those points that `keep` (N,) marks, at `positions` (N, 3) mm, RAS."""
    moved = []
    positions = (positions * SIGNS[file.frame]).round(4).tolist()
    for entry, position, kept in zip(file.entries, positions, keep, strict=True):
        if file.suffix == ".fcsv":
            entry = [*entry[:1], *position, *entry[4:]]
        elif file.suffix == ".mrk.json":
            entry = entry | {"position": position}
        else:
            entry = entry | dict(zip("xyz", position, strict=True))
        moved.append(entry if kept else None)
    with written_aside(path) as aside, open(aside, "w", newline="", encoding="utf-8") as stream:
        if file.suffix == ".mrk.json":
            following, markups = iter(moved), []
            for markup in file.document["markups"]:
                points = [next(following) for _ in markup["controlPoints"]]
                markups.append(markup | {"controlPoints": [point for point in points if point]})
            json.dump(file.document | {"markups": markups}, stream, indent=2)
        elif file.suffix == ".fcsv":
            stream.writelines(f"{line}\n" for line in file.document)
            csv.writer(stream, lineterminator="\n").writerows(entry for entry in moved if entry)
        else:
            writer = csv.DictWriter(stream, file.document)
            writer.writeheader()
            writer.writerows(entry for entry in moved if entry)
