"""Broken inputs of every kind, and what train.py and inference.py say of each.

    python tests/rubbish.py        prints the table of inputs and messages

Each of CORPUS is given to the script itself; tests/test_rubbish.py checks that it ends with one line and nothing
written.
"""

import contextlib
import gzip
import io
import json
import shlex
import shutil
import struct
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from extras import devices  # noqa: F401  before TensorFlow

# isort: split
import nibabel as nib
import numpy as np
from conftest import ROOT, import_file

import helpers
import inference
import train
from config import CONFIG_NAME, TrainConfig, as_json
from extras import checkpoint
from extras.errors import run as run_main
from networks import NETWORKS

SMALL = {"voxel_size": 6.0, "fixed_shape": (12, 14, 11), "moving_shape": (16, 16, 16), "channels": 4, "batch_size": 2}
TINY = shlex.split("--voxel_size 6 --fixed_shape 12 14 11 --moving_shape 16 16 16 --channels 4 --batch_size 2")
QUICK = ["--network", "local", "--similarity_scales", "0", "1"]  # to trace; any network

# -- Ways to spoil a file ------------------------------------------------------------------------------------------


def raw(*changes):
    """Write bytes into a compressed NIfTI file's header. changes: (byte offset, struct format, values ...)."""

    def spoil(path):
        data = bytearray(gzip.decompress(path.read_bytes()))
        for offset, form, *values in changes:
            struct.pack_into("<" + form, data, offset, *values)
        path.write_bytes(gzip.compress(bytes(data)))

    return spoil


def voxels(change):
    """Write the file again with voxels that `change` makes of the old ones."""

    def spoil(path):
        image = nib.load(path)
        data = change(np.asarray(image.dataobj, np.float32))
        path.unlink()
        nib.save(nib.Nifti1Image(data, image.affine), path)

    return spoil


def put(index, value):
    def change(data):
        data[index] = value
        return data

    return voxels(change)


def shift(path):
    image = nib.load(path)
    moved = nib.Nifti1Image(np.asarray(image.dataobj), nib.affines.from_matvec(np.eye(3), [5, 0, 0]) @ image.affine)
    path.unlink()
    nib.save(moved, path)


def loop(path):
    path.unlink()
    path.symlink_to(path)


def empty(path):
    for name in helpers.FOLDERS:
        shutil.rmtree(path / name)
        (path / name).mkdir()


def folder_instead(path):
    path.unlink()
    path.mkdir()


def twice(path):
    path.with_name(path.name.removesuffix(".gz")).write_bytes(gzip.decompress(path.read_bytes()))


