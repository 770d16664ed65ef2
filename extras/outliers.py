"""Outlier (out-of-distribution) detection: is a pair like those that a model was trained on? It needs no label.

A signature of each image, how GlobalNet's points lie to each other and what the coarsest features are on average, has a
Mahalanobis distance from those of the training pairs (Lee et al. 2018, arXiv 1807.03888). Pairs that the training held
out say how large it may be. Above that limit, the outlier score of a pair is above 1.
"""

from pathlib import Path

import keras
import numpy as np

from extras.checkpoint import WEIGHTS, load_weights
from extras.errors import reading
from extras.files import atomic_write, warn

REFERENCE = "outliers.npz"
DEVIATIONS = 4  # the limit lies so many standard deviations above the mean of the held-out pairs
SHRINKAGE = 0.3  # of the correlations towards none: a signature has more numbers than there are patients
FEWEST = 5  # pairs of either kind; fewer say too little of what is usual
MOST_PAIRS = 200  # of the training pairs that are looked at; enough for a large data set, too


def signature_model(network):
    """A Keras model of the same two images -> {name: points (B, K, 3) or coarsest features (B, X, Y, Z, C)}.

    Those of LocalNet, which see both images at once and tell less of either, only where there is no GlobalNet.
    """
    outputs = {v.name: v.output for v in network.layers if v.name.endswith(("_points", "_features"))}
    of_one_image = {name: output for name, output in outputs.items() if name != "local_features"}
    return keras.Model(network.inputs, of_one_image or outputs)


def signature(output):
    """A vector for each image (B, S): points about their mean, or mean and deviation of each feature."""
    values = np.reshape(output, (len(output), -1, output.shape[-1]))
    mean = values.mean(axis=1, keepdims=True)
    parts = values - mean if np.ndim(output) == 3 else np.stack([mean[:, 0], values.std(axis=1)], axis=1)
    return parts.reshape(len(output), -1)


def mahalanobis(signatures, mean, scale, precision):
    """Distance (B,) of signatures (B, S); that of a typical training pair is about 1."""
    z = (signatures - mean) / scale
    return np.sqrt(np.einsum("bs,st,bt->b", z, precision, z) / z.shape[1])


def write_reference(model_dir, network, prepared, train_indices, held_out_indices):
    """Keep beside the best weights how they see the training pairs, and the limit that held-out pairs give."""
    has_weights = (Path(model_dir) / WEIGHTS["best"]).exists()  # a resumed worker's scratch folder may have none
    if not has_weights or min(len(train_indices), len(held_out_indices)) < FEWEST:
        return
    load_weights(network, model_dir, "best")
    model, reference = signature_model(network), {}
    train_indices = train_indices[:: -(-len(train_indices) // MOST_PAIRS)]
    trained, held_out = (
        model.predict([np.stack([prepared[i][f"{side}_image"] for i in indices]) for side in ("moving", "fixed")], 4, 0)
        for indices in (train_indices, held_out_indices)
    )
    for name in trained:
        known = signature(trained[name])
        mean, scale = known.mean(axis=0), known.std(axis=0) + 1e-6
        correlation = np.cov((known - mean) / scale, rowvar=False)
        precision = np.linalg.inv((1 - SHRINKAGE) * correlation + SHRINKAGE * np.eye(len(mean)))
        usual = mahalanobis(signature(held_out[name]), mean, scale, precision)
        reference[name] = mean, scale, precision, usual.mean() + DEVIATIONS * usual.std()
    with atomic_write(Path(model_dir) / REFERENCE) as path:
        np.savez(path, **{f"{name}/{k}": v for name, values in reference.items() for k, v in enumerate(values)})


def read_reference(model_dir):
    """What `write_reference` kept, {name: (mean, scale, precision, limit)}, or None."""
    path = Path(model_dir) / REFERENCE
    if not path.exists():
        print(f"no reference to judge by whether a pair is like the training: fewer than {FEWEST} pairs were held out")
        return None
    with reading(path, "the file that train.py wrote"), np.load(path) as arrays:
        names = dict.fromkeys(key.split("/")[0] for key in arrays)
        return {name: [arrays[f"{name}/{k}"] for k in range(4)] for name in names}


def outlier_score(model, reference, moving_image, fixed_image):
    """Distance of a pair from the training as a share of the limit; NaN without a reference.

    model: of `signature_model`; images (MX, MY, MZ, 1) and (X, Y, Z, 1).
    """
    if not reference:
        return np.nan
    outputs = model([moving_image[None], fixed_image[None]])
    return max(mahalanobis(signature(outputs[n]), *known)[0] / limit for n, (*known, limit) in reference.items())


def warn_of_outlier(case, value):
    """Name the pair if its outlier score is above 1."""
    if value > 1:
        warn(f"{case}: an outlier, unlike the training pairs (score {value:.2f}, limit 1); look at the result")
