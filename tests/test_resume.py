"""An interrupted training that is continued ends as if nothing had happened. tests/check_resume.py kills for real."""

import csv
import os
import shutil
import signal
import time

import h5py
import numpy as np
import pytest
import rubbish
import tensorflow as tf

import config
import helpers
import train
from extras import checkpoint, devices

TINY = [*rubbish.TINY, *rubbish.QUICK, "--steps=7", "--valid_every=3"]


def arrays(path):
    """Every array of a weights file by its name in the file."""
    found = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: item[()]} if isinstance(item, h5py.Dataset) else {}))
    return found


def results(folder):
    """What a training leaves: both weights, and the history without the clock."""
    with open(folder / "history.csv") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["minutes"]
    return rows, *(arrays(folder / f"{name}.weights.h5") for name in ("best", "last"))


def assert_equal(ours, theirs):
    assert ours[0] == theirs[0]
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        assert a.keys() == b.keys() and len(a) > 10
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    """A training that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["train.py", *TINY, *folders, f"--model_dir={folder}"])
        train.main()
    return folder


def interrupt(monkeypatch, at, how):
    """Let something happen in the step of this number, counted in this process. how: result -> result."""
    on_all_replicas = devices.on_all_replicas

    def make(*arguments):
        train_step, calls = on_all_replicas(*arguments), []

        def step(batch):
            calls.append(1)
            result = train_step(batch)
            return how(result) if len(calls) == at else result

        return step

    monkeypatch.setattr(devices, "on_all_replicas", make)


@pytest.fixture
def interruptible():
    """Ctrl-C raises KeyboardInterrupt, in a shell's background job too, which is born deaf to it."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, inherited)


def test_both_signals_are_noted_and_then_work_as_before(interruptible):
    with checkpoint.defer_signals() as noted:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert noted == [signal.SIGTERM, signal.SIGINT]
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_a_signal_ends_after_the_step_and_the_rest_follows_bit_for_bit(whole, folders, tmp_path, monkeypatch, call):
    words = [*TINY, *folders, f"--model_dir={tmp_path}"]
    with monkeypatch.context() as patch:
        interrupt(patch, 5, lambda result: os.kill(os.getpid(), signal.SIGTERM) or result)
        status, out, err = call(train, *words)
    assert (
        status == 128 + signal.SIGTERM and "stopped after step 5; to continue, repeat the command with --resume" in out
    ), err
    status, out, err = call(train, *words, "--resume")
    assert status == 0, err
    assert_equal(results(tmp_path), results(whole))
    before = (tmp_path / "last.weights.h5").read_bytes()
    assert call(train, *words, "--resume")[0] == 0  # nothing is left to do
    assert (tmp_path / "last.weights.h5").read_bytes() == before


def test_what_dies_without_a_word_continues_from_the_last_checkpoint(whole, folders, tmp_path, monkeypatch, call):
    """Twice: before there is a checkpoint, and two steps after the first one."""
    words = [*TINY, *folders, f"--model_dir={tmp_path}"]

    def die(result):
        raise KeyboardInterrupt

    for at in (1, 5):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt(patch, at, die)
            call(train, *words, *["--resume"] * (at > 1))
        assert (tmp_path / "checkpoint.npz").exists() == (at > 1)
    assert call(train, *words, "--resume")[0] == 0
    assert_equal(results(tmp_path), results(whole))


def test_a_training_is_never_overwritten_or_continued_otherwise(whole, folders, call):
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    words = [*TINY, *folders, f"--model_dir={whole}"]
    for more, message in (
        ([], "holds a training; add --resume"),
        (["--steps=9"], "--steps: found 9, expected 7 as the training"),
        (["--resume", "--learning_rate=0.5"], "--learning_rate: found 0.5, expected 0.001"),
    ):
        status, _, err = call(train, *words, *more)
        assert status == 2 and message in err and str(whole) in err and err.count("\n") == 1, err
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


def test_weights_without_their_checkpoint_are_not_overwritten(whole, folders, tmp_path, call):
    for path in whole.iterdir():
        if path.name != "checkpoint.npz":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    status, _, err = call(train, *TINY, *folders, f"--model_dir={tmp_path}", "--resume")
    assert status == 2 and f"{tmp_path / 'checkpoint.npz'}: missing; expected it beside the weights" in err, err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("spoil", [lambda data: data[:2000], lambda data: b"", lambda data: b"no archive"])
def test_a_damaged_checkpoint_is_named(spoil, whole, folders, tmp_path, call):
    for path in whole.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "checkpoint.npz").write_bytes(spoil((whole / "checkpoint.npz").read_bytes()))
    status, _, err = call(train, *TINY, *folders, f"--model_dir={tmp_path}", "--resume")
    assert status == 2 and err.splitlines()[-1].startswith(f"error: {tmp_path / 'checkpoint.npz'}: cannot be read"), err


def test_a_training_is_not_continued_on_other_patients(whole, folders, tmp_path, monkeypatch, call):
    find_pairs = helpers.find_pairs
    monkeypatch.setattr(helpers, "find_pairs", lambda folder, **words: find_pairs(folder, **words)[1:])
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    status, _, err = call(train, *TINY, *folders, f"--model_dir={whole}", "--resume")
    assert status == 2 and "patients.csv: case train00 of patient train00 came or went" in err, err
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


def test_a_training_is_not_continued_with_other_validation(whole, folders, monkeypatch, call):
    find_pairs = helpers.find_pairs
    monkeypatch.setattr(
        helpers, "find_pairs", lambda folder, **words: find_pairs(folder, **words)[str(folder).endswith("valid") :]
    )
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    status, _, err = call(train, *TINY, *folders, f"--model_dir={whole}", "--resume")
    assert status == 2 and "--valid_dir: found other cases than before" in err.splitlines()[-1], err
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


def test_the_data_may_have_moved(whole, example, tmp_path, call):
    """The cases count, not the path; inference.py then looks for them in the new place."""
    shutil.copytree(whole, tmp_path / "model")
    (tmp_path / "elsewhere").symlink_to(example)
    moved = [f"--{name}_dir={tmp_path / 'elsewhere' / name}" for name in ("train", "valid")]
    status, _, err = call(train, *TINY, *moved, f"--model_dir={tmp_path / 'model'}", "--resume")
    assert status == 0, err
    assert config.load_config(tmp_path / "model").train_dir == str(tmp_path / "elsewhere" / "train")


@pytest.mark.usefixtures("eagerly")
def test_a_gradient_that_is_no_number_stops_before_it_is_saved(folders, tmp_path, monkeypatch, call):
    """Of a loss that is still a number."""

    @tf.custom_gradient
    def spoiled(value):
        return value, lambda upstream: upstream * np.inf

    mean = train.masked_mean
    monkeypatch.setattr(train, "masked_mean", lambda *words: spoiled(mean(*words)))
    status, _, err = call(train, *TINY, *folders, f"--model_dir={tmp_path}", "--valid_every=1")
    assert status == 2 and "step 1 (train0" in err and "a gradient of norm" in err, err
    assert not (tmp_path / "checkpoint.npz").exists()


@pytest.mark.usefixtures("eagerly")
def test_a_loss_that_is_no_number_stops_with_step_cases_and_checkpoint(folders, tmp_path, monkeypatch, call):
    interrupt(monkeypatch, 5, lambda result: result | {"loss": np.nan})
    status, _, err = call(train, *TINY, *folders, f"--model_dir={tmp_path}", "--inter_subject_fraction=0")
    last = err.splitlines()[-1]
    assert status == 2 and "step 5 (train0" in last and "found a loss of nan" in last and "of step 3" in last, err