SFORM = (252, "2h", 0, 1)  # qform off, sform on
IMAGE, LABELS = "moving_images/train00.nii.gz", "fixed_labels/train00.nii.gz"
DATA = {  # what happens to a data set -> (the file to spoil, how, words that the message holds)
    "missing folder": ("moving_labels", shutil.rmtree, "no such folder"),
    "empty folders": (".", empty, "found no .nii"),
    "missing file": (IMAGE, Path.unlink, "train00.nii.gz: missing"),
    "one case as .nii and as .nii.gz": (IMAGE, twice, "the same case as in"),
    "a case in another format": (IMAGE, lambda p: p.rename(p.with_name("train00.nrrd")), "train00.nrrd: found"),
    "an ending in mixed case": (IMAGE, lambda p: p.rename(p.with_name("train00.Nii.gz")), "train00.Nii.gz: cannot be"),
    "folder in place of a file": (IMAGE, folder_instead, "cannot be read"),
    "symbolic link to itself": (IMAGE, loop, "cannot be read"),
    "text": (IMAGE, lambda p: p.write_text("not a NIfTI file at all"), "cannot be read"),
    "no byte": (IMAGE, lambda p: p.write_bytes(b""), "cannot be read"),
    "truncated gzip": (IMAGE, lambda p: p.write_bytes(p.read_bytes()[:5000]), "cannot be read"),
    "damaged gzip": (IMAGE, lambda p: p.write_bytes(p.read_bytes()[:5000] + bytes(5000)), "cannot be read"),
    "header alone": (IMAGE, lambda p: p.write_bytes(gzip.compress(gzip.decompress(p.read_bytes())[:352])), "bytes"),
    "terabytes claimed": (IMAGE, raw((40, "4h", 3, 30000, 30000, 30000)), "bytes"),
    "negative size": (IMAGE, raw((42, "h", -5)), "train00.nii.gz"),
    "unknown data type": (IMAGE, raw((70, "h", 999)), "cannot be read"),
    "RGB": (IMAGE, raw((70, "2h", 128, 24)), "expected plain numbers"),
    "complex": (IMAGE, voxels(lambda d: d.astype(np.complex64)), "expected plain numbers"),
    "one slice": (IMAGE, voxels(lambda d: d[..., :1]), "expected 3 dimensions"),
    "two dimensions": (IMAGE, voxels(lambda d: d[..., 0]), "expected 3 dimensions"),
    "four dimensions": (IMAGE, voxels(lambda d: np.stack([d, d], -1)), "expected 3 dimensions"),
    "constant image": (IMAGE, voxels(lambda d: d * 0 + 7), "the value 7 in every voxel"),
    "NaN voxel": (IMAGE, put((3, 3, 3), np.nan), "1 NaN or infinite"),
    "infinite voxel": (IMAGE, put((3, 3, 3), np.inf), "1 NaN or infinite"),
    "singular header": (IMAGE, raw(SFORM, (280, "12f", *[0] * 12)), "expected voxels of"),
    "two directions alike": (IMAGE, raw(SFORM, (280, "12f", 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0)), "singular"),
    "NaN in the header": (IMAGE, raw(SFORM, (280, "12f", *[np.nan] * 12)), "train00.nii.gz"),
    "sizes in micrometres": (IMAGE, raw((123, "B", 3)), "micrometres, expected mm"),
    "voxels of 1e30 mm": (IMAGE, raw(SFORM, (280, "12f", *np.eye(4)[:3].ravel() * 1e30)), "header matrix"),
    "fewer labels than the other image": (LABELS, voxels(lambda d: d[..., :1]), "labels, expected 1 as in"),
    "label of another shape": (LABELS, voxels(lambda d: d[1:]), "expected (88, 48, 80)"),
    "label elsewhere": (LABELS, shift, "same grid"),
    "label values up to 3": (LABELS, voxels(lambda d: d * 3), "expected 0 to 1"),
    "label values below 0": (LABELS, put((0, 0, 0, 0), -0.5), "expected 0 to 1"),
    "empty label": (LABELS, put((..., 1), 0), "label 1 is empty"),
    "label that is everywhere": (LABELS, put((..., 0), 1), "label 0 fills"),
    "label of five dimensions": (LABELS, voxels(lambda d: d[..., None]), "expected 3 dimensions, or 4"),
    "patients.csv without its columns": ("patients.csv", lambda p: p.write_text("a,b\n1,2\n"), "columns case,patient"),
    "patients.csv without a case": ("patients.csv", lambda p: p.write_text("case,patient\n"), "no patient for case"),
    "patients.csv of bytes": ("patients.csv", lambda p: p.write_bytes(b"\xff\xfe\x00case"), "patients.csv: cannot be"),
}  # fmt: skip


def edit_json(**changes):
    return lambda folder: (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | changes)
    )


def weights(change):
    path = "best.weights.h5"
    return lambda folder: (folder / path).write_bytes(change((folder / path).read_bytes()))


