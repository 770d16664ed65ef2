from extras import devices  # noqa: F401  before TensorFlow

# isort: split
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from extras import files
from extras.errors import run

ROOT = Path(__file__).resolve().parents[1]


def import_file(path):
    """A module by its path, once: its worker processes look their functions up by name."""
    if path.stem in sys.modules:
        return sys.modules[path.stem]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def example(tmp_path_factory):
    """A small example data set: {train, valid, test} with a few patients each."""
    folder = tmp_path_factory.mktemp("data") / "example"
    make_example_data = import_file(ROOT / "data" / "make_example_data.py")
    make_example_data.main(str(folder), seed=5, patients={"train": 3, "valid": 1, "test": 2})
    return folder


@pytest.fixture(scope="session")
def folders(example):
    """The words that name it to train.py."""
    return [f"--{name}_dir={example / name}" for name in ("train", "valid")]


@pytest.fixture(autouse=True)
def warn_again():
    """A warning is printed once in a process, and here once in a test."""
    files.warn.cache_clear()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def eagerly():
    """Functions run as they stand, which for a step or two is quicker than tracing them."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a script's main in this process: call(module, "--steps", 3) -> (exit status, stdout, stderr)."""

    def run_main(module, *words):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, words)])
        status = 0
        try:
            run(module.main)
        except SystemExit as stop:
            status = stop.code
        output = capsys.readouterr()
        return status, output.out, output.err

    return run_main
