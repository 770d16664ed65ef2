"""Settings: one spelling, a line for each mistake, and the same settings after a round trip through JSON."""

import dataclasses
import json
from pathlib import Path

import pytest

import config
from config import InferenceConfig, TrainConfig
from extras.errors import InputError

FIELDS = [(kind, field.name) for kind in (TrainConfig, InferenceConfig) for field in dataclasses.fields(kind)]


@pytest.fixture
def parse(monkeypatch):
    """parse(kind, words) -> the settings of a command line."""

    def parse_words(kind, words):
        monkeypatch.setattr("sys.argv", ["script.py", *words])
        return config.parse_config(kind)

    return parse_words


def test_every_field_is_a_flag_and_survives_the_file(parse, tmp_path):
    words = [
        "--network=local",
        "--similarity_scales",
        "1",
        "3",
        "--fixed_shape",
        "10",
        "11",
        "12",
        "--mirror_axis",
        "-1",
    ]
    settings = parse(TrainConfig, [*words, "--valid_dir=elsewhere", "--learning_rate", "2e-4"])
    assert settings == dataclasses.replace(
        TrainConfig(), network="local", similarity_scales=(1, 3), fixed_shape=(10, 11, 12), mirror_axis=-1,
        valid_dir="elsewhere", learning_rate=2e-4,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(config.as_json(settings))
    loaded = config.load_config(tmp_path)
    assert loaded == settings and hash(loaded) == hash(settings)


def test_the_settings_are_few_and_each_has_a_comment():
    names = {name for _, name in FIELDS}
    assert len(names) <= 37
    shared = {field.name for field in dataclasses.fields(TrainConfig)}
    shared &= {field.name for field in dataclasses.fields(InferenceConfig)}
    assert shared == {"model_dir", "train_dir", "initial_alignment"}
    lines = [line.strip() for line in Path(config.__file__).read_text().splitlines()]
    for name in names:
        line = next(line for line in lines if line.startswith(f"{name}:"))
        assert "  # " in line, f"{name} has no comment that tells its meaning, unit and allowed values"


IMPOSSIBLE = [
    "--stepz 3",
    "--network resnet",
    "--network centred",
    "--similarity ncc",
    "--regulariser none",
    "--steps 0",
    "--steps -4",
    "--steps many",
    "--steps 2.5",
    "--batch_size 0",
    "--channels 7",
    "--channels 0",
    "--fixed_shape 8 8",
    "--fixed_shape 4 8 8",
    "--moving_shape 8 8 100000",
    "--voxel_size 0",
    "--voxel_size nan",
    "--similarity_scales",
    "--similarity_scales -1",
    "--similarity_scales inf",
    "--regulariser_weight -1",
    "--regulariser_weight nan",
    "--learning_rate 0",
    "--inter_subject_fraction 1.5",
    "--mirror_axis 3",
    "--affine_augmentation 2",
    "--folds 1",
    "--fold 3",
    "--folds 3 --fold 3",
    "--seed -1",
    "--seed 5000000000",
    "--moving only.nii.gz",
    "--points targets.csv",
    "--tta_samples 0",
    "--weights first",
]


@pytest.mark.parametrize("words", IMPOSSIBLE)
def test_impossible_settings_are_named_with_exit_status_2(words, call):
    """Ours in one line, or in tyro's words where a word cannot be read."""
    names = {name for kind, name in FIELDS if kind is TrainConfig}
    kind = TrainConfig if words.split()[0].lstrip("-") in names | {"stepz"} else InferenceConfig
    script = type("script", (), {"main": lambda: config.parse_config(kind), "__name__": "script"})
    status, _, err = call(script, *words.split())
    named = {"--moving": "fixed", "--folds 3": "fold"}.get(words.rpartition(" --fold ")[0] or words.split()[0])
    assert status == 2 and (named or words.split()[0].lstrip("-")) in err and "Traceback" not in err, err
    assert err.startswith("error: --") == (err.count("\n") == 1), err


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1, 2]", '{"stepz": 3}', '{"steps": "three"}', '{"steps": null}', '{"steps": 2.5}', "\x00",
     '{"network": "centred", "search_channels": [8, 8]}'],
)  # fmt: skip
def test_settings_edited_by_hand_or_of_another_version_get_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match="config.json") as error:
        config.load_config(tmp_path)
    assert "\n" not in str(error.value) and "this version" in str(error.value)


def test_code_in_a_setting_is_not_executed(tmp_path):
    made = tmp_path / "made"
    (tmp_path / "config.json").write_text(json.dumps({"steps": f"__import__('os').mkdir('{made}')"}))
    with pytest.raises(InputError):
        config.load_config(tmp_path)
    assert not made.exists()