MODELS = {  # what happens to a trained model -> (how, words that the message holds)
    "no model": (shutil.rmtree, "config.json: missing"),
    "no weights": (lambda f: (f / "best.weights.h5").unlink(), "best.weights.h5: missing"),
    "truncated weights": (weights(lambda data: data[:3000]), "best.weights.h5: cannot be read"),
    "weights of no byte": (weights(lambda data: b""), "best.weights.h5: cannot be read"),
    "weights of another width": (edit_json(channels=8), "best.weights.h5: cannot be read"),
    "weights of another network": (edit_json(network="local"), "best.weights.h5: cannot be read"),
    "settings that are no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "settings that are a list": (lambda f: (f / "config.json").write_text("[1]"), "config.json"),
    "an unknown setting": (edit_json(stepz=3), "config.json"),
    "settings of an older version": (edit_json(network="centred"), "config.json"),
    "code in a setting": (edit_json(steps="__import__('os')"), "config.json"),
}
REQUESTS = {  # words on the command line -> words that the message holds
    train: {
        "--steps -1": "--steps: found -1, expected",
        "--steps 1e99": "--steps",
        "--batch_size 1000000000": "--batch_size",
        "--channels 1073741824": "--channels",
        "--first_kernel 1001": "--first_kernel",
        "--fixed_shape 1000000 8 8": "--fixed_shape",
        "--learning_rate nan": "--learning_rate: found nan",
        "--similarity_scales 1e9": "--similarity_scales",
        "--stepz 3": "--stepz",
        "--train_dir nowhere": "nowhere",
        "--train_dir data/make_example_data.py": "no such folder",
        "--model_dir config.py": "config.py: cannot be written to",
    },
    inference: {
        "--moving nowhere.nii.gz --fixed nowhere.nii.gz": "nowhere.nii.gz: cannot be read",
        "--moving README.md --fixed README.md": "README.md: cannot be read",
        "--moving only.nii.gz": "--fixed",
        "--points targets.csv": "--points",
        "--network global": "--network",
        "--test_dir nowhere": "nowhere",
        "--output_dir config.py": "config.py: cannot be written to",
    },
}

# -- The corpus: name -> a function of a folder that holds example/ and model/ -> script, its words, the message -------


def of_data(path, spoil, message):
    def prepare(folder):
        shutil.copytree(folder / "example" / "train", folder / "data")
        spoil(folder / "data" / path)
        return train, [*TINY, f"--train_dir={folder / 'data'}", f"--model_dir={folder / 'out'}"], message

    return prepare


def of_model(spoil, message):
    def prepare(folder):
        spoil(folder / "model")
        words = [f"--model_dir={folder / 'model'}", f"--test_dir={folder / 'example' / 'test'}"]
        return inference, [*words, f"--output_dir={folder / 'out'}"], message

    return prepare


def of_request(script, words, message):
    def prepare(folder):
        begin = [*TINY, f"--train_dir={folder / 'example' / 'train'}", f"--model_dir={folder / 'out'}"]
        if script is inference:
            begin = [f"--model_dir={folder / 'model'}", f"--test_dir={folder / 'example' / 'test'}"]
            begin += [f"--output_dir={folder / 'out'}"]
        return script, [*begin, *words.split()], message

    return prepare


CORPUS = {
    **{name: of_data(*entry) for name, entry in DATA.items()},
    **{name: of_model(*entry) for name, entry in MODELS.items()},
    **{
        f"{script.__name__}.py {words}": of_request(script, words, message)
        for script, requests in REQUESTS.items()
        for words, message in requests.items()
    },
}


def make_folder(folder):
    """A small example data set and a model with it, on which the corpus works."""
    make_example_data = import_file(ROOT / "data" / "make_example_data.py")
    make_example_data.main(str(folder / "example"), seed=5, patients={"train": 1, "valid": 1, "test": 1})
    config = TrainConfig(**SMALL)
    (folder / "model").mkdir()
    (folder / "model" / CONFIG_NAME).write_text(as_json(config))
    network = NETWORKS[config.network](**config.network_options())
    checkpoint.save_weights(network, folder / "model", checkpoint.TrainingState([]))


def run(script, words):
    """Exit status and error output of a script's main, in this process."""
    output, errors, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [f"{script.__name__}.py", *words]
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            run_main(script.main)
    except SystemExit as stop:
        return stop.code, errors.getvalue()
    finally:
        sys.argv = before
    return 0, errors.getvalue()


def main():
    with tempfile.TemporaryDirectory() as base:
        make_folder(Path(base))
        for name, prepare in CORPUS.items():
            with tempfile.TemporaryDirectory() as folder:
                shutil.copytree(base, folder, dirs_exist_ok=True)
                script, words, _ = prepare(Path(folder))
                status, errors = run(script, words)
                print(f"{name}\n    {status}  {errors.strip().splitlines()[-1].replace(folder + '/', '')}")


if __name__ == "__main__":
    main()
