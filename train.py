"""Train a registration network: images in, a displacement field out; labels appear in the loss alone.

    python train.py                          on the example data, which are made first if they are missing
    python train.py --train_dir FOLDER       on your own pairs (README, "Your own data")
    python train.py --resume                 continues what was interrupted, as if it had not been
    python train.py --help                   every setting

Writes to --model_dir: config.json, trained_patients.csv, best.weights.h5, last.weights.h5, checkpoint.npz, history.csv,
history.png, TensorBoard events.
README, "Training".
"""

import config as settings

settings.import_tensorflow()  # before anything else does

# isort: split
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from tqdm import tqdm

import helpers
import pictures
from losses import REGULARISERS, SIMILARITIES, centre_divergence, dice, mean_over_labels, multi_scale
from networks import build_network
from utils import (
    change_greys,
    label_metrics,
    moving_offset,
    random_affine,
    random_smooth,
    reference_grid,
    resample,
    transform_points,
)


def main():
    config = settings.parse_for_training()
    settings.share_cores(config)
    settings.check_model_dir(config)
    strategy, is_chief = choose_strategy(config)
    keras.utils.set_random_seed(config.seed)
    unkept = tempfile.TemporaryDirectory()  # where workers other than the chief write
    model_dir = helpers.make_folder(config.model_dir if is_chief else unkept.name)

    # -- Data: pairs of images, each pair with as many labels as it happens to have --------------------------------
    if settings.trains_on_examples(config) and not settings.EXAMPLE_DIR.exists():
        made = subprocess.run([sys.executable, settings.EXAMPLE_DIR.parent / "make_example_data.py"])
        if made.returncode:
            sys.exit(made.returncode)  # it has said why
    train_pairs = helpers.find_pairs(config.train_dir)
    if config.folds:
        train_pairs, _ = helpers.split_fold(train_pairs, config.folds, config.fold)
    valid_pairs = helpers.find_pairs(config.valid_dir) if config.valid_dir else []
    if config.test_dir:
        helpers.find_pairs(config.test_dir, labels="optional")  # what is missing is said now, not after the training
    checkpoint = Path(config.model_dir) / settings.CHECKPOINT_NAME
    if checkpoint.exists():
        helpers.check_patients(checkpoint.with_name(settings.PATIENTS_NAME), trained=train_pairs)
    pairs = train_pairs + valid_pairs
    prepared = helpers.PreparedPairs(pairs, *settings.grid_settings(config))
    train_numbers, valid_numbers = range(len(train_pairs)), range(len(train_pairs), len(pairs))

    def draw(step):
        drawing = config.batch_size, config.labels_per_pair, config.cross_patient, config.seed
        return helpers.draw_pairs(prepared, train_numbers, step, *drawing)

    def read(step):
        return helpers.read_batch(prepared, draw(step))

    def batches():
        """One for each step that is still to come; the next is read while the step computes."""
        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(read, done["step"])
            for step in range(done["step"] + 1, config.steps + 1):
                batch, coming = coming.result(), reader.submit(read, step)
                yield batch

    # -- Network: it never sees a label ----------------------------------------------------------------------------
    warm_up, peak = config.steps // 10, config.learning_rate
    schedule = keras.optimizers.schedules.CosineDecay(
        peak / 20, config.steps - warm_up, warmup_target=peak, warmup_steps=warm_up
    )
    with strategy.scope():
        network = build_network(config)
        # Decoupled weight decay, as AdamW's; that class would trace the schedule once for every weight even for 0.
        optimizer = keras.optimizers.Adam(schedule, weight_decay=config.weight_decay or None)
        optimizer.build(network.trainable_variables)
        train_step, valid_step = make_steps(config, network, optimizer)

    # -- Optimise: sample, step, report, validate, save ------------------------------------------------------------
    valid_cases = [pair.case for pair in valid_pairs]
    done = {"step": 0, "minutes": 0.0, "best_loss": float("inf"), "valid": valid_cases, "history": [], "recent": []}
    variables = [*network.variables, *optimizer.variables]
    if config.resume and checkpoint.exists():
        done = helpers.load_checkpoint(checkpoint, variables)
        if done["valid"] != valid_cases:  # the best loss so far is of others
            raise settings.InputError(
                f"--valid_dir {config.valid_dir}: found other cases than before, expected the same"
            )
    elif config.resume:
        print(f"{config.model_dir}: nothing to continue; this training begins")
    with helpers.written_aside(model_dir / settings.CONFIG_NAME) as aside:
        aside.write_text(settings.as_json(config))
    helpers.write_csv(model_dir / settings.PATIENTS_NAME, [{"case": p.case, "patient": p.patient} for p in train_pairs])
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
        helpers.save_weights(network, model_dir / settings.WEIGHTS["last"])
        if not valid_pairs or row["valid_loss"] < done["best_loss"]:  # without validation the last are the best known
            done["best_loss"] = row.get("valid_loss", done["best_loss"])
            helpers.save_weights(network, model_dir / settings.WEIGHTS["best"])
        tqdm.write(", ".join(f"{name} {value}" for name, value in row.items()))

    def kept():
        return f"{checkpoint} is of step {saved}" if saved else "no checkpoint yet"

    events = tf.summary.create_file_writer(str(model_dir))
    progress = tqdm(batches(), "training", config.steps, initial=done["step"], unit="step", disable=None)
    with helpers.signals_noted() as signals:
        for batch in progress:
            step = done["step"] + 1
            whole = step % config.valid_every == 0 or step == config.steps
            teaches_all = whole or step % config.local_every == 0 or config.network != "centred"
            try:
                result = train_step(tf.constant(step), teaches_all, **batch)
                result = {name: float(value) for name, value in result.items()}
            except (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError) as error:
                raise settings.InputError(
                    f"step {step}: another worker is gone ({error.message.splitlines()[0][:100]}); start all again "
                    f"with --resume, as many as you like; {kept()}"
                ) from None
            if not np.isfinite(result["loss"]):
                cases = ", ".join(f"{pairs[moving].case} to {pairs[fixed].case}" for moving, fixed, _ in draw(step - 1))
                raise settings.InputError(
                    f"step {step} ({cases}): found a loss of {result['loss']}, expected a number; look at these pairs "
                    f"or try a smaller --learning_rate; {kept()}"
                )
            done |= {"step": step, "minutes": (time.time() - start) / 60}
            if teaches_all:
                done["recent"] = [*done["recent"], result]
                progress.set_postfix({name: f"{value:.3f}" for name, value in result.items()}, refresh=False)
            if whole:
                validate_and_save()
            if whole or signals:
                helpers.save_checkpoint(model_dir / checkpoint.name, variables, done)  # last, when all else is written
                saved = step
            if signals:
                print(f"stopped after step {step}; to continue, repeat the command with --resume")
                sys.exit(128 + signals[0])
    events.close()
    what = "" if config.test_dir or config.folds else " --moving FILE --fixed FILE"
    command = shlex.join([sys.executable, "inference.py", "--model_dir", config.model_dir])
    print(f"trained in {done['minutes']:.1f} minutes; next: {command}{what}")


