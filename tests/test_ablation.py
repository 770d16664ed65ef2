"""The ablation: labels are left out of copies, the scripts are called with the right words, one table comes of it."""

import pandas as pd
from rubbish import QUICK, TINY

import inference
import train
from extras import ablation, files


def test_one_of_its_networks_small(example, tmp_path, call, monkeypatch):
    asked = []

    def here(script, *words):
        asked.append(list(map(str, words)))
        status, _, err = call({"train.py": train, "inference.py": inference}[script], *words)
        assert status == 0, err

    monkeypatch.setattr(ablation, "call", here)
    monkeypatch.setattr(ablation, "RUNS", {"two labels, one scale": (2, ["--similarity_scales", "0"])})
    monkeypatch.setattr("sys.argv", ["ablation.py", *TINY, *QUICK, "--steps", "1"])
    ablation.main(tmp_path / "work", example, tmp_path / "ablation.csv")
    (row,) = pd.read_csv(tmp_path / "ablation.csv").to_dict("records")
    assert row["network taught with"] == "two labels, one scale"
    assert 0.1 < row["true error in the gland, mm"] < 30 and 0 < row["gland Dice"] < 1
    copies = list((tmp_path / "work").glob("*/*/moving_labels/*"))
    assert len(copies) == 4 and {files.read_nifti(path)[0].shape[-1] for path in copies} == {2}
    training, registration = asked
    assert "--steps 1 --similarity_scales 0 --train_dir" in " ".join(training)
    assert registration[registration.index("--test_dir") + 1] == str(example / "test")  # with all of its labels
