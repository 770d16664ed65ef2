"""Train a registration network: images in, a dense displacement field (DDF) out; labels appear in the loss alone.

    python train.py                          on the example data, which are made first if they are missing
    python train.py --train_dir FOLDER       on your own pairs (README, "Your own data")
    python train.py --resume                 continues an interrupted training, to the same result

Writes to --model_dir: config.json, trained_patients.csv, best.weights.h5, last.weights.h5, checkpoint.npz, history.csv,
history.png, outliers.npz, TensorBoard events. README, "Training".
"""

from extras import devices  # first: it sets what TensorFlow reads when it is imported

# isort: split
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import keras
import numpy as np
import tensorflow as tf
from tqdm import tqdm

import helpers
import utils
from config import CONFIG_NAME, EXAMPLE_DIR, TrainConfig, as_json, load_config, parse_config
from extras import checkpoint, cross_validation, files, outliers, report
from extras.errors import run
from extras.optimizer import Muon
from losses import LABEL_LOSSES, REGULARISERS, masked_mean, multi_scale
from networks import NETWORKS

WEIGHT_DECAY = 0.4  # each step shrinks every weight by this times the learning rate; it helps where pairs are few
CLIP_NORM = 1.0  # a batch's gradient is cut down to this norm, so that one odd batch cannot dominate the momentum


def main():
    config = parse_config(TrainConfig)
    checkpoint.check_model_dir(config, load_config)
    strategy, write_dir = devices.choose_strategy(config)  # write_dir: model_dir; scratch for all workers but the first
    keras.utils.set_random_seed(config.seed)

    # -- Data: pairs of images, each pair with as many labels as it happens to have
    train_pairs, valid_pairs, held_out_pairs = find_training_pairs(config)
    prepared = helpers.PreparedPairs(train_pairs + valid_pairs + held_out_pairs, *config.grid_options())
    cuts = np.cumsum([len(train_pairs), len(valid_pairs)])
    train_indices, valid_indices, held_out_indices = np.split(np.arange(len(prepared.pairs)), cuts)

    # -- Network: it never sees a label
    with strategy.scope():
        network = NETWORKS[config.network](**config.network_options())
        optimizer = build_optimizer(config, network.trainable_variables)
    train = devices.on_all_replicas(strategy, partial(train_step, config, network, optimizer))
    valid = tf.function(partial(valid_step, config, network), autograph=False)  # no branch on a tensor to convert

    # -- Loop: next batch, step, progress; every `valid_every` steps validate and save
    state = checkpoint.TrainingState(valid_cases=[pair.case for pair in valid_pairs])
    variables = [*network.variables, *optimizer.variables]
    if config.resume:
        checkpoint.load_checkpoint(config.model_dir, train_pairs, variables, state)
    files.write_text(write_dir / CONFIG_NAME, as_json(config))
    cross_validation.write_patients(write_dir, train_pairs)
    events = tf.summary.create_file_writer(str(write_dir))
    remaining = batches(config, prepared, train_indices, state.step)
    progress = tqdm(remaining, desc="training", total=config.steps, initial=state.step, unit="step", disable=None)
    with checkpoint.defer_signals() as signals:
        for batch, cases in progress:
            result = train(batch)
            state.count_step(result, cases)
            progress.set_postfix({name: f"{value:.3f}" for name, value in result.items()}, refresh=False)
            is_validation_step = state.step % config.valid_every == 0 or state.step == config.steps
            if is_validation_step:
                state.add_history_row([valid(helpers.whole_pair(prepared, index)) for index in valid_indices])
                report.write_history(write_dir, state.history, events)
                checkpoint.save_weights(network, write_dir, state)
            if is_validation_step or signals:
                checkpoint.save_checkpoint(write_dir, variables, state)
            if signals:
                print(f"stopped after step {state.step}; to continue, repeat the command with --resume")
                sys.exit(128 + signals[0])
    outliers.write_reference(write_dir, network, prepared, train_indices, [*valid_indices, *held_out_indices])
    checkpoint.print_next_command(config, state)


# -- Data ----------------------------------------------------------------------------------------------------------


def find_training_pairs(config):
    """The pairs to train on, those to validate on, and those of the fold that is held out for inference.py."""
    train_dir, valid_dir = config.train_dir, config.valid_dir
    if train_dir == "example":
        if not EXAMPLE_DIR.exists():
            subprocess.run([sys.executable, EXAMPLE_DIR.parent / "make_example_data.py"], check=True)
        train_dir, valid_dir = EXAMPLE_DIR / "train", valid_dir or EXAMPLE_DIR / "valid"
    valid_pairs = helpers.find_pairs(valid_dir) if valid_dir else []
    train_pairs, held_out_pairs = cross_validation.split_fold(helpers.find_pairs(train_dir), config.folds, config.fold)
    return train_pairs, valid_pairs, held_out_pairs


