"""Cross-validation by patients: hold one fold out, and gather what inference.py measured on all folds.

    python extras/cross_validation.py output_0 output_1 output_2 --output_dir results

takes folders that inference.py wrote, of different patients, and writes the same three files for all of them together:
metrics.csv, summary.txt, boxplot.png. README, "Reading the metrics".
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from extras import report
from extras.errors import InputError, expect, run
from extras.files import ensure_writable_dir, write_csv
from helpers import read_patients

PATIENTS_NAME = "trained_patients.csv"


def split_fold(pairs, folds, fold):
    """Deal the patients into `folds` groups; (pairs of the others, pairs of group `fold`); 0 folds: (all, none)."""
    if not folds:
        return pairs, []
    patients = sorted({pair.patient for pair in pairs})
    expect(len(patients) >= folds, "--folds", f"{len(patients)} patients", f"at least {folds}")
    order = np.random.default_rng(0).permutation(len(patients))
    held_out = {patients[index] for index in order[fold::folds]}
    return [p for p in pairs if p.patient not in held_out], [p for p in pairs if p.patient in held_out]


def write_patients(model_dir, pairs):
    """Write down which cases, of which patients, a model is trained on."""
    write_csv(model_dir / PATIENTS_NAME, [{"case": pair.case, "patient": pair.patient} for pair in pairs])


def check_same_patients(model_dir, pairs):
    """A training must be resumed on the pairs that it began with."""
    path = Path(model_dir) / PATIENTS_NAME
    changed = read_patients(path).items() ^ {pair.case: pair.patient for pair in pairs}.items()
    if changed:
        case, patient = min(changed)
        raise InputError(f"{path}: case {case} of patient {patient} came or went since; expected the same data set")


def held_out(pairs, config, model_dir):
    """The pairs of the fold that a training held out. None may be of a patient whom the model was trained on.

    Where cases came or went since the training, the patients are dealt into other folds.
    """
    _, pairs = split_fold(pairs, config.folds, config.fold)
    path = Path(model_dir) / PATIENTS_NAME
    seen = {pair.patient for pair in pairs} & set(read_patients(path).values())
    expect(not seen, path, f"patient {min(seen, default='')}", "none held out; has the data set changed?")
    return pairs


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="each the --output_dir of one run")
    parser.add_argument("--output_dir", type=Path, default="results", help="made if missing")
    args = parser.parse_args()
    tables = [report.read_metrics(folder / "metrics.csv") for folder in args.folders]
    seen = {}
    for folder, table in zip(args.folders, tables, strict=True):
        for case in table["case"].unique():
            expect(case not in seen, folder, f"case {case}, which is in {seen.get(case)} too", "each case once")
            seen[case] = folder
    gathered = [folder.resolve() for folder in args.folders]
    expect(args.output_dir.resolve() not in gathered, "--output_dir", args.output_dir, "none of those gathered")
    print(report.save_metrics(ensure_writable_dir(args.output_dir), pd.concat(tables)), end="")


if __name__ == "__main__":
    run(main)
