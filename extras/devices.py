"""What computes: one processor, all GPUs of this machine, or the machines that TF_CONFIG names.

Import this before TensorFlow. On some processors (seen on one with AVX2 but without AVX-512) TensorFlow leaves oneDNN's
3D convolutions off, which are many times faster than its own. docs/devices.md.
"""

import json
import os
import tempfile

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # no notices
# isort: split
import tensorflow as tf

from extras.errors import InputError, WorkerLostError, expect
from extras.files import ensure_writable_dir

SCRATCH = tempfile.TemporaryDirectory()  # removed when the program ends


def describe():
    """What TensorFlow computes on, in a few words."""
    gpus = tf.config.list_physical_devices("GPU")
    names = [tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name) for gpu in gpus]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = tf.config.threading.get_intra_op_parallelism_threads() or cores
    return f"computing on {', '.join(names) or f'the CPU, {threads} thread' + 's' * (threads > 1)}"


def choose_strategy(config):
    """The tf.distribute strategy, and the folder to write to: model_dir, or scratch for all workers but the chief."""
    strategy = tf.distribute.get_strategy()
    try:
        cluster = json.loads(os.environ.get("TF_CONFIG") or "{}").get("cluster")
        if cluster:
            strategy = tf.distribute.MultiWorkerMirroredStrategy()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"TF_CONFIG: {error}; expected JSON with cluster and task") from None
    if not cluster and len(tf.config.list_physical_devices("GPU")) > 1:
        strategy = tf.distribute.MirroredStrategy()
    size, count = config.batch_size, strategy.num_replicas_in_sync
    expect(size % count == 0, "--batch_size", size, f"a multiple of the {count} devices")
    print(describe())
    is_chief = strategy.extended.should_checkpoint
    return strategy, ensure_writable_dir(config.model_dir if is_chief else SCRATCH.name)


def apply_gradients(optimizer, gradients, variables, clip_norm):
    """A step of the optimizer on the gradients' mean over all replicas, clipped. Returns their norm before that."""
    context = tf.distribute.get_replica_context()
    gradients, norm = tf.clip_by_global_norm(context.all_reduce("MEAN", gradients), clip_norm)
    shares = [gradient / context.num_replicas_in_sync for gradient in gradients]  # Keras sums them up again
    optimizer.apply_gradients(zip(shares, variables, strict=True))
    return norm


def on_all_replicas(strategy, replica_step):
    """A graph of `replica_step` (batch -> dictionary of scalars) for all devices of a strategy.

    Each device takes an equal share of the batch; the scalars are averaged over devices. The step contains no branch on
    a tensor, so AutoGraph would have nothing to convert.
    """

    def run(batch):
        context = tf.distribute.get_replica_context()
        index, count = context.replica_id_in_sync_group, strategy.num_replicas_in_sync

        def share(array):
            return tf.reshape(array, [count, array.shape[0] // count, *array.shape[1:]])[index]

        result = replica_step(tf.nest.map_structure(share, batch))
        return context.all_reduce("MEAN", result)

    @tf.function(autograph=False)
    def graph(batch):
        return {name: strategy.experimental_local_results(v)[0] for name, v in strategy.run(run, (batch,)).items()}

    def step(batch):
        try:
            return {name: float(value) for name, value in graph(batch).items()}
        except (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError) as error:
            reason = error.message.splitlines()[0][:100]
            message = f"another worker is gone ({reason}); start all again with --resume, as many as you like"
            raise WorkerLostError(message) from None

    return step