def sample_batch(config, prepared, indices, step):
    """The arrays of batch number `step`, and the names of its cases. A pure function, so a training can be resumed."""
    rng = np.random.default_rng([config.seed, step])
    sampling = config.labels_per_pair, config.inter_subject_fraction
    drawn = helpers.draw_pairs(rng, prepared, indices, config.batch_size, *sampling)  # some across two patients
    batch = helpers.read_batch(prepared, drawn) | draw_augmentation(config, rng)
    cases = [f"{prepared.pairs[moving].case} to {prepared.pairs[fixed].case}" for moving, fixed, _labels in drawn]
    return batch, ", ".join(cases)


def draw_augmentation(config, rng):
    """{"moving_transform", "moving_intensity", ...: keyword arguments}; a pair is mirrored as a whole or not at all."""
    mirror = rng.choice([-1, 1], config.batch_size)
    elastic, augmentation = config.elastic_augmentation / config.voxel_size, {}  # mm to voxels
    for side, shape in (("moving", config.moving_shape), ("fixed", config.fixed_shape)):
        affine = utils.random_affine(rng, len(mirror), shape, config.affine_augmentation, config.mirror_axis, mirror)
        transform, intensity = utils.random_augmentation(rng, affine, elastic, config.intensity_augmentation)
        augmentation |= {f"{side}_transform": transform, f"{side}_intensity": intensity}
    return augmentation


def batches(config, prepared, indices, steps_done):
    """(batch, cases) for each step that is still to come. The next one is read while a step computes."""
    sample = partial(sample_batch, config, prepared, indices)
    with ThreadPoolExecutor(1) as reader:
        upcoming = reader.submit(sample, steps_done)
        for step in range(steps_done, config.steps):
            result = upcoming.result()
            upcoming = reader.submit(sample, step + 1)
            yield result


# -- One step ------------------------------------------------------------------------------------------------------


def build_optimizer(config, variables):
    """Muon, with a linear warm-up and a cosine decay of the learning rate."""
    schedule = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=config.learning_rate / 20,
        warmup_target=config.learning_rate,
        warmup_steps=config.steps // 10,
        decay_steps=config.steps - config.steps // 10,
    )
    optimizer = Muon(schedule, weight_decay=WEIGHT_DECAY)
    optimizer.build(variables)  # now, so that a checkpoint can fill it
    return optimizer


def train_step(config, network, optimizer, batch):
    """Augment, predict, warp the labels, compare, descend. mask (B, L): 1 where a label counts, 0 where it does not."""
    moving_points = utils.augmented_points(config.moving_shape, **batch["moving_transform"])
    fixed_points = utils.augmented_points(config.fixed_shape, **batch["fixed_transform"])
    moving_image = utils.resample(batch["moving_image"], moving_points)
    fixed_image = utils.resample(batch["fixed_image"], fixed_points)
    moving_image = utils.augment_intensity(moving_image, **batch["moving_intensity"])
    fixed_image = utils.augment_intensity(fixed_image, **batch["fixed_intensity"])
    fixed_labels = utils.resample(batch["fixed_labels"], fixed_points)
    with tf.GradientTape() as tape:
        ddf = network([moving_image, fixed_image], training=True)
        label_points = utils.warp_points(moving_points, ddf)  # by the DDF, then by the augmentation: one resampling
        warped_labels = utils.resample(batch["moving_labels"], label_points)
        result = compute_loss(config, warped_labels, fixed_labels, batch["mask"], ddf)
    gradients = tape.gradient(result["loss"], network.trainable_variables)
    norm = devices.apply_gradients(optimizer, gradients, network.trainable_variables, CLIP_NORM)
    return result | {"gradient_norm": norm}


def valid_step(config, network, batch):
    """The scalars of `compute_loss` of one pair as it is."""
    ddf = network([batch["moving_image"], batch["fixed_image"]])
    warped_labels = utils.warp(batch["moving_labels"], ddf)
    return compute_loss(config, warped_labels, batch["fixed_labels"], batch["mask"], ddf)


def compute_loss(config, warped_labels, fixed_labels, mask, ddf):
    """loss = label_loss + regulariser_weight * regularisation. Dice and tre (centroid distance, mm) are only logged."""
    label_losses = multi_scale(LABEL_LOSSES[config.similarity], warped_labels, fixed_labels, config.similarity_scales)
    label_loss = masked_mean(label_losses, mask)
    regularisation = REGULARISERS[config.regulariser](ddf)
    dice_scores, distances = utils.label_metrics(warped_labels, fixed_labels)
    return {
        "loss": label_loss + config.regulariser_weight * regularisation,
        "label_loss": label_loss,
        "regularisation": regularisation,
        "dice": masked_mean(dice_scores, mask),
        "tre": masked_mean(distances, mask) * config.voxel_size,
    }


if __name__ == "__main__":
    run(main)
