"""What a training leaves and continues from: the checkpoint, and the weights.

checkpoint.npz holds every variable of network and optimizer, and the TrainingState. It is written last, after all else
that belongs to its step. So whenever a training is killed, --resume finds a whole checkpoint, and repeats the steps
after it exactly, since what a step draws depends on the seed and the number of the step alone. README, "Training".
"""

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import signal
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from extras.cross_validation import check_same_patients
from extras.errors import InputError, NonFiniteLossError, OutputError, expect, reading
from extras.files import atomic_write

CHECKPOINT = "checkpoint.npz"
WEIGHTS = {"best": "best.weights.h5", "last": "last.weights.h5"}
MAY_CHANGE = {"model_dir", "resume", "train_dir", "valid_dir"}  # folders may have moved; their cases are compared


@dataclass
class TrainingState:
    """What a training knows beside its variables."""

    valid_cases: list  # the best loss so far is of these
    step: int = 0
    saved_step: int = 0  # of the checkpoint; 0 = none yet
    minutes: float = 0.0
    best_loss: float = float("inf")
    is_best: bool = True  # whether the last validation was the best so far
    history: list = field(default_factory=list)  # a dictionary for each validation
    recent: list = field(default_factory=list)  # results of the steps since then
    clock: float = field(default_factory=time.time)  # when the last step ended

    def count_step(self, result, cases):
        """One more step. result: a dictionary of numbers. Raises NonFiniteLossError, which names the step's cases."""
        self.step += 1
        if not np.isfinite(list(result.values())).all():
            found = f"a loss of {result['loss']}, a gradient of norm {result['gradient_norm']}, expected numbers"
            fix = "look at these pairs or try a smaller --learning_rate"
            saved = f"the last checkpoint is of step {self.saved_step}"
            raise NonFiniteLossError(f"step {self.step} ({cases}): found {found}; {fix}; {saved}")
        self.minutes, self.clock = self.minutes + (time.time() - self.clock) / 60, time.time()
        self.recent.append(result)

    def add_history_row(self, valid_results):
        """Means since the last row. Without validation the last weights are the best known."""
        means = dict(pd.DataFrame(self.recent).mean()) | dict(pd.DataFrame(valid_results).mean().add_prefix("valid_"))
        row = {"step": self.step, "minutes": round(self.minutes, 2)}
        self.history.append(row | {name: float(f"{mean:.5g}") for name, mean in means.items()})
        self.recent = []
        self.is_best = means.get("valid_loss", -np.inf) < self.best_loss
        self.best_loss = min(self.best_loss, means.get("valid_loss", np.inf))


def check_model_dir(config, load):
    """A folder that holds a training is resumed under the settings it began with, or left as it is.

    load: a function from the folder to the saved config.
    """
    folder = Path(config.model_dir)
    if not any((folder / name).exists() for name in (CHECKPOINT, *WEIGHTS.values())):
        return
    fix = "name another --model_dir, or delete this one"
    for name, value in dataclasses.asdict(load(folder)).items():
        same = name in MAY_CHANGE or getattr(config, name) == value
        expect(same, f"--{name}", getattr(config, name), f"{value} as the training in {folder} began with; {fix}")
    if not config.resume:
        raise InputError(f"{folder}: holds a training; add --resume, {fix}")
    checkpoint, history = folder / CHECKPOINT, folder / "history.csv"
    # One row and no checkpoint yet: it was killed between the two, and begins anew.
    if not checkpoint.exists() and history.exists() and len(history.read_text().splitlines()) > 2:
        raise InputError(f"{checkpoint}: missing; expected it beside the weights; {fix}")


def save_checkpoint(folder, variables, state):
    """All variables as arrays and the state as JSON, in one file. Nothing in it is ever executed."""
    state.saved_step = state.step
    with atomic_write(folder / CHECKPOINT) as temporary, open(temporary, "wb") as file:
        np.savez(file, *[variable.numpy() for variable in variables], state=json.dumps(dataclasses.asdict(state)))


def load_checkpoint(folder, train_pairs, variables, state):
    """Inverse of save_checkpoint: sets variables and state. Without a checkpoint both stay, and the training begins."""
    path = Path(folder) / CHECKPOINT
    if not path.exists():
        print(f"{folder}: nothing to resume; this training begins")
        return
    check_same_patients(folder, train_pairs)
    with reading(path, "the checkpoint of this training"), np.load(path) as arrays:
        for number, variable in enumerate(variables):
            variable.assign(arrays[f"arr_{number}"])
        saved = json.loads(str(arrays["state"]))
    expect(saved["valid_cases"] == state.valid_cases, "--valid_dir", "other cases than before", "the same")
    vars(state).update(saved | {"clock": time.time()})


def save_weights(network, folder, state):
    """The last weights; and the best, if the last validation was."""
    for name in ["last", "best"] if state.is_best else ["last"]:
        path = folder / WEIGHTS[name]
        needed = 8 * network.count_params() + 4000 * len(network.weights)  # HDF5 adds to each array
        free = shutil.disk_usage(folder).free
        if free < needed:  # HDF5 takes the whole process with it when a disk is full
            raise OutputError(f"{path}: found {free} bytes free, expected {needed}; make room on that disk")
        with atomic_write(path) as temporary:
            network.save_weights(temporary)


def load_weights(network, folder, name):
    """Set the "best" or the "last" weights."""
    path = Path(folder) / WEIGHTS[name]
    if not path.exists():
        raise InputError(f"{path}: missing; expected weights that train.py wrote")
    with reading(path, "weights of this network"), warnings.catch_warnings(action="error", category=UserWarning):
        network.load_weights(path)  # Keras only warns of what it leaves out


@contextlib.contextmanager
def defer_signals():
    """Within the block Ctrl-C and SIGTERM end nothing: they are noted in the list that this gives."""
    noted, numbers = [], (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, frame: noted.append(number)) for number in numbers]
    try:
        yield noted
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def print_next_command(config, state):
    """Say how to register with the model, as typed from the folder that the user stands in."""
    script = os.path.relpath(Path(__file__).parents[1] / "inference.py")
    command = shlex.join([sys.executable, script, "--model_dir", config.model_dir])
    pair = "" if config.folds or config.train_dir == "example" else " --moving FILE --fixed FILE"
    print(f"trained in {state.minutes:.1f} minutes; next: {command}{pair}")
