"""How often `inference.py` warns of a pair that is unlike the training: of held-out pairs, and of wrong inputs.

    python tests/check_outliers.py --model_dir model --test_dir data/mrus

Takes the pairs that inference.py takes for the model: its held-out fold, or the example's test patients. --test_dir
names pairs of another kind. Prints for each kind of input the share of pairs that are warned of.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from extras import devices  # noqa: F401  before TensorFlow

# isort: split
import dataclasses

import numpy as np

import helpers
import inference
from config import InferenceConfig, load_config, parse_config
from extras import checkpoint, outliers
from extras.errors import run
from networks import NETWORKS


def fit(image, shape):
    """The middle of an image (..., 1) in a grid of another shape, zeros around it."""
    result = np.zeros((*shape, 1), np.float32)
    both = [np.minimum(image.shape[:3], shape)] * 2
    source, target = ([slice((n - m) // 2, (n - m) // 2 + m) for n, m in zip(s, b, strict=True)]
                      for s, b in zip((image.shape[:3], shape), both, strict=True))  # fmt: skip
    result[tuple(target)] = image[tuple(source)]
    return result


def rotated(image, axes):
    return fit(np.rot90(image, axes=axes), image.shape[:3])


def main():
    config = parse_config(InferenceConfig)
    trained = load_config(config.model_dir)
    network = NETWORKS[trained.network](**trained.network_options())
    checkpoint.load_weights(network, config.model_dir, config.weights)
    model, reference = outliers.signature_model(network), outliers.read_reference(config.model_dir)

    def read(settings):
        pairs = helpers.read_pairs(inference.find_test_pairs(settings, trained), "reading")
        grids = [helpers.pair_to_network(moving, fixed, *trained.grid_options()) for _, moving, fixed in pairs]
        return [[volume.image.astype(np.float32) for volume in pair] for pair in grids]

    pairs = read(dataclasses.replace(config, test_dir=""))
    noise = np.random.default_rng(0).random
    inputs = {
        "held-out pairs": pairs,
        "MR of another patient": [
            (other[0], fixed) for (_, fixed), other in zip(pairs, pairs[1:] + pairs[:1], strict=True)
        ],
        "pairs of --test_dir": read(config) if config.test_dir else [],
        "moving and fixed exchanged": [(fit(f, m.shape[:3]), fit(m, f.shape[:3])) for m, f in pairs],
        "noise for the moving image": [(noise(m.shape, np.float32), f) for m, f in pairs],
        "noise for the fixed image": [(m, noise(f.shape, np.float32)) for m, f in pairs],
    }
    for axis, name in enumerate(("left-right", "front-back", "head-feet")):
        inputs[f"moving image mirrored, {name}"] = [(np.flip(m, axis), f) for m, f in pairs]
        inputs[f"fixed image mirrored, {name}"] = [(m, np.flip(f, axis)) for m, f in pairs]
        axes = [k for k in range(3) if k != axis]
        inputs[f"moving image rotated by 90 degrees about {name}"] = [(rotated(m, axes), f) for m, f in pairs]
        inputs[f"fixed image rotated by 90 degrees about {name}"] = [(m, rotated(f, axes)) for m, f in pairs]
    for kind, images in inputs.items():
        values = np.array([outliers.outlier_score(model, reference, *pair) for pair in images])
        if len(values):
            print(f"{kind:<60}{100 * (values > 1).mean():4.0f} %   median {np.median(values):.2f}")


if __name__ == "__main__":
    run(main)
