"""Which pairs of the public clinical data are of one patient: their MR volumes are alike.

    python tests/group_patients.py mrus

writes mrus/patients.csv, without which a split has the same patient's MR on both sides. Volumes of one patient
correlate above 0.995, those of others below 0.9. Patients are numbered in the order of their first case.
"""

import sys
from pathlib import Path

import numpy as np
from scipy.sparse.csgraph import connected_components

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import helpers
from extras import files
from extras.errors import InputError, run


def main():
    if len(sys.argv) != 2:
        raise InputError(f"found {len(sys.argv) - 1} arguments, expected one, the folder of the pairs")
    table, volumes = Path(sys.argv[1]) / "patients.csv", []
    if table.exists():
        raise InputError(f"{table}: is there already, expected none; delete it to have it made anew")
    pairs = helpers.find_pairs(table.parent)
    for pair in pairs:
        volumes.append(helpers.read_image(pair.moving_image).image.ravel())
        found, expected = volumes[-1].size, volumes[0].size
        if found != expected:
            message = f"{pair.moving_image}: found {found} voxels, expected {expected} as in {pairs[0].moving_image}"
            raise InputError(message)
    _, patients = connected_components(np.atleast_2d(np.corrcoef(volumes)) > 0.95)
    rows = [{"case": p.case, "patient": f"patient{k:02d}"} for p, k in zip(pairs, patients, strict=True)]
    files.write_csv(table, rows)
    print(f"{table}: {len(rows)} cases of {patients.max() + 1} patients")


if __name__ == "__main__":
    run(main)
