"""train.py, small: every option of a training and of the inference after it, and what a single step does."""

import csv
import os
import sys
import tempfile

import h5py
import numpy as np
import pytest
import tensorflow as tf
from rubbish import QUICK, SMALL, TINY

import config
import helpers
import inference
import train
from extras.optimizer import STEP_SIZE
from networks import NETWORKS


@pytest.mark.parametrize(
    "options",
    [
        "--network local --similarity dice --regulariser bending --initial_alignment header",
        "--network global --similarity cross-entropy --regulariser gradient-l2 --labels_per_pair 1",
        "--network composite --similarity mean-squared --regulariser gradient-l1 --mirror_axis -1 --dropout 0.3",
        "--network local --labels_per_pair 1 --similarity jaccard --similarity_scales 0 --inter_subject_fraction 0 "
        "--folds 3 --elastic_augmentation 2",
    ],
)
def test_every_option_trains_and_registers(options, example, folders, tmp_path, call):
    model, output = f"--model_dir={tmp_path / 'model'}", f"--output_dir={tmp_path / 'output'}"
    words = [*options.split(), *TINY, "--steps", 4, "--valid_every", 2]
    status, out, err = call(train, *words, *folders, model)
    assert status == 0, err
    assert out.startswith("computing on the CPU, ")
    command = f"{sys.executable} {os.path.relpath(inference.__file__)} --model_dir {tmp_path / 'model'}"
    files = "" if "--folds" in options else " --moving FILE --fixed FILE"
    assert out.splitlines()[-1].endswith(f"next: {command}{files}")
    written = {path.name.split(".")[0] for path in (tmp_path / "model").iterdir()}
    assert written == {"config", "trained_patients", "best", "last", "checkpoint", "history", "events"}
    with open(tmp_path / "model" / "history.csv") as file:
        history = list(csv.DictReader(file))
    assert [row["step"] for row in history] == ["2", "4"]
    assert all(np.isfinite(float(value)) for row in history for value in row.values())

    test_dir = [] if "--folds" in options else [f"--test_dir={example / 'test'}"]
    status, out, err = call(inference, model, output, *test_dir)
    assert status == 0, err
    cases = {"train00", "train01", "train02"} if "--folds" in options else {"test00", "test01"}
    found = {path.name for path in (tmp_path / "output").iterdir()}
    assert found - cases == {"metrics.csv", "summary.txt", "boxplot.png", "report.html"}
    assert len(found & cases) == (1 if "--folds" in options else 2)


@pytest.mark.usefixtures("eagerly")
def test_weight_decay_takes_away_its_share(folders, tmp_path, call, monkeypatch):
    """All of it, where it is the inverse of the learning rate: what is left is the optimizer's first step."""
    monkeypatch.setattr(train, "WEIGHT_DECAY", 1000)
    words = [*TINY, *QUICK, "--steps=1", "--learning_rate=1e-3"]
    status, _, err = call(train, *words, folders[0], "--valid_dir=", f"--model_dir={tmp_path / 'model'}")
    assert status == 0, err
    with h5py.File(tmp_path / "model" / "last.weights.h5") as file:
        sizes = []
        file.visititems(
            lambda name, entry: (
                sizes.append(np.std(entry)) if "kernel" in name or len(getattr(entry, "shape", ())) == 5 else None
            )
        )
    assert len(sizes) > 5 and 0.5 < max(sizes) / (1e-3 * STEP_SIZE) < 1.3


def test_nothing_of_the_prepared_pairs_has_a_name(example, tmp_path, monkeypatch):
    """So a kill at any moment leaves no patient's image behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    prepared = helpers.PreparedPairs(helpers.find_pairs(example / "train"), *config.TrainConfig(**SMALL).grid_options())
    assert not list(tmp_path.iterdir())
    assert len({prepared[number]["fixed_image"].tobytes() for number in range(3)}) == 3


@pytest.mark.usefixtures("eagerly")
@pytest.mark.parametrize("alike", [True, False])
def test_a_pair_turned_and_bent_alike_needs_no_field(alike):
    """Images and labels of both sides, and the labels that the field warps, are moved by one and the same map."""
    shape = (16, 18, 20)
    settings = config.TrainConfig(
        network="local", channels=2, similarity_scales=(0,), moving_shape=shape, fixed_shape=shape
    )
    network = NETWORKS["local"](**settings.network_options())  # its field is zero at first
    optimizer = train.build_optimizer(settings, network.trainable_variables)
    affine = np.array([[[1.1, 0.1, 0, 1], [-0.1, 0.9, 0.1, -1], [0, 0.1, 1, 0.5]]] * 2, np.float32)
    displacement = np.random.default_rng(0).normal(0, 1.5, (2, 5, 5, 5, 3)).astype(np.float32)
    transform = {"affine": affine, "displacement": displacement}
    other = transform if alike else transform | {"displacement": -displacement}
    intensity = {"log_gamma": np.zeros((2, 1, 1, 1, 1), np.float32), "log_gain": np.zeros((2, 3, 3, 3, 1), np.float32)}
    ball = (np.linalg.norm(np.moveaxis(np.indices(shape), 0, -1) - (9, 8, 10), axis=-1) < 4).astype(np.float32)
    label = tf.constant(np.repeat(ball[None, ..., None], 2, axis=0))
    batch = {f"{side}_{what}": label for side in ("moving", "fixed") for what in ("image", "labels")}
    batch |= {"moving_transform": transform, "fixed_transform": other, "mask": np.ones((2, 1), np.float32)}
    batch |= {f"{side}_intensity": intensity for side in ("moving", "fixed")}
    result = train.train_step(settings, network, optimizer, batch)
    assert (result["dice"] > 0.999 and result["label_loss"] < 1e-4) if alike else result["dice"] < 0.9


def test_what_a_step_draws_depends_on_seed_and_step_alone(example):
    prepared = helpers.PreparedPairs(helpers.find_pairs(example / "train"), *config.TrainConfig(**SMALL).grid_options())
    settings = config.TrainConfig(**SMALL, elastic_augmentation=2.0)
    (batch, cases), (again, _), (other, _) = (
        train.sample_batch(settings, prepared, range(3), step) for step in (7, 7, 8)
    )
    assert len(cases.split(", ")) == 2
    for ours, theirs in zip(tf.nest.flatten(batch), tf.nest.flatten(again), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not np.array_equal(batch["moving_transform"]["affine"], other["moving_transform"]["affine"])
    sides = [np.sign(batch[f"{side}_transform"]["affine"][:, 0, 0]) for side in ("moving", "fixed")]
    np.testing.assert_array_equal(*sides)  # mirrored alike
