"""The sign that a pair is unlike the training: its distance, its limit, and what it says of noise."""

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.distance import mahalanobis
from test_networks import build, train_a_little

from extras import outliers
from extras.errors import InputError

SHAPES = (20, 18, 17), (16, 15, 14)


def test_distance_agrees_with_scipy(rng):
    pooled, mean, scale = rng.normal(size=(3, 5)), rng.normal(size=5), rng.uniform(1, 2, 5)
    factor = rng.normal(size=(5, 5))
    precision = factor @ factor.T
    expected = [mahalanobis(row / scale, mean / scale, precision) / 5**0.5 for row in pooled]
    np.testing.assert_allclose(outliers.mahalanobis(pooled, mean, scale, precision), expected)


def test_a_signature_is_mean_and_deviation_of_features_and_the_constellation_of_points(rng):
    features = rng.normal(size=(2, 3, 4, 5, 6))
    expected = np.concatenate([features[1].mean(axis=(0, 1, 2)), features[1].std(axis=(0, 1, 2))])
    np.testing.assert_allclose(outliers.signature(features)[1], expected)
    points = rng.normal(size=(2, 16, 3))
    np.testing.assert_allclose(outliers.signature(points)[1], (points[1] - points[1].mean(axis=0)).ravel())
    np.testing.assert_allclose(outliers.signature(points + [5, -3, 2]), outliers.signature(points))


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A network with weights of its own, its folder, and 30 pairs of images of one blob each."""
    rng, folder = np.random.default_rng(1), tmp_path_factory.mktemp("model")
    network = build("composite", *SHAPES, channels=4)
    train_a_little(network, *SHAPES)
    network.save_weights(folder / "best.weights.h5")
    prepared = []
    for _ in range(30):
        pair = {}
        for side, shape in zip(("moving", "fixed"), SHAPES, strict=True):
            image = np.zeros(shape, np.float32)
            image[tuple(rng.integers(5, 10, 3))] = 300
            pair[f"{side}_image"] = ndimage.gaussian_filter(image, 3)[..., None].astype(np.float16)
        prepared.append(pair)
    return network, folder, prepared


def test_a_pair_of_the_same_kind_is_usual_and_noise_is_not(case, rng):
    network, folder, prepared = case
    outliers.write_reference(folder, network, prepared, range(20), range(20, 28))
    model, reference = outliers.signature_model(network), outliers.read_reference(folder)
    assert set(reference) == {"moving_features", "fixed_features", "moving_points", "fixed_points"}
    images = [prepared[28][f"{side}_image"].astype(np.float32) for side in ("moving", "fixed")]
    assert 0 < outliers.outlier_score(model, reference, *images) < 1
    for side in (0, 1):
        noisy = list(images)
        noisy[side] = rng.random(images[side].shape, np.float32)
        assert outliers.outlier_score(model, reference, *noisy) > 1


def test_the_warning_names_the_pair(capsys):
    outliers.warn_of_outlier("usual", 0.9)
    outliers.warn_of_outlier("no_reference", np.nan)
    assert not capsys.readouterr().out
    outliers.warn_of_outlier("strange", 3.25)
    assert "strange: an outlier, unlike the training pairs (score 3.25" in capsys.readouterr().out


def test_without_held_out_pairs_nothing_is_judged(case, tmp_path, capsys):
    network, _, prepared = case
    outliers.write_reference(tmp_path, network, prepared, range(20), [])
    reference = outliers.read_reference(tmp_path)
    assert "no reference to judge by" in capsys.readouterr().out
    assert np.isnan(outliers.outlier_score(outliers.signature_model(network), reference, None, None))


def test_a_worker_without_weights_leaves_the_reference_to_the_first_one(case, tmp_path):
    network, _, prepared = case
    outliers.write_reference(tmp_path, network, prepared, range(20), range(20, 28))
    assert not list(tmp_path.iterdir())


def test_a_damaged_reference_is_one_line(tmp_path):
    (tmp_path / outliers.REFERENCE).write_bytes(b"PK\3\4 not an archive")
    with pytest.raises(InputError, match="outliers.npz: cannot be read"):
        outliers.read_reference(tmp_path)
