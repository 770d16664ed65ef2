"""From the measures of single cases to one table and one picture; and the folds of a cross-validation gathered.

    python results.py output_0 output_1 output_2 --output_dir results

takes folders that inference.py wrote, of different patients, and writes the same three files for all of them together:
metrics.csv, summary.txt, boxplot.png. README, "Reading the metrics".
"""

import argparse
import csv
from pathlib import Path
from statistics import fmean

import numpy as np

import config as settings
import helpers
import pictures

MEASURES = {  # name in metrics.csv -> title, each before and after registration
    "dice_{}": "gland Dice",
    "hd95_{}_mm": "gland HD95, mm",
    "tre_{}_mm": "landmark TRE, mm",
    "rms_tre_{}_mm": "RMS TRE of a pair, mm",
    "true_error_{}_mm": "true error in the gland, mm",
}
TIMES = "before", "after"
COLUMNS = ["case", "label", *(name.format(when) for name in MEASURES for when in TIMES), "folded_percent"]


def main():
    parser = argparse.ArgumentParser(description="Gather what inference.py measured, as of the folds of a run.")
    parser.add_argument("folders", nargs="+", help="each the --output_dir of one run")
    parser.add_argument("--output_dir", default="results", help="made if missing")
    words = parser.parse_args()
    rows, seen = [], {}
    for folder in words.folders:
        found = read(Path(folder) / "metrics.csv")
        cases = {row["case"] for row in found}
        if twice := cases & seen.keys():
            case = min(twice)
            raise settings.InputError(f"{folder}: case {case} is in {seen[case]} too; expected each case once")
        seen |= dict.fromkeys(cases, folder)
        rows += found
    if Path(words.output_dir).resolve() in [Path(folder).resolve() for folder in words.folders]:
        raise settings.InputError(f"--output_dir: found {words.output_dir}, expected none of those gathered")
    print(save(helpers.make_folder(words.output_dir), rows), end="")


def read(path):
    """The rows of a metrics.csv: {column: number}, and the case's name; columns that are empty are left out."""
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows = [{name: text for name, text in row.items() if text} for row in reader]
        if not rows or not set(COLUMNS) <= set(reader.fieldnames) or not all("case" in row for row in rows):
            raise ValueError("found no rows with its columns")
        kinds = {"case": str, "label": int}
        rows = [{name: kinds.get(name, float)(text) for name, text in row.items()} for row in rows]
        summary(rows)  # which raises what it misses
        return rows
    except OSError as error:
        raise settings.InputError(f"{path}: {error.strerror}; expected the metrics.csv of inference.py") from None
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        raise settings.InputError(f"{path}: {error}; expected the metrics.csv of inference.py") from None


def save(folder, rows):
    """Write metrics.csv, summary.txt and boxplot.png of these rows, one per label; returns the summary."""
    text, measured = summary(rows), values(rows)
    helpers.write_csv(folder / "metrics.csv", [{name: row.get(name, "") for name in COLUMNS} for row in rows])
    with helpers.written_aside(folder / "summary.txt") as aside:
        aside.write_text(text)
    (folder / "boxplot.png").unlink(missing_ok=True)  # an earlier run may have had labels
    if measured:
        pictures.plot_boxes(folder / "boxplot.png", measured)
    return text


def values(rows):
    """What was measured: title -> (values before, values after). TRE has one for each landmark, the others for a pair.

    A landmark that was warped out of the field of view has the value NaN.
    """
    result = {}
    for name, title in MEASURES.items():
        before, after = (
            np.array([row[name.format(when)] for row in rows if name.format(when) in row and counts(row, name)])
            for when in TIMES
        )
        if before.size:
            result[title] = before, after
    return result


def counts(row, name):
    """TRE is of landmarks, all else of the gland, label 0."""
    return (row["label"] != 0) == name.startswith("tre")


def rms_tre(landmarks):
    """The RMS TRE of a pair as entries of its first row; from the rows of its landmarks, those out of view left out."""
    names = [(f"rms_tre_{when}_mm", np.array([row[f"tre_{when}_mm"] for row in landmarks])) for when in TIMES]
    return {name: np.sqrt(np.mean(known(tre) ** 2)) for name, tre in names if tre.size}


def line(rows):
    """The measures of one pair in a line: its name, and each median before and after."""
    medians = {title: [np.median(known(measured)) for measured in both] for title, both in values(rows).items()}
    return "; ".join([rows[0]["case"], *("{} {:.2f} to {:.2f}".format(title, *m) for title, m in medians.items())])


def known(measured):
    """The values less those of what was lost; a single NaN where nothing is left."""
    left = measured[~np.isnan(measured)]
    return left if left.size else np.array([np.nan])


def summary(rows):
    """Median [quartiles] and worst of each measure, before and after, as text."""
    lines = [f"{len({row['case'] for row in rows})} pairs: median [quartiles] worst{'before':>15}{'after':>29}"]
    for title, both in values(rows).items():
        worst = np.min if "Dice" in title else np.max
        cells = []
        for measured in map(known, both):
            low, middle, high = np.percentile(measured, [25, 50, 75])
            cells.append(f"{middle:.2f} [{low:.2f} {high:.2f}] {worst(measured):.2f}")
        lines.append(f"{title:<30}{cells[0]:>29}{cells[1]:>29}")
    landmarks = [row for row in rows if "tre_after_mm" in row and counts(row, "tre")]
    if landmarks:
        lost = [row for row in landmarks if np.isnan(row["tre_after_mm"])]
        lines.append(f"landmarks warped out of the field of view, in no TRE: {len(lost)} of {len(landmarks)}")
        lines += [f"  {row['case']}, label {row['label']}" for row in lost]
    gone = [row["case"] for row in rows if np.isnan(row.get("hd95_after_mm", 0))]
    if gone:
        lines.append(f"glands warped out of the field of view, in no HD95: {', '.join(gone)}")
    folded = [row["folded_percent"] for row in rows if "folded_percent" in row]
    lines.append(f"voxels folded: {fmean(folded):.4f} % on average, {max(folded):.4f} % at worst")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    settings.run(main)
