"""Train a registration network: images in, a displacement field out; labels appear in the loss alone.

    python train.py                          on the example data, which are made first if they are missing
    python train.py --train_dir FOLDER       on your own pairs (README, "Your own data")
    python train.py --resume                 continues what was interrupted, as if it had not been
    python train.py --help                   every setting

Writes to --model_dir: config.json, best.weights.h5, last.weights.h5, checkpoint.npz, history.csv, history.png,
TensorBoard events.
README, "Training".
"""

import config as settings

settings.import_tensorflow()  # before anything else does

# isort: split
import subprocess
import sys
import time

import keras
import numpy as np
import tensorflow as tf
from tqdm import tqdm

import helpers
import pictures
from losses import REGULARISERS, SIMILARITIES, mean_over_labels, multi_scale
from networks import build_network
from utils import label_metrics, moving_offset, random_affine, random_gamma, reference_grid, resample, transform_points


def main():
    config = settings.parse_for_training()
    settings.check_model_dir(config)
    keras.utils.set_random_seed(config.seed)
    model_dir = helpers.make_folder(config.model_dir)

    # -- Data: pairs of images, each pair with as many labels as it happens to have --------------------------------
    if config.train_dir == str(settings.EXAMPLE_DIR / "train") and not settings.EXAMPLE_DIR.exists():
        subprocess.run([sys.executable, settings.EXAMPLE_DIR.parent / "make_example_data.py"], check=True)
    train_pairs = helpers.find_pairs(config.train_dir)
    if config.folds:
        train_pairs, _ = helpers.split_fold(train_pairs, config.folds, config.fold)
    valid_pairs = helpers.find_pairs(config.valid_dir) if config.valid_dir else []
    pairs = train_pairs + valid_pairs
    prepared = helpers.PreparedPairs(pairs, *settings.grid_settings(config))
    train_numbers, valid_numbers = range(len(train_pairs)), range(len(train_pairs), len(pairs))

    def draw(step):
        drawing = config.batch_size, config.labels_per_pair, config.cross_patient, config.seed
        return helpers.draw_pairs(prepared, train_numbers, step, *drawing)

    def batches():
        for step in range(done["step"], config.steps):
            yield helpers.read_batch(prepared, draw(step))

    first = helpers.read_batch(prepared, draw(0))
    signature = {name: tf.TensorSpec(array.shape, array.dtype) for name, array in first.items()}
    dataset = tf.data.Dataset.from_generator(batches, output_signature=signature).prefetch(4)

    # -- Network: it never sees a label ----------------------------------------------------------------------------
    network = build_network(**settings.network_settings(config))
    warm_up, peak = config.steps // 10, config.learning_rate
    schedule = keras.optimizers.schedules.CosineDecay(
        peak / 20, config.steps - warm_up, warmup_target=peak, warmup_steps=warm_up
    )
    optimizer = keras.optimizers.Adam(schedule, global_clipnorm=1.0)

    train_step, valid_step = make_steps(config, network, optimizer)

    # -- Optimise: sample, step, report, validate, save ------------------------------------------------------------
    with helpers.written_aside(model_dir / settings.CONFIG_NAME) as aside:
        aside.write_text(settings.as_json(config))
    done = {"step": 0, "minutes": 0.0, "best_loss": float("inf"), "history": [], "recent": []}
    checkpoint = model_dir / settings.CHECKPOINT_NAME
    optimizer.build(network.trainable_variables)
    variables = [*network.variables, *optimizer.variables]
    if checkpoint.exists():  # --resume, or check_model_dir would have refused
        done = helpers.load_checkpoint(checkpoint, variables)
    saved, start = done["step"], time.time() - 60 * done["minutes"]

    def validate_and_save():
        row = {"step": done["step"], "minutes": round(done["minutes"], 2), **mean_of(done["recent"])}
        if valid_pairs:
            results = [valid_step(**helpers.whole_pair(prepared, number)) for number in valid_numbers]
            row |= {f"valid_{name}": value for name, value in mean_of(results).items()}
        done["history"].append(row)
        done["recent"] = []
        helpers.write_csv(model_dir / "history.csv", done["history"])
        pictures.plot_history(model_dir / "history.png", done["history"])
        with events.as_default(done["step"]):
            for name, value in row.items():
                tf.summary.scalar(name, value)
        helpers.save_weights(network, model_dir / settings.LAST_NAME)
        if not valid_pairs or row["valid_loss"] < done["best_loss"]:  # without validation the last are the best known
            done["best_loss"] = row.get("valid_loss", done["best_loss"])
            helpers.save_weights(network, model_dir / settings.BEST_NAME)
        tqdm.write(", ".join(f"{name} {value:.4g}" for name, value in row.items()))

    events = tf.summary.create_file_writer(str(model_dir))
    progress = tqdm(dataset, "training", config.steps, initial=done["step"], unit="step", disable=None)
    with helpers.signals_noted() as signals:
        for batch in progress:
            step = done["step"] + 1
            result = {name: float(value) for name, value in train_step(tf.constant(step), **batch).items()}
            if not np.isfinite(result["loss"]):
                cases = ", ".join(f"{pairs[moving].case} to {pairs[fixed].case}" for moving, fixed, _ in draw(step - 1))
                last = f"{checkpoint} is of step {saved}" if saved else "no checkpoint yet"
                raise settings.InputError(
                    f"step {step} ({cases}): found a loss of {result['loss']}, expected a number; look at these pairs "
                    f"or try a smaller --learning_rate; {last}"
                )
            done |= {"step": step, "minutes": (time.time() - start) / 60, "recent": [*done["recent"], result]}
            progress.set_postfix({name: f"{value:.3f}" for name, value in result.items()}, refresh=False)
            whole = step % config.valid_every == 0 or step == config.steps
            if whole:
                validate_and_save()
            if whole or signals:
                helpers.save_checkpoint(checkpoint, variables, done)  # last, when all else is written
                saved = step
            if signals:
                print(f"stopped after step {step}; to continue, repeat the command with --resume")
                sys.exit(128 + signals[0])
    events.close()
    what = "" if config.test_dir or config.folds else " --moving FILE --fixed FILE"
    print(f"trained in {done['minutes']:.1f} minutes; next: python inference.py --model_dir {model_dir}{what}")


