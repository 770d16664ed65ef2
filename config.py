"""Every setting, its unit and its allowed values. Edit the defaults here, or name a field on the command line:

    python train.py --steps 200 --network composite
    python inference.py --moving mr.nii.gz --fixed us.nii.gz

Training saves them all beside its weights. inference.py starts from those, not from the defaults here: name a flag.
"""

import contextlib
import dataclasses
import io
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

EXAMPLE_DIR = Path(__file__).resolve().parent / "data" / "example"
CONFIG_NAME, CHECKPOINT_NAME, PATIENTS_NAME = "config.json", "checkpoint.npz", "trained_patients.csv"
WEIGHTS = {"best": "best.weights.h5", "last": "last.weights.h5"}


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line that names it, what was found and expected."""


@dataclass(frozen=True)
class Config:
    # Data: each folder holds moving_images, fixed_images, moving_labels, fixed_labels (README, "Your own data").
    train_dir: str = str(EXAMPLE_DIR / "train")  # pairs to learn from
    valid_dir: str = str(EXAMPLE_DIR / "valid")  # pairs to choose the best weights by; "" = none
    test_dir: str = str(EXAMPLE_DIR / "test")  # pairs that inference.py registers; "" = none
    folds: int = 0  # 0 = off; 2 or more: deal the patients of train_dir into that many folds and hold one out
    fold: int = 0  # the fold held out, 0 to folds - 1; inference.py registers it unless --test_dir is named
    start: Literal["centre", "header"] = "centre"  # what lies over each other at first: volume centres, or world frames
    voxel_size: float = 3.0  # mm, edge of the network grid's isotropic voxels
    fixed_shape: tuple[int, int, int] = (24, 32, 22)  # voxels of the network grid on the fixed image (RAS order)
    moving_shape: tuple[int, int, int] = (36, 36, 32)  # voxels of the network grid on the moving image (RAS order)

    # Network: inference.py takes these, voxel_size and the two shapes as the model was trained, and no others.
    network: Literal["local", "global", "composite", "centred"] = "centred"  # DDF; affine; affine + DDF; shift + DDF
    channels: int = 16  # of the local network's first level, doubled at each of the four next (paper: 32)
    global_channels: int = 8  # the same for the network that finds the affine (paper: 8)
    search_channels: tuple[int, int] = (8, 8)  # of the centred network's searches (moving, fixed), doubled three times
    max_channels: int = 64  # where the doubling ends, for all (paper: 512)
    first_kernel: int = 7  # voxels, edge of the first convolution's kernel; odd
    ddf_levels: tuple[int, ...] = (1, 2, 3, 4)  # levels whose DDFs are summed, 0 finest, 4 coarsest; without 0 faster
    dropout: float = 0.0  # share of the coarsest features that the centred network's searches go without in training

    # Loss
    similarity: Literal["dice", "cross-entropy", "mean-squared", "jaccard"] = "dice"  # of warped and fixed label
    similarity_scales: tuple[float, ...] = (0, 1, 2, 4, 8)  # voxels, standard deviations of the label smoothing
    regulariser: Literal["bending", "gradient-l2", "gradient-l1"] = "bending"  # smoothness of the DDF
    regulariser_weight: float = 0.5  # relative to the label similarity; larger = smoother

    # Training
    steps: int = 600  # gradient steps
    local_every: int = 1  # one step in so many teaches all; the others only the centred network's search for the glands
    batch_size: int = 4  # pairs per step
    learning_rate: float = 1e-3  # peak of Adam's warm-up and cosine decay
    weight_decay: float = 0.0  # share of each weight that a step takes away, relative to the learning rate (AdamW)
    labels_per_pair: int = 0  # labels drawn from a pair in each step; 1 = as in the paper, 0 = all
    cross_patient: float = 0.25  # share of pairs made of two patients, which only the gland (label 0) can teach
    affine_augmentation: float = 0.1  # largest random change of each affine entry; 0 = none
    elastic_augmentation: float = 0.0  # mm, standard deviation of each image's smooth random displacement; 0 = none
    mirror_axis: int = 0  # axis to mirror half of the pairs along, 0 = left-right in RAS; -1 = none
    intensity_augmentation: float = 0.3  # largest log of each image's random gamma; its gain varies with it; 0 = none
    valid_every: int = 100  # steps between validations, each of which saves all that a continued run needs
    seed: int = 0  # of weights, sampling and augmentation
    model_dir: str = "model"  # settings, weights, history.csv, history.png and TensorBoard events; made if missing
    resume: bool = False  # continue the interrupted training in model_dir

    # Inference
    moving: str = ""  # one new pair instead of test_dir: its moving image ...
    fixed: str = ""  # ... and its fixed image; no labels needed
    points: str = ""  # with such a pair: .fcsv, .mrk.json or .csv file of points in mm to carry to the other image
    points_on: Literal["moving", "fixed"] = "moving"  # the image that they lie on
    points_frame: Literal["file", "RAS", "LPS"] = "file"  # their coordinates; a .csv file does not say which
    views: int = 8  # copies of a pair, turned and scaled by affine_augmentation, whose DDFs are averaged; 1 = as it is
    refine_steps: int = 2  # steps that move one gland onto the other, as the centred network found them; 0 = none
    weights: Literal["best", "last"] = "best"  # by validation loss, or of the last step
    output_dir: str = "output"  # warped volumes, displacement fields, pictures and metrics; made if missing

    def __post_init__(self):
        def check(name, good, expected):
            if not good:
                raise InputError(f"--{name}: found {getattr(self, name)!r}, expected {expected}")

        counts = {"steps": 10**7, "local_every": 10**7, "batch_size": 1024, "valid_every": 10**7, "views": 1024}
        for name, most in counts.items():
            check(name, 1 <= getattr(self, name) <= most, f"1 to {most}")
        for name in ("fixed_shape", "moving_shape"):
            check(name, all(8 <= n <= 512 for n in getattr(self, name)), "three sizes from 8 to 512 voxels")
        powers = [2**k for k in range(1, 11)]
        for name in ("channels", "global_channels", "max_channels"):
            check(name, getattr(self, name) in powers, "a power of two: 2, 4, 8, ..., 1024")
        check("search_channels", set(self.search_channels) <= set(powers), "two powers of two: 2, 4, 8, ..., 1024")
        check("first_kernel", self.first_kernel in range(1, 16, 2), "an odd number up to 15")
        check("folds", self.folds == 0 or self.folds >= 2, "0 (off) or 2 and more")
        folds = f"0 to {self.folds - 1} (folds - 1)" if self.folds else "0, or --folds N beside it (a model has both)"
        check("fold", 0 <= self.fold < max(self.folds, 1), folds)
        check("voxel_size", 0 < self.voxel_size < float("inf"), "a size in mm above 0")
        levels = self.ddf_levels
        check("ddf_levels", levels and set(levels) <= set(range(5)), "one or more of 0 1 2 3 4")
        scales = self.similarity_scales
        check("similarity_scales", scales and all(0 <= s < 1e3 for s in scales), "one or more standard deviations >= 0")
        augmentations = "affine_augmentation", "elastic_augmentation", "intensity_augmentation"
        zero_or_more = "regulariser_weight", "weight_decay", "labels_per_pair", "refine_steps", "seed"
        for name in (*zero_or_more, *augmentations):
            check(name, 0 <= getattr(self, name) < float("inf"), "0 or more")
        check("affine_augmentation", self.affine_augmentation <= 0.3, "at most 0.3")
        check("seed", self.seed < 2**31, "less than 2147483648")
        check("learning_rate", 0 < self.learning_rate < float("inf"), "a number above 0")
        check("dropout", 0 <= self.dropout < 1, "a share from 0 to below 1")
        check("cross_patient", 0 <= self.cross_patient <= 1, "a share from 0 to 1")
        check("mirror_axis", -1 <= self.mirror_axis <= 2, "0, 1 or 2, or -1 for none")
        check("fixed", bool(self.fixed) == bool(self.moving), "both --moving and --fixed, or neither")
        check("points", not self.points or self.moving, "the pair too: --moving FILE --fixed FILE")


def parse(arguments=None, default=None):
    """The settings from a list of command-line words (default: the process's own) on top of `default`.

    Raises InputError, with tyro's several lines of explanation folded into one.
    """
    import tyro

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(Config, args=arguments, default=default or Config(), use_underscores=True)
    except SystemExit as stop:
        if stop.code == 0:  # --help
            raise
        lines = [line.strip("│╭╮╰╯─ ") for line in complaint.getvalue().splitlines()[1:]]
        text = " ".join(line for line in lines if line)
        text = text.removeprefix("Error parsing Config: ")
        raise InputError(text.split(" Argument helptext")[0].split(" For full helptext")[0]) from None


def trains_on_examples(config):
    return Path(config.train_dir).resolve() == (EXAMPLE_DIR / "train").resolve()


def parse_for_training():
    """Command line over the defaults. With own training data, or folds, the example's other pairs fall away."""
    config = parse()
    if config.folds or not trains_on_examples(config):
        for name in ("valid", "test"):
            if getattr(config, f"{name}_dir") == str(EXAMPLE_DIR / name):
                config = dataclasses.replace(config, **{f"{name}_dir": ""})
    return config


def grid_settings(config):
    """The last arguments of helpers.pair_to_network."""
    return config.start, config.moving_shape, config.fixed_shape, config.voxel_size


def parse_for_inference():
    """Command line over the settings that training saved in --model_dir.

    Those of the network cannot be changed, nor the folds while they say which pairs training left out. (train_dir may
    have been moved; helpers.check_patients sees to it that none of the held-out patients was trained on.)
    """
    model_dir = parse().model_dir
    trained = load(Path(model_dir) / CONFIG_NAME)
    config = dataclasses.replace(parse(default=trained), model_dir=model_dir)
    fields = list(Config.__dataclass_fields__)
    of_network = fields[fields.index("voxel_size") : fields.index("dropout") + 1]  # the grids and all of "Network"
    held_out = ["folds", "fold"] if config.folds and not config.test_dir else []
    for name in [*of_network, *held_out]:
        asked, have = getattr(config, name), getattr(trained, name)
        if asked != have:
            raise InputError(f"--{name}: found {asked}, expected {have} as {model_dir} was trained; leave it out")
    return config


def check_model_dir(config):
    """A folder that holds a training is continued, under the settings it was begun with, or left as it is."""
    folder = Path(config.model_dir)
    if not any((folder / name).exists() for name in (CHECKPOINT_NAME, *WEIGHTS.values())):
        return
    begun = load(folder / CONFIG_NAME)
    fields = list(Config.__dataclass_fields__)
    # What training does not use; and two folders that may have moved, whose cases train.py compares.
    free = {"model_dir", "resume", "train_dir", "valid_dir", "test_dir", *fields[fields.index("moving") :]}
    for name, have in dataclasses.asdict(begun).items():
        if name not in free and getattr(config, name) != have:
            raise InputError(
                f"--{name}: found {getattr(config, name)}, expected {have} as the training in {folder} was begun with; "
                "name another --model_dir, or delete this one"
            )
    if not config.resume:
        raise InputError(f"{folder}: holds a training; add --resume, name another --model_dir, or delete this one")
    checkpoint, history = folder / CHECKPOINT_NAME, folder / "history.csv"
    # One row and no checkpoint yet: it was killed between the two, and begins anew.
    if not checkpoint.exists() and history.exists() and len(history.read_text().splitlines()) > 2:
        raise InputError(f"{checkpoint}: missing; expected it beside the weights; name another --model_dir")


def as_json(config):
    now = {"resume", "moving", "fixed", "points"}  # they say what to do now, and nothing of the training
    saved = {name: value for name, value in dataclasses.asdict(config).items() if name not in now}
    return json.dumps(saved, indent=2) + "\n"


def load(path):
    """The settings that `as_json` wrote, checked by the same rules as the command line."""
    try:
        words = []
        for name, value in json.loads(Path(path).read_text()).items():
            words += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
        return parse(words)
    except FileNotFoundError:
        raise InputError(f"{path}: missing; expected the folder of a trained model: run train.py first") from None
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: {error}; expected the settings that train.py saved") from None


def import_tensorflow():
    """Load TensorFlow as these scripts want it, before anything else does.

    On some processors (seen on one with AVX2 but not AVX-512) TensorFlow leaves oneDNN's 3D convolutions off, which are
    many times faster than its own. And TensorFlow's libraries greet with notices that no setting silences (tensorflow
    issue 100442), in between which one would miss an error.
    """
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        import tensorflow  # noqa: F401
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def share_cores(config):
    """How operations share two cores; to be called before TensorFlow computes anything.

    The centred network's searches in the two images get more done side by side, with one thread each, than one at a
    time on both cores. The other networks are one long chain of operations, which it would slow.
    """
    if config.network == "centred" and os.cpu_count() == 2:
        os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")


def run(main):
    """Run a script's main; bad input, or a file that the system refuses, ends it with one line and exit status 2."""
    try:
        main()
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