def make_steps(config, network, optimizer):
    """The training step (augment, predict, warp the labels, compare, descend) and the validation step.

    A training step that does not teach all teaches the centred network's search for the glands alone, in less time.
    On several devices each replica takes its share of the batch, and the gradients' mean is what all of them apply.
    No branch below is on a tensor, so AutoGraph would have nothing to convert; without it a training starts sooner.
    """
    found = {name: output for name, output in network.output.items() if name != "ddf"}
    search = keras.Model(network.inputs, found) if found else None
    strategy = tf.distribute.get_strategy()
    fixed_grid, moving_grid = reference_grid(config.fixed_shape), reference_grid(config.moving_shape)
    offset = moving_offset(config.moving_shape, config.fixed_shape)
    on_gpu = bool(tf.config.list_physical_devices("GPU"))

    # XLA fuses the many small steps of a warp; on a CPU it is no good for the rest.
    @tf.function(autograph=False, jit_compile=True)
    def augment(moving, fixed, moving_place, fixed_place):
        """The pair as if it had been scanned in another position: images and labels, resampled together."""
        (moving_affine, moving_bend), (fixed_affine, fixed_bend) = moving_place, fixed_place
        moving_points = transform_points(moving_grid[None], moving_affine, config.moving_shape) + moving_bend
        fixed_points = transform_points(fixed_grid[None], fixed_affine, config.fixed_shape) + fixed_bend
        return resample(tf.concat(moving, axis=-1), moving_points), resample(tf.concat(fixed, axis=-1), fixed_points)

    @tf.function(autograph=False, jit_compile=True)
    def warp_labels(labels, ddf, affine, bend):
        """One resampling through DDF and augmentation: label'(i) = label(A j + bend(j)), j = i + offset + ddf(i)."""
        points = fixed_grid + offset + ddf
        return resample(labels, transform_points(points, affine, config.moving_shape) + resample(bend, points))

    def compare(outputs, moving_labels, fixed_labels, mask, moving_gland, *moving_place):
        """The loss of what the network gave, its parts and, with a field, two figures that a person can read."""
        gland = centre = 0.0  # how far the centred network's maps are from the two glands, and from their centres
        if search:
            for side, label in {"moving": moving_gland, "fixed": fixed_labels[..., :1]}.items():
                gland += tf.reduce_mean(dice(outputs[f"{side}_gland"], label))
                centre += tf.reduce_mean(centre_divergence(outputs[f"{side}_centre"], label))
        search_loss, maps = gland + 0.1 * centre, {"gland": gland, "centre": centre}
        if "ddf" not in outputs:
            return {"loss": search_loss, **maps}
        ddf = outputs["ddf"]
        warped_labels = warp_labels(moving_labels, ddf, *moving_place)
        similarities = multi_scale(
            SIMILARITIES[config.similarity], warped_labels, fixed_labels, config.similarity_scales
        )
        similarity = mean_over_labels(similarities, mask)
        regulariser = REGULARISERS[config.regulariser](ddf)
        overlap, distance = label_metrics(tf.stop_gradient(warped_labels), fixed_labels)
        return {
            "loss": similarity + config.regulariser_weight * regulariser + search_loss,
            "similarity": similarity,
            "regulariser": regulariser,
            **maps,
            "dice": mean_over_labels(overlap, mask),
            "tre": mean_over_labels(distance, mask) * config.voxel_size,
        }

    def draw_augmentation(step):
        """For the whole batch, so that its meaning does not depend on the number of replicas."""
        seeds = tf.stack([[config.seed, step * 9 + k] for k in range(9)])
        number, greys = config.batch_size, config.intensity_augmentation
        mirror = tf.where(tf.random.stateless_uniform([number], seeds[0]) < 0.5, -1.0, 1.0)
        position = config.affine_augmentation, mirror, config.mirror_axis
        bend = config.elastic_augmentation / config.voxel_size
        drawn = {}
        for k, (side, shape) in enumerate({"moving": config.moving_shape, "fixed": config.fixed_shape}.items(), 1):
            drawn[f"{side}_affine"] = random_affine(seeds[k], number, shape, *position)
            drawn[f"{side}_bend"] = random_smooth(seeds[k + 2], number, shape, 5, 3, bend)
            log_gamma = tf.random.stateless_uniform([number, 1, 1, 1, 1], seeds[k + 4], -greys, greys)
            drawn[f"{side}_gamma"] = tf.exp(log_gamma)
            gain = random_smooth(seeds[k + 6], number, shape, 3, 1, 0.6 * greys)  # as of coils, or a probe's contact
            drawn[f"{side}_gain"] = tf.exp(gain)
        return drawn

    def replica_step(teaches_all, moving_image, fixed_image, moving_labels, fixed_labels, mask, **drawn):
        moving = [moving_image, moving_labels[..., :1]]  # the gland's own copy, for the network that looks for it
        moving_place, fixed_place = ((drawn[f"{side}_affine"], drawn[f"{side}_bend"]) for side in ("moving", "fixed"))
        moving, fixed = augment(moving, [fixed_image, fixed_labels], moving_place, fixed_place)
        moving_image = change_greys(moving[..., :1], drawn["moving_gamma"], drawn["moving_gain"])
        fixed_image = change_greys(fixed[..., :1], drawn["fixed_gamma"], drawn["fixed_gain"])
        taught = network if teaches_all else search
        with tf.GradientTape() as tape:
            outputs = taught([moving_image, fixed_image], training=True)
            result = compare(outputs, moving_labels, fixed[..., 1:], mask, moving[..., 1:], *moving_place)
        gradients = tape.gradient(result["loss"], taught.trainable_variables)
        gradients, result = tf.distribute.get_replica_context().all_reduce("MEAN", (gradients, result))
        gradients, norm = tf.clip_by_global_norm(gradients, 1.0)
        result["loss"] = tf.where(tf.math.is_finite(norm), result["loss"], np.nan)  # which ends the training
        shares = [gradient / strategy.num_replicas_in_sync for gradient in gradients]  # Keras sums them up again
        optimizer.apply_gradients(zip(shares, taught.trainable_variables, strict=True))
        return result

    @tf.function(autograph=False, jit_compile=on_gpu and strategy.num_replicas_in_sync == 1)
    def train_step(step, teaches_all=True, **batch):
        def share():
            rows = [strategy.num_replicas_in_sync, config.batch_size // strategy.num_replicas_in_sync]
            number = tf.distribute.get_replica_context().replica_id_in_sync_group
            whole = {**batch, **draw_augmentation(step)}
            own = {name: tf.reshape(value, [*rows, *value.shape[1:]])[number] for name, value in whole.items()}
            return replica_step(teaches_all, **own)

        return tf.nest.map_structure(lambda v: strategy.experimental_local_results(v)[0], strategy.run(share))

    @tf.function(autograph=False)
    def valid_step(moving_image, fixed_image, moving_labels, fixed_labels, mask):
        outputs = network([moving_image, fixed_image])
        as_it_is = tf.eye(3, 4)[None], tf.zeros((1, *config.moving_shape, 3))
        return compare(outputs, moving_labels, fixed_labels, mask, moving_labels[..., :1], *as_it_is)

    return train_step, valid_step


def choose_strategy(config):
    """One device, all GPUs of this machine, or the machines that TF_CONFIG names; and if this process writes the files.

    README, "Several devices or machines".
    """
    strategy, is_chief = tf.distribute.get_strategy(), True
    try:
        cluster = json.loads(os.environ.get("TF_CONFIG") or "{}").get("cluster")
        if cluster:
            strategy = tf.distribute.MultiWorkerMirroredStrategy()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise settings.InputError(f"TF_CONFIG: {error}; expected JSON with cluster and task") from None
    if cluster:
        resolver = strategy.cluster_resolver
        chief = "chief" if "chief" in resolver.cluster_spec().jobs else "worker"
        is_chief = (resolver.task_type, resolver.task_id) == (chief, 0)
    elif len(tf.config.list_physical_devices("GPU")) > 1:
        strategy = tf.distribute.MirroredStrategy()
    if config.batch_size % strategy.num_replicas_in_sync:
        expected = f"a multiple of the {strategy.num_replicas_in_sync} devices"
        raise settings.InputError(f"--batch_size: found {config.batch_size}, expected {expected}")
    return strategy, is_chief


def mean_of(results):
    """Mean of each entry over a list of dictionaries, to five digits."""
    return {name: float(f"{np.mean([r[name] for r in results]):.5g}") for name in results[0]}


if __name__ == "__main__":
    settings.run(main)
