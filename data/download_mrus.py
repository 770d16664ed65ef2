"""Fetch the public MR/ultrasound pairs of the authors of Hu et al. 2018 into data/mrus/.

    python data/download_mrus.py

108 pairs of prostate patients, smoothed and downsampled to 1.5 mm, with labels of the gland and of landmarks. Their
source, https://github.com/YipengHu/example-data (branch mrus), states no licence: they are for research.

Some patients have several cases, and a split must not part them. Cases whose MR volumes correlate above 0.95 are of one
patient (those of one patient do above 0.995, others below 0.9); patients.csv says so, and train.py --folds goes by it.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from extras import devices  # noqa: F401  before TensorFlow

# isort: split
import keras
import numpy as np
from scipy.sparse.csgraph import connected_components

import helpers
from extras.errors import expect, reading, run
from extras.files import ensure_writable_dir, write_csv

URL = "https://github.com/YipengHu/example-data/archive/mrus.zip"


def fetch(url, folder):
    """Download and unpack an archive; returns the folder in it that holds a data set."""
    with reading(url, "a connection to it, try again"):
        keras.utils.get_file("mrus.zip", url, cache_dir=folder, cache_subdir="", extract=True, force_download=True)
    found = sorted(folder.rglob(helpers.FOLDERS[0]))
    expect(len(found) == 1, url, f"{len(found)} folders {helpers.FOLDERS[0]}", "one")
    return found[0].parent


def group_patients(pairs):
    """{case: patient}, from read pairs; patients are numbered in the order of their first case."""
    volumes = {pair.case: moving.image for pair, moving, _ in pairs}
    shapes = {volume.shape for volume in volumes.values()}
    expect(len(shapes) == 1, "moving_images", f"volumes of {len(shapes)} shapes", "one, to compare them")
    alike = np.atleast_2d(np.corrcoef([volume.ravel() for volume in volumes.values()])) > 0.95
    numbers = connected_components(alike)[1]
    return {case: f"patient{number:02d}" for case, number in zip(volumes, numbers, strict=True)}


def main(url=URL, folder=Path(__file__).parent / "mrus", cases=108):
    expect(not folder.exists(), folder, "a folder of this name", "none; delete it to fetch the data again")
    with tempfile.TemporaryDirectory(dir=ensure_writable_dir(folder.parent)) as aside:
        unpacked = fetch(url, Path(aside).resolve())
        pairs = helpers.find_pairs(unpacked)
        expect(len(pairs) == cases, url, f"{len(pairs)} cases", cases)
        patients = group_patients(helpers.read_pairs(pairs, "checking"))
        write_csv(unpacked / "patients.csv", [{"case": case, "patient": p} for case, p in patients.items()])
        unpacked.rename(folder)
    print(f"{folder}: {len(patients)} pairs of {len(set(patients.values()))} patients")
    print("Their source states no licence: they are for research, not to be passed on.")


if __name__ == "__main__":
    run(main)
