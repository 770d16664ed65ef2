"""Metrics: the table and the picture of a run, and the folds of a cross-validation gathered."""

import warnings

import numpy as np
import pandas as pd
import pytest
import true_centroids

from extras import cross_validation, report


def case(name, dice, tre):
    """The metrics of one pair as inference.py makes them: the gland, then landmarks with these TREs afterwards."""
    gland = {"case": name, "label": 0, "dice_before": 0.5, "dice_after": dice, "tre_before_mm": 99.0}
    gland |= {"tre_after_mm": 98.0, "hd95_before_mm": 9.0, "hd95_after_mm": 3.0, "folded_percent": 0.25}
    gland |= {"rms_tre_before_mm": 10.0, "rms_tre_after_mm": pd.Series(tre).pow(2).mean() ** 0.5}
    landmarks = [
        {"case": name, "label": k, "dice_before": 0.0, "dice_after": 0.1, "tre_before_mm": 10.0, "tre_after_mm": value}
        | ({"lost": "outside the fixed image"} if np.isnan(value) else {})
        for k, value in enumerate(tre, start=1)
    ]
    return pd.DataFrame([gland, *landmarks], columns=report.COLUMNS)


def test_each_measure_counts_what_it_should():
    measured = report.measured(pd.concat([case("a", 0.8, [3.0, 4.0]), case("b", 0.9, [6.0])]))
    assert measured["gland Dice"]["after"].tolist() == [0.8, 0.9]  # no landmark among them
    assert measured["landmark TRE, mm"]["after"].tolist() == [3, 4, 6]  # no gland among them
    assert measured["RMS TRE of a pair, mm"]["after"].tolist() == pytest.approx([np.sqrt(12.5), 6])
    assert "true error in the gland, mm" not in measured


def test_a_lost_landmark_is_counted_and_in_no_tre():
    table = pd.concat([case("a", 0.8, [3.0, np.nan]), case("b", 0.9, [5.0])])
    text = report.summarise(table)
    assert "not in warped_labels.nii.gz: 1 of 5\n  a, label 2: outside the fixed image\n" in text
    assert "4.00 [3.50 4.50] 5.00" in text and "0.85 [0.83 0.88] 0.80" in text  # median [quartiles] and worst
    assert "TRE, mm 10.00 → 3.00" in report.summarise_pair("a", table[table["case"] == "a"])


def test_a_pair_that_lost_all_is_counted_without_a_warning():
    lost = case("b", 0.0, [np.nan]).assign(hd95_after_mm=np.nan, lost="outside the fixed image")
    with warnings.catch_warnings(action="error"):
        text = report.summarise(pd.concat([case("a", 0.8, [3.0, 5.0]), lost]))
        assert "landmark TRE, mm 10.00 → nan" in report.summarise_pair("b", lost)
    assert "2 of 5\n  b, label 0: outside the fixed image\n  b, label 1: outside the fixed image\n" in text
    assert "3.00 [3.00 3.00] 3.00" in text and "4.00 [3.50 4.50] 5.00" in text


def test_folds_are_gathered_as_if_they_had_been_one_run(tmp_path, call):
    folds = [case("a", 0.8, [3.0, np.nan]), pd.concat([case("b", 0.9, [6.0]), case("c", 0.7, [1.0])])]
    for number, table in enumerate(folds):
        (tmp_path / str(number)).mkdir()
        report.save_metrics(tmp_path / str(number), table)
    status, out, err = call(cross_validation, tmp_path / "0", tmp_path / "1", "--output_dir", tmp_path / "all")
    assert status == 0 and out == report.summarise(pd.concat(folds)), err
    assert out == (tmp_path / "all" / "summary.txt").read_text()
    assert (tmp_path / "all" / "boxplot.png").stat().st_size > 5000
    assert (tmp_path / "all" / "metrics.csv").read_text().count("\na,1,") == 1
    for again in ("all", "0"):
        status, _, err = call(cross_validation, tmp_path / "0", tmp_path / again, "--output_dir", tmp_path / "twice")
        assert status == 2 and "case a" in err and not (tmp_path / "twice").exists()
    status, _, err = call(cross_validation, tmp_path / "0", tmp_path / "1", "--output_dir", tmp_path / "1")
    assert status == 2 and err.startswith("error: --output_dir: found") and err.count("\n") == 1


COLUMNS = ",".join(report.COLUMNS)
NO_TABLES = [
    None,
    "",
    "case,label\na,1\n",
    "case,label\na,1,2,3\n",
    f"{COLUMNS}\n",
    f"{COLUMNS}\n,1\n",
    f"{COLUMNS}\na,b\n",
]


@pytest.mark.parametrize("text", NO_TABLES)
def test_what_is_no_table_of_measures_is_named(text, tmp_path, call):
    if text is not None:
        (tmp_path / "metrics.csv").write_text(text)
    status, _, err = call(cross_validation, tmp_path, "--output_dir", tmp_path / "all")
    assert status == 2 and err.startswith(f"error: {tmp_path / 'metrics.csv'}: ") and err.count("\n") == 1


def test_true_centroids_of_the_glands_lie_upon_each_other(example, tmp_path):
    true_centroids.main(["--train_dir", f"{example}/train", "--folds=3", "--fold=1", f"--output_dir={tmp_path}"])
    table = report.read_metrics(tmp_path / "metrics.csv")
    gland = table[table["label"] == 0]
    assert gland["case"].nunique() == 1
    assert (gland["tre_before_mm"] > 3).all() and (gland["tre_after_mm"] < 0.3).all()