def make_steps(config, network, optimizer):
    """The training step (augment, predict, warp the labels, compare, descend) and the validation step."""
    fixed_grid, moving_grid = reference_grid(config.fixed_shape), reference_grid(config.moving_shape)
    offset = moving_offset(config.moving_shape, config.fixed_shape)
    on_gpu = bool(tf.config.list_physical_devices("GPU"))

    @tf.function(jit_compile=True)
    def augment(moving, fixed, moving_affine, fixed_affine):
        """The pair as if it had been scanned in another position: images and labels, resampled together."""
        moving_points = transform_points(moving_grid[None], moving_affine, config.moving_shape)
        fixed_points = transform_points(fixed_grid[None], fixed_affine, config.fixed_shape)
        return resample(tf.concat(moving, axis=-1), moving_points), resample(tf.concat(fixed, axis=-1), fixed_points)

    @tf.function(jit_compile=True)  # XLA fuses the many small steps of a warp; on a CPU it is no good for the rest
    def warp_labels(labels, ddf, moving_affine):
        """One resampling through DDF and augmentation together: label'(i) = label(A (i + offset + ddf(i)))."""
        return resample(labels, transform_points(fixed_grid + offset + ddf, moving_affine, config.moving_shape))

    def compare(outputs, moving_labels, fixed_labels, mask, moving_affine, moving_gland):
        """The loss of what the network gave, its parts, and two figures that a person can read."""
        ddf = outputs["ddf"]
        warped_labels = warp_labels(moving_labels, ddf, moving_affine)
        similarities = multi_scale(
            SIMILARITIES[config.similarity], warped_labels, fixed_labels, config.similarity_scales
        )
        similarity = mean_over_labels(similarities, mask)
        regulariser = REGULARISERS[config.regulariser](ddf)
        gland = 0.0  # how far the gland maps of the centred network are from the gland, 0 to 2
        if "moving_gland" in outputs:
            glands = {"moving_gland": moving_gland, "fixed_gland": fixed_labels[..., :1]}
            gland = tf.add_n([tf.reduce_mean(SIMILARITIES["dice"](outputs[k], label)) for k, label in glands.items()])
        dice, distance = label_metrics(tf.stop_gradient(warped_labels), fixed_labels)
        return {
            "loss": similarity + config.regulariser_weight * regulariser + gland,
            "similarity": similarity,
            "regulariser": regulariser,
            "gland": gland,
            "dice": mean_over_labels(dice, mask),
            "tre": mean_over_labels(distance, mask) * config.voxel_size,
        }

    @tf.function(jit_compile=on_gpu)
    def train_step(step, moving_image, fixed_image, moving_labels, fixed_labels, mask):
        seeds = tf.stack([[config.seed, step * 5 + k] for k in range(5)])
        side = tf.where(tf.random.stateless_uniform([config.batch_size], seeds[0]) < 0.5, -1.0, 1.0)
        size, mirroring = config.affine_augmentation, (side, config.mirror_axis)
        moving_affine = random_affine(seeds[1], config.batch_size, config.moving_shape, size, *mirroring)
        fixed_affine = random_affine(seeds[2], config.batch_size, config.fixed_shape, size, *mirroring)
        moving = [moving_image, moving_labels[..., :1]]  # the gland's own copy, for the network that looks for it
        moving, fixed = augment(moving, [fixed_image, fixed_labels], moving_affine, fixed_affine)
        moving_image = random_gamma(moving[..., :1], seeds[3], config.intensity_augmentation)
        fixed_image = random_gamma(fixed[..., :1], seeds[4], config.intensity_augmentation)
        with tf.GradientTape() as tape:
            outputs = network([moving_image, fixed_image], training=True)
            result = compare(outputs, moving_labels, fixed[..., 1:], mask, moving_affine, moving[..., 1:])
        gradients = tape.gradient(result["loss"], network.trainable_variables)
        optimizer.apply_gradients(zip(gradients, network.trainable_variables, strict=True))
        return result

    @tf.function
    def valid_step(moving_image, fixed_image, moving_labels, fixed_labels, mask):
        outputs = network([moving_image, fixed_image])
        return compare(outputs, moving_labels, fixed_labels, mask, tf.eye(3, 4)[None], moving_labels[..., :1])

    return train_step, valid_step


def mean_of(results):
    """Mean of each entry over a list of dictionaries."""
    return {name: round(float(np.mean([r[name] for r in results])), 5) for name in results[0]}


if __name__ == "__main__":
    settings.run(main)
