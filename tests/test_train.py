"""train.py, small: every option of a training and of the inference after it, and what a single step does."""

import csv
import shutil
import sys
import tempfile

import h5py
import numpy as np
import pytest
import tensorflow as tf
from rubbish import QUICK, TINY

import config
import inference
import train
from networks import build_network


@pytest.mark.parametrize(
    "options",
    [
        "--network local --similarity dice --regulariser bending --ddf_levels 0 2 4",
        "--network global --similarity cross-entropy --regulariser gradient-l2 --labels_per_pair 1",
        "--network composite --similarity mean-squared --regulariser gradient-l1 --mirror_axis -1",
        "--network centred --labels_per_pair 1 --similarity jaccard --similarity_scales 0 --cross_patient 0 --folds 3 "
        "--local_every 3 --refine_steps 0 --ddf_levels 3",
    ],
)
def test_every_option_trains_and_registers(options, folders, tmp_path, call):
    model, output = f"--model_dir={tmp_path / 'model'}", f"--output_dir={tmp_path / 'output'}"
    words = [*options.split(), *TINY, "--steps", 4, "--valid_every", 2]
    named = [word for word in folders if not ("--folds" in options and word.startswith("--test_dir"))]
    status, out, err = call(train, *words, *named, model)
    assert status == 0, err
    assert out.splitlines()[-1].endswith(f"next: {sys.executable} inference.py --model_dir {tmp_path / 'model'}")
    written = {path.name.split(".")[0] for path in (tmp_path / "model").iterdir()}
    assert written == {"config", "trained_patients", "best", "last", "checkpoint", "history", "events"}
    with open(tmp_path / "model" / "history.csv") as file:
        history = list(csv.DictReader(file))
    assert [row["step"] for row in history] == ["2", "4"]
    assert all(np.isfinite(float(value)) for row in history for value in row.values())

    status, out, err = call(inference, model, output)
    assert status == 0, err
    cases = {"train00", "train01", "train02"} if "--folds" in options else {"test00", "test01"}
    found = {path.name for path in (tmp_path / "output").iterdir()}
    assert found - cases == {"metrics.csv", "summary.txt", "boxplot.png", "report.html"}
    assert len(found & cases) == (1 if "--folds" in options else 2)


@pytest.mark.usefixtures("eagerly")
def test_weight_decay_takes_away_its_share(folders, tmp_path, call):
    """All of it, where it is the inverse of the learning rate: what is left is Adam's first step, the rate at most."""
    words = [*TINY, *QUICK, "--steps=1", "--learning_rate=1e-3", "--weight_decay=1000"]
    status, _, err = call(train, *words, folders[0], "--valid_dir=", f"--model_dir={tmp_path / 'model'}")
    assert status == 0, err
    with h5py.File(tmp_path / "model" / "last.weights.h5") as file:
        weights = []
        file.visititems(lambda name, entry: weights.append(np.abs(entry).max()) if hasattr(entry, "shape") else None)
    assert 0.99e-3 < max(weights) < 1.01e-3


@pytest.mark.usefixtures("eagerly")
def test_prepared_pairs_that_were_tidied_away_end_in_one_line(folders, tmp_path, call, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    make_steps = train.make_steps

    def tidy_up(*arguments):
        (scratch,) = tmp_path.glob("prepared-pairs-*")
        shutil.rmtree(scratch)
        return make_steps(*arguments)

    monkeypatch.setattr(train, "make_steps", tidy_up)
    status, _, err = call(train, *TINY, *QUICK, "--steps=2", folders[0], "--valid_dir=", f"--model_dir={tmp_path}/m")
    (line,) = [line for line in err.splitlines() if line.startswith("error")]
    assert status == 2 and f"{tmp_path}/prepared-pairs-" in line and "TMPDIR" in line


@pytest.mark.usefixtures("eagerly")
@pytest.mark.parametrize("alike", [True, False])
def test_a_pair_turned_and_bent_alike_needs_no_field(monkeypatch, alike):
    """Images and labels of both sides, and the labels that the field warps, are moved by one and the same map."""
    shape = (16, 18, 20)
    words = {"network": "local", "channels": 2, "first_kernel": 3, "similarity_scales": (0.0,)}
    settings = config.Config(moving_shape=shape, fixed_shape=shape, batch_size=2, intensity_augmentation=0, **words)
    affine = np.array([[[1.1, 0.1, 0, 1], [-0.1, 0.9, 0.1, -1], [0, 0.1, 1, 0.5]]] * 2, np.float32)
    index = np.indices(shape, np.float32)
    bend = 1.5 * np.stack([np.sin(index[(k + 1) % 3] / 4 + k) for k in range(3)], axis=-1)[None]
    bends = [bend, bend if alike else -bend]

    def smooth(seed, number, shape, places, channels, amount):
        return tf.zeros((number, *shape, channels)) + (bends.pop(0) if channels == 3 else 0)

    monkeypatch.setattr(train, "random_affine", lambda *drawn: tf.constant(affine))
    monkeypatch.setattr(train, "random_smooth", smooth)
    network = build_network(settings)  # its field is zero at first
    optimizer = tf.keras.optimizers.Adam()
    optimizer.build(network.trainable_variables)
    step, _ = train.make_steps(settings, network, optimizer)
    ball = (np.linalg.norm(np.moveaxis(index, 0, -1) - (9, 8, 10), axis=-1) < 4).astype(np.float32)
    label = np.repeat(ball[None, ..., None], 2, axis=0)
    sides = {f"{side}_{what}": label for side in ("moving", "fixed") for what in ("image", "labels")}
    result = step(tf.constant(1), **sides, mask=np.ones((2, 1), np.float32))
    assert (result["dice"] > 0.999 and result["similarity"] < 1e-4) if alike else result["dice"] < 0.9


@pytest.mark.usefixtures("eagerly")
def test_a_step_that_does_not_teach_all_teaches_the_search_alone(rng):
    shape = (12, 12, 12)
    quick = {"channels": 2, "search_channels": (2, 2), "ddf_levels": (3,), "similarity_scales": (0,)}
    settings = config.Config(moving_shape=shape, fixed_shape=shape, first_kernel=3, **quick)
    network = build_network(settings)
    maps = [output for name, output in network.output.items() if name != "ddf"]
    search = {weight.path for weight in tf.keras.Model(network.inputs, maps).trainable_variables}
    optimizer = tf.keras.optimizers.Adam(0.01)
    optimizer.build(network.trainable_variables)
    step, _ = train.make_steps(settings, network, optimizer)
    images, labels = (rng.random((4, *shape, 1)).astype(np.float32) for _ in range(2))
    batch = {f"{side}_image": images for side in ("moving", "fixed")} | {"mask": np.ones((4, 1), np.float32)}
    batch |= {f"{side}_labels": labels for side in ("moving", "fixed")}

    def taught_by(number, teaches_all):
        before = {weight.path: weight.numpy() for weight in network.trainable_variables}
        step(tf.constant(number), teaches_all, **batch)
        return {weight.path for weight in network.trainable_variables if np.any(weight != before[weight.path])}

    step(tf.constant(1), True, **batch)  # from here on no weight is held at zero
    assert taught_by(2, False) == search
    assert taught_by(3, True) > search
