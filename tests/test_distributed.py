"""Several workers, as processes of this machine: they train as one does, one of them writes, and a death is noticed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import rubbish
from test_resume import results

from config import TrainConfig
from extras import devices

ROOT = Path(__file__).resolve().parents[1]
TINY = [*rubbish.TINY, *rubbish.QUICK, "--batch_size=2", "--valid_every=3", "--dropout=0"]  # each device draws its own
TWO_DEVICES = """
from extras import devices
import tensorflow as tf, train
from extras import files
halves = [tf.config.LogicalDeviceConfiguration()] * 2
tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], halves)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
devices.choose_strategy = lambda config: (strategy, files.ensure_writable_dir(config.model_dir))
train.main()
"""


def free_ports(number):
    sockets = [socket.socket() for _ in range(number)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def start_workers(number, words):
    """Processes of train.py under TF_CONFIG."""
    cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(number)]}
    processes = []
    for index in range(number):
        environment = {
            **os.environ,
            "TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}}),
        }
        command = [sys.executable, "train.py", *TINY, *words[index]]
        processes.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    return processes


@pytest.fixture(scope="module")
def alone(folders, tmp_path_factory):
    """The folder of a training by one process on one device."""
    folder = tmp_path_factory.mktemp("one") / "model"
    run("train.py", *TINY, *folders, "--steps=6", f"--model_dir={folder}")
    return folder


def run(*words):
    process = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-2000:]


def test_two_workers_train_as_one_process_and_only_the_chief_writes(folders, alone, tmp_path):
    words = [[*folders, "--steps=6", f"--model_dir={tmp_path / name}"] for name in ("chief", "other")]
    for process in start_workers(2, words):
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-2000:]
    assert not (tmp_path / "other").exists()
    assert_close(results(tmp_path / "chief"), results(alone))


def test_two_devices_of_one_process_train_as_one(folders, alone, tmp_path):
    run("-c", TWO_DEVICES, *TINY, *folders, "--steps=6", f"--model_dir={tmp_path}")  # halves of the processor, not GPUs
    assert_close(results(tmp_path), results(alone))


def assert_close(ours, theirs):
    for row, expected in zip(ours[0], theirs[0], strict=True):
        np.testing.assert_allclose(
            [float(v) for v in row.values()], [float(v) for v in expected.values()], rtol=2e-3, atol=2e-5
        )
    for name, array in theirs[2].items():
        np.testing.assert_allclose(ours[2][name], array, atol=2e-4, err_msg=name)


def test_a_worker_that_dies_ends_the_run_and_resume_continues_with_another_number(folders, tmp_path):
    words = [*folders, "--steps=100000", f"--model_dir={tmp_path / 'model'}", "--resume"]
    chief, other = start_workers(2, [words, words])
    deadline = time.time() + 240
    while not (tmp_path / "model" / "checkpoint.npz").exists():
        assert time.time() < deadline and chief.poll() is None, chief.stderr.read()[-2000:]
        time.sleep(0.5)
    other.send_signal(signal.SIGKILL)
    _, err = chief.communicate(timeout=120)
    assert chief.returncode == 2 and "another worker is gone" in err and "--resume" in err, err[-2000:]
    assert err.strip().splitlines()[-1].startswith("error: another worker is gone")
    process = subprocess.Popen(
        [sys.executable, "train.py", *TINY, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    step = np.load(tmp_path / "model" / "checkpoint.npz")["state"]
    first = json.loads(str(step))["step"]
    while True:
        line = process.stdout.readline()
        assert line, process.stderr.read()[-2000:]
        if line.startswith("step ") and int(line.split()[1].rstrip(",")) > first:
            break
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM and "stopped after step" in out, err[-2000:]


def test_what_cannot_be_shared_out_is_named(folders, tmp_path, monkeypatch):
    words = [*folders, "--steps=6", f"--model_dir={tmp_path / 'model'}", "--batch_size=3"]
    for process in start_workers(2, [words, words]):
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2 and err.strip().splitlines()[-1].startswith("error: --batch_size: found 3"), err


@pytest.mark.parametrize("value", ["", "{}", '{"cluster": {}, "task": {"type": "master", "index": 0}}'])
def test_without_a_cluster_a_process_trains_alone_and_writes(value, monkeypatch, tmp_path):
    monkeypatch.setenv("TF_CONFIG", value)
    strategy, folder = devices.choose_strategy(TrainConfig(model_dir=str(tmp_path / "model")))
    assert folder == tmp_path / "model" and strategy.num_replicas_in_sync == 1
