"""What each part of the method is worth, judged by the true displacement of the example data.

    python extras/ablation.py                 trains six networks, each as long as the default run
    python extras/ablation.py --steps 600     flags of train.py go to all of them

The first three see fewer or more labels, the others one smoothing scale, or one half of the network, with all labels.
All are measured on the same test patients, over the whole gland. Works in ablation/; writes media/ablation.csv.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from config import EXAMPLE_DIR, TrainConfig, parse_config
from extras import report
from extras.errors import expect, run
from extras.files import read_nifti, write_csv, write_nifti

RUNS = {  # name: how many of each pair's labels are kept (None: all), and the words for train.py
    "gland": (1, []),
    "gland and transition zone": (2, []),
    "all labels": (None, []),
    "all labels, one smoothing scale": (None, ["--similarity_scales", "0"]),
    "all labels, LocalNet alone": (None, ["--network", "local"]),
    "all labels, GlobalNet alone": (None, ["--network", "global"]),
}


def call(script, *words):
    subprocess.run([sys.executable, ROOT / script, *map(str, words)], check=True)


def main(folder=Path("ablation"), data=EXAMPLE_DIR, table_path=ROOT / "media" / "ablation.csv"):
    expect(data.exists(), data, "no example data", "them; run data/make_example_data.py")
    expect(not folder.exists(), folder, "an earlier ablation", "none; delete it to train anew")
    parse_config(TrainConfig)  # a wrong flag is told now
    rows, for_all = [], sys.argv[1:]
    for name, (count, words) in tqdm(RUNS.items(), "ablation", unit="network", disable=None):
        place = folder / name.replace(", ", "-").replace(" ", "_")
        for split in ("train", "valid"):
            shutil.copytree(data / split, place / split, ignore=shutil.ignore_patterns("true_displacement"))
        for path in place.glob("*/*_labels/*") if count else ():
            labels, affine = read_nifti(path)
            write_nifti(path, labels[..., :count].astype("uint8"), affine)
        folders = ["--train_dir", place / "train", "--valid_dir", place / "valid"]
        call("train.py", *for_all, *words, *folders, "--model_dir", place / "model")
        model, output = ["--model_dir", place / "model"], ["--output_dir", place / "output"]
        call("inference.py", *model, *output, "--test_dir", data / "test")
        measures = report.measured(report.read_metrics(place / "output" / "metrics.csv"))
        medians = {title: values["after"].median().round(3) for title, values in measures.items()}
        rows.append({"network taught with": name} | medians)
    write_csv(table_path, rows)
    print(pd.DataFrame(rows).to_string(index=False))


if __name__ == "__main__":
    run(main)
