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
from config import InputError, run


def main():
    if len(sys.argv) != 2:
        raise InputError(f"found {len(sys.argv) - 1} arguments, expected one, the folder of the pairs")
    folder, volumes = Path(sys.argv[1]), []
    paths = sorted((folder / "moving_images").glob("*.nii*"))
    for path in paths:
        volumes.append(helpers.read_image(path)[0].ravel())
        if volumes[-1].size != volumes[0].size:
            raise InputError(f"{path}: found {volumes[-1].size} voxels, expected {volumes[0].size} as in {paths[0]}")
    if len(volumes) < 2:
        raise InputError(f"{folder / 'moving_images'}: found {len(volumes)} volumes, expected two or more")
    _, patients = connected_components(np.corrcoef(volumes) > 0.95)
    rows = [{"case": helpers.case_name(p), "patient": f"patient{k:02d}"} for p, k in zip(paths, patients, strict=True)]
    helpers.write_csv(folder / "patients.csv", rows)
    print(f"{folder / 'patients.csv'}: {len(rows)} cases of {patients.max() + 1} patients")


if __name__ == "__main__":
    run(main)
