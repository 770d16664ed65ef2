"""Settings: one spelling, one line for each mistake, and the same settings after a round trip through JSON."""

import dataclasses
import json
from pathlib import Path

import pytest

import config
from config import Config, InputError


def test_every_field_is_a_flag_and_survives_the_file(tmp_path):
    words = ["--network=composite", "--ddf_levels", "1", "3", "--fixed_shape", "10", "11", "12", "--mirror_axis", "-1"]
    settings = config.parse([*words, "--valid_dir=", "--learning_rate", "2e-4"])
    assert settings == dataclasses.replace(
        Config(), network="composite", ddf_levels=(1, 3), fixed_shape=(10, 11, 12), mirror_axis=-1, valid_dir="",
        learning_rate=2e-4,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(config.as_json(settings))
    assert config.load(tmp_path / "config.json") == settings


def test_every_field_has_a_comment():
    source = Path(config.__file__).read_text()
    for field in dataclasses.fields(Config):
        line = next(line for line in source.splitlines() if line.strip().startswith(f"{field.name}:"))
        assert "  # " in line, f"{field.name} has no comment that tells its meaning, unit and allowed values"


@pytest.mark.parametrize(
    "words",
    [
        "--stepz 3",
        "--network resnet",
        "--similarity ncc",
        "--regulariser none",
        "--steps 0",
        "--steps -4",
        "--steps many",
        "--steps 2.5",
        "--batch_size 0",
        "--channels 7",
        "--channels 0",
        "--search_channels 8",
        "--search_channels 8 12",
        "--first_kernel 4",
        "--fixed_shape 8 8",
        "--fixed_shape 4 8 8",
        "--moving_shape 8 8 100000",
        "--voxel_size 0",
        "--voxel_size nan",
        "--ddf_levels 0 7",
        "--similarity_scales -1",
        "--regulariser_weight -1",
        "--regulariser_weight nan",
        "--learning_rate 0",
        "--cross_patient 1.5",
        "--mirror_axis 3",
        "--affine_augmentation 2",
        "--folds 1",
        "--folds 3 --fold 3",
        "--fold 3",
        "--moving only.nii.gz",
        "--seed -1",
        "--seed 5000000000",
    ],
)
def test_impossible_settings_end_with_one_line_that_names_them(words):
    with pytest.raises(InputError) as error:
        config.parse(words.split())
    message = str(error.value)
    assert "\n" not in message and words.split()[-2 if "fold " in words else 0].lstrip("-") in message, message


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '{"stepz": 3}', '{"steps": "three"}', '{"steps": null}', "\x00"])
def test_settings_edited_by_hand_are_checked(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(InputError, match="config.json") as error:
        config.load(path)
    assert "\n" not in str(error.value)


def test_own_training_data_are_not_judged_by_the_example(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--train_dir", "mine"])
    settings = config.parse_for_training()
    assert (settings.valid_dir, settings.test_dir) == ("", "")
    monkeypatch.chdir(config.EXAMPLE_DIR.parents[1])
    monkeypatch.setattr("sys.argv", ["train.py", "--train_dir", "data/example/train"])
    assert config.parse_for_training().valid_dir == Config().valid_dir
    monkeypatch.setattr("sys.argv", ["train.py"])
    assert config.parse_for_training() == Config()


def test_unknown_saved_settings_are_not_executed(tmp_path):
    made = tmp_path / "made"
    (tmp_path / "config.json").write_text(json.dumps({"steps": f"__import__('os').mkdir('{made}')"}))
    with pytest.raises(InputError):
        config.load(tmp_path / "config.json")
    assert not made.exists()


@pytest.mark.parametrize(
    "network, cores, threads", [("centred", 2, "1"), ("centred", 8, None), ("local", 2, None), ("composite", 2, None)]
)
def test_only_the_centred_network_gives_each_operation_one_of_two_cores(monkeypatch, network, cores, threads):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setattr("os.environ", {})
    config.share_cores(Config(network=network))
    assert config.os.environ.get("TF_NUM_INTRAOP_THREADS") == threads
    monkeypatch.setattr("os.environ", {"TF_NUM_INTRAOP_THREADS": "7"})
    config.share_cores(Config(network=network))
    assert config.os.environ == {"TF_NUM_INTRAOP_THREADS": "7"}
