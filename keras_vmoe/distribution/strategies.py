"""The ways to spread a training, by name."""

import glob
import math
import os

import keras

from keras_vmoe.distribution.data_parallel import DataParallel
from keras_vmoe.distribution.expert_parallel import ExpertParallel

TPU_VARIABLES, TPU_FILES = ("COLAB_TPU_ADDR", "TPU_NAME"), "/dev/accel*"
JAX_NAMES = ("data_parallel", "expert_parallel")
TF_NAMES = ("mirrored", "tpu")


def resolve(name, num_experts=None, num_expert_shards=None, shard_dense=False):
    """Makes a Keras distribution or a tf.distribute strategy.

    The model must be made, and trained, in its `scope()`.

    | name | backend | what it is |
    |---|---|---|
    | `"data_parallel"` | JAX | `DataParallel` |
    | `"expert_parallel"` | JAX | `ExpertParallel` |
    | `"mirrored"` | TensorFlow | `MirroredStrategy` on all GPUs, or on the logical CPUs |
    | `"tpu"` | TensorFlow | `TPUStrategy` |
    | `"auto"` | both | the best of these that this machine has; None for one device |

    `MultiWorkerMirroredStrategy` is not among them: `fit` of Keras 3.15 fails
    with it, for any model ("Attempt to convert a value (PerReplica: ...) with
    an unsupported type"). Several hosts train by JAX.

    Args:
        name: One of these.
        num_experts: Optional E, of the layers to spread.
        num_expert_shards: Over how many devices experts are spread. None is
            the largest number that divides the devices and the experts.
        shard_dense: Whether "expert_parallel" spreads the dense kernels too.

    Returns:
        Something with a `scope()`, or None.

    Raises:
        ValueError: If the backend has nothing of the name, or shards are asked
            for where there are none.
        RuntimeError: If there is no TPU.
    """  # noqa: E501
    backend = keras.backend.backend()
    names = {"jax": JAX_NAMES, "tensorflow": TF_NAMES}.get(backend, ())
    if name not in (*names, "auto"):
        raise ValueError(
            f"`distribution` must be one of {[*names, 'auto']} with the "
            f"{backend} backend. Received: distribution={name!r}. "
            "JAX spreads experts and data, TensorFlow data; with PyTorch a "
            "model is on one device."
        )
    if name == "auto":
        name = _best(backend, num_experts)
    is_spread = num_expert_shards is not None or shard_dense
    if is_spread and name != "expert_parallel":
        raise ValueError(
            "Only 'expert_parallel' spreads weights. Received: "
            f"num_expert_shards={num_expert_shards}, shard_dense={shard_dense} "
            f"with distribution={name!r}. Leave them out, or use JAX's "
            "'expert_parallel'."
        )
    if name is None:
        return None
    if name == "data_parallel":
        return DataParallel()
    if name == "expert_parallel":
        if num_expert_shards is None:
            devices = len(keras.distribution.list_devices())
            num_expert_shards = math.gcd(devices, num_experts or devices)
        return ExpertParallel(num_expert_shards, shard_dense=shard_dense)
    import tensorflow as tf

    if name == "mirrored":
        kind = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
        devices = tf.config.list_logical_devices(kind)
        return tf.distribute.MirroredStrategy([x.name for x in devices])
    return _tpu(tf)


def num_replicas(strategy):
    """Parts that a batch is cut into."""
    if strategy is None:
        return 1
    if hasattr(strategy, "num_replicas_in_sync"):
        return strategy.num_replicas_in_sync
    return strategy.num_model_replicas


def check_batch(batch_size, images_per_group, replicas, processes=1):
    """Raises unless each replica gets whole groups of images.

    Args:
        batch_size: Images of a step, on all devices of all processes.
        images_per_group: Images that are routed together; 1 without experts.
        replicas: Parts that a batch is cut into.
        processes: Processes that read as many images each.
    """
    parts = math.lcm(replicas * images_per_group, processes)
    if batch_size % parts:
        raise ValueError(
            "A batch must hold as many whole groups of images for each device. "
            f"Received: batch_size={batch_size} for {replicas} devices, "
            f"{images_per_group} images in a group, {processes} processes. "
            f"Choose a multiple of {parts}, or a smaller images_per_group."
        )


def check_groups(batch_size, images_per_group):
    """Raises unless a replica of tf.distribute trains on whole groups.

    A replica never sees the images of the others: a group that lies on two of
    them would be routed as two. Elsewhere nothing happens.

    Args:
        batch_size: Images of this replica; None if not known when traced.
        images_per_group: Images that are routed together; None for all of the
            batch.

    Raises:
        ValueError: As `check_batch`.
    """
    replicas = _replicas_in_sync()
    if replicas == 1 or batch_size is None:
        return
    total = batch_size * replicas
    check_batch(total, images_per_group or total, replicas)


def replica_id():
    """This replica's number inside tf.distribute; None where there is one."""
    if _replicas_in_sync() == 1:
        return None
    import tensorflow as tf

    return tf.distribute.get_replica_context().replica_id_in_sync_group


def _replicas_in_sync():
    """How many replicas compute this together; 1 outside of tf.distribute."""
    if keras.backend.backend() != "tensorflow":
        return 1
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    return 1 if context is None else context.num_replicas_in_sync


def of_sum(function, parts):
    """Applies a function to the sums of what tf.distribute's replicas have.

    Args:
        function: From a list of tensors to one of the same shapes.
        parts: List of this replica's tensors.

    Returns:
        This replica's parts of the results: all replicas' add up to them.
    """
    if replica_id() is None:
        return function(parts)
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    sums = context.all_reduce(tf.distribute.ReduceOp.SUM, parts)
    return [x / context.num_replicas_in_sync for x in function(sums)]


def _best(backend, num_experts):
    """The name of the best that this machine has, or None."""
    if backend == "jax":
        if len(keras.distribution.list_devices()) == 1:
            return None
        return "expert_parallel" if num_experts else "data_parallel"
    if backend != "tensorflow":
        return None
    import tensorflow as tf

    if tf.config.list_physical_devices("TPU") or _has_tpu():
        return "tpu"
    return (
        "mirrored" if len(tf.config.list_physical_devices("GPU")) > 1 else None
    )


def _has_tpu():
    """Whether there is a TPU that TensorFlow does not list before it starts."""
    return any(map(os.environ.get, TPU_VARIABLES)) or bool(glob.glob(TPU_FILES))


def _tpu(tf):
    # A TPU of another host by its name, else one of this host.
    name = None if any(map(os.environ.get, TPU_VARIABLES)) else "local"
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(name)
        if name is None:
            tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
    except (ValueError, tf.errors.OpError) as error:
        raise RuntimeError(
            "TensorFlow must find a TPU. Received: distribution='tpu' "
            f"({error}). Use 'auto' or 'mirrored' on GPUs and CPUs."
        ) from error
    return tf.distribute.TPUStrategy(resolver)
