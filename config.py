"""Every setting, its unit and its allowed values. Edit the defaults here, or name a field on the command line:

    python train.py --steps 200 --network local
    python inference.py --moving mr.nii.gz --fixed us.nii.gz

Training saves its settings beside the weights, and inference.py takes the network from there.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import ConfigDict, Field, NonNegativeInt, TypeAdapter, ValidationError

from extras.errors import InputError, expect
from extras.files import check_path

EXAMPLE_DIR = Path(__file__).resolve().parent / "data" / "example"
CONFIG_NAME = "config.json"
Count = Annotated[int, Field(ge=1, le=10**7)]
Size = Annotated[int, Field(ge=8, le=512)]
Sigma = Annotated[float, Field(ge=0, lt=1000)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class TrainConfig:
    # Data: each folder holds moving_images, fixed_images, moving_labels, fixed_labels (README, "Your own data").
    train_dir: str = "example"  # pairs to learn from; "example" = the data that train.py makes
    valid_dir: str = ""  # pairs to choose the best weights by; "" = none (with the example data, their own)
    folds: NonNegativeInt = 0  # 0 = off; 2 or more: deal the patients of train_dir into that many and hold one out
    fold: NonNegativeInt = 0  # the fold held out, 0 to folds - 1; inference.py registers it
    initial_alignment: Literal["centre", "header"] = "centre"  # before registration: volume centres, or world frames
    voxel_size: Positive = 3.0  # mm, edge of the network grid's isotropic voxels
    fixed_shape: tuple[Size, Size, Size] = (24, 32, 22)  # voxels of the network grid on the fixed image (RAS order)
    moving_shape: tuple[Size, Size, Size] = (36, 36, 32)  # voxels of the network grid on the moving image (RAS order)

    # Network
    network: Literal["local", "global", "composite"] = "composite"  # DDF; affine; affine and then DDF
    channels: Literal[2, 4, 8, 16, 32, 64] = 16  # at the finest level, doubled at each next one up to 64 (paper: 32)

    # Loss = label loss + regulariser_weight x regulariser
    similarity: Literal["dice", "cross-entropy", "mean-squared", "jaccard"] = "dice"  # of warped and fixed label
    similarity_scales: tuple[Sigma, ...] = (0, 1, 2, 4, 8)  # voxels, standard deviations of the label smoothing
    regulariser: Literal["bending", "gradient-l2", "gradient-l1"] = "bending"  # smoothness of the DDF
    regulariser_weight: NotNegative = 1.0  # relative to the label loss; larger = smoother

    # Training
    steps: Count = 3000  # gradient steps
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 4  # pairs per step
    learning_rate: Positive = 1e-3  # peak of its warm-up and cosine decay
    dropout: Share = 0.2  # rate at the coarsest level of each U-Net in training, and half of it at finer ones
    labels_per_pair: NonNegativeInt = 0  # labels drawn from a pair in each step; 1 = as in the paper, 0 = all
    inter_subject_fraction: Share = 0.5  # share of pairs of two different patients; of these only label 0 counts
    affine_augmentation: Annotated[float, Field(ge=0, le=0.3)] = 0.15  # largest random change of each affine entry
    elastic_augmentation: NotNegative = 1.0  # mm, standard deviation of each image's smooth random displacement
    intensity_augmentation: NotNegative = 0.3  # log of the largest random gamma; a smooth random gain scales with it
    mirror_axis: Literal[-1, 0, 1, 2] = 0  # axis to mirror half of the pairs along, 0 = left-right in RAS; -1 = none
    valid_every: Count = 100  # steps between validations, each of which saves all that a resumed training needs
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0  # of weights, sampling and augmentation
    model_dir: str = "model"  # settings, weights, history.csv, history.png and TensorBoard events; made if missing
    resume: bool = False  # continue the interrupted training in model_dir

    __pydantic_config__ = ConfigDict(extra="forbid")

    def __post_init__(self):
        expect(self.folds != 1, "--folds", self.folds, "0 (off), or 2 and more")
        expect(self.fold < max(self.folds, 1), "--fold", self.fold, "0 to folds - 1, with --folds beside it")
        expect(self.similarity_scales, "--similarity_scales", "none", "one or more")

    def grid_options(self):
        """The last arguments of helpers.pair_to_network."""
        return self.initial_alignment, self.moving_shape, self.fixed_shape, self.voxel_size

    def network_options(self):
        """The arguments of a builder in networks.py."""
        return {name: getattr(self, name) for name in ("moving_shape", "fixed_shape", "channels", "dropout")}


@dataclass(frozen=True)
class InferenceConfig:
    # What to register: one new pair, or a folder of pairs
    moving: str = ""  # the moving image of one new pair ...
    fixed: str = ""  # ... and its fixed image; no labels needed
    test_dir: str = ""  # folder of pairs; "" = the fold that training held out, or the example's test patients
    points: str = ""  # with one new pair: .fcsv, .mrk.json or .csv file of points in mm to carry to the other image
    points_on: Literal["moving", "fixed"] = "moving"  # the image that they lie on
    points_frame: Literal["file", "RAS", "LPS"] = "file"  # their coordinates; a .csv file does not say which

    # How, and where to
    model_dir: str = "model"  # the folder that train.py wrote
    weights: Literal["best", "last"] = "best"  # by validation loss, or of the last step
    tta_samples: Annotated[int, Field(ge=1, le=1024)] = 8  # test-time augmentation: DDFs averaged over; 1 = none
    initial_alignment: Literal["", "centre", "header"] = ""  # "" = as trained
    train_dir: str = ""  # of the folds, where it has moved since; "" = as trained
    output_dir: str = "output"  # warped volumes, displacement fields, pictures and metrics; made if missing

    def __post_init__(self):
        pair = "both --moving FILE and --fixed FILE, or neither"
        expect(bool(self.fixed) == bool(self.moving), "--fixed", repr(self.fixed), pair)
        expect(self.moving or not self.points, "--points", self.points, "the pair too: --moving FILE --fixed FILE")


def check(kind, values):
    """A TrainConfig or InferenceConfig from a dictionary. Raises InputError for the first value that is not allowed."""
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = "".join(map(str, first["loc"][:1]))
        expected = (
            first["msg"].replace("Input should be ", "").replace("Unexpected keyword argument", "no such setting")
        )
        raise InputError(f"--{name}: found {first['input']!r}, expected {expected}") from None


def parse_config(kind):
    """A TrainConfig or InferenceConfig from the command line.

    tyro explains a word that it cannot read, and ends the program with exit status 2.
    """
    values = dataclasses.asdict(tyro.cli(kind, use_underscores=True))
    for path in filter(lambda value: value and isinstance(value, str), values.values()):
        check_path(path)
    return check(kind, values)


def as_json(config):
    saved = {name: value for name, value in dataclasses.asdict(config).items() if name != "resume"}
    return json.dumps(saved, indent=2)


def load_config(model_dir):
    """The TrainConfig that train.py saved in model_dir, checked like the command line."""
    path = Path(model_dir) / CONFIG_NAME
    try:
        return check(TrainConfig, json.loads(path.read_text()))
    except FileNotFoundError:
        raise InputError(f"{path}: missing; expected the folder of a trained model: run train.py first") from None
    except (OSError, ValueError, InputError) as error:
        raise InputError(f"{path}: {error}; expected settings that this version of train.py saved") from None
