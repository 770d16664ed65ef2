"""The benchmark compares like with like, and its growth runs."""

import json
import subprocess
import sys

import benchmark
import numpy as np
import SimpleITK
from conftest import ROOT


def test_every_warp_of_the_benchmark_gives_the_same_volume():
    ours = benchmark.ours("warp, value", 0)()[..., 0]
    theirs = {
        "SciPy": np.stack(benchmark.scipy("warp, value", 0)()),
        "SimpleITK": np.stack([SimpleITK.GetArrayFromImage(i).T for i in benchmark.sitk("warp, value", 0)()]),
    }
    assert 0.01 < ours.mean() < 0.1 and len(np.unique(ours)) > 1000
    for name, warped in theirs.items():
        np.testing.assert_allclose(ours, warped, atol=1e-4, err_msg=name)


def test_the_training_step_of_the_benchmark_is_the_one_that_learns(monkeypatch):
    monkeypatch.setattr(benchmark, "GRID", (16, 16, 16))
    monkeypatch.setattr(benchmark, "SCALES", (0, 1))
    step = benchmark.ours("training step", 2)
    losses = [float(step()) for _ in range(30)]
    assert 0 < losses[-1] < losses[0] < 1.1


def test_operations_of_one_layer_are_counted_by_hand():
    """First convolution: 3x3x3, stride 2, 2 to 8 channels, one gradient; five of its level: 8 to 8, both gradients."""
    first = 2 * 2 * 4 * np.prod(benchmark.GRID) / 8 * 3**3 * 2 * 8
    assert (1 + 5 * 6) * first < benchmark.convolution_operations(8) < 100 * first


def test_growth_of_a_small_case():
    changes = {"cores": 1, "fixed_shape": [8] * 3, "moving_shape": [8] * 3, "cases": 3, "labels": 2}
    changes |= {"network": "local", "channels": 2, "similarity_scales": [0]}  # quick to trace
    words = [sys.executable, ROOT / "tests" / "benchmark.py", "point", json.dumps(changes)]
    done = subprocess.run(words, capture_output=True, text=True)
    point = json.loads(done.stdout.split("\n")[-2])
    assert 0 < point["seconds"] < 60 and 0.1 < point["memory"] < 5
