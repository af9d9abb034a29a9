"""Ways to distribute training, by name."""

import glob
import math
import os
from typing import Any

import keras

from keras_vmoe.distribution.data_parallel import DataParallel
from keras_vmoe.distribution.expert_parallel import ExpertParallel

TPU_VARIABLES, TPU_FILES = ("COLAB_TPU_ADDR", "TPU_NAME"), "/dev/accel*"
NAMES = {
    "jax": ("data_parallel", "expert_parallel"),
    "tensorflow": ("mirrored", "tpu"),
}


def resolve(
    name: str,
    num_experts: int | None = None,
    num_expert_shards: int | None = None,
    shard_dense: bool = False,
) -> Any:
    """Makes a Keras distribution or a tf.distribute strategy.

    The model must be created and trained in its `scope()`. With JAX the names
    are `"data_parallel"` and `"expert_parallel"`, for the classes of this
    package; with TensorFlow `"mirrored"` (all GPUs, or else the logical CPUs)
    and `"tpu"`. `"auto"` picks the best one that the machine supports.

    Args:
        name: One of these names.
        num_experts: Optional E of the layers to shard.
        num_expert_shards: Number of devices that experts are sharded over. None
            means the largest that divides the devices and the experts.
        shard_dense: Whether "expert_parallel" shards the dense kernels too.

    Returns:
        An object with a `scope()`; None if `"auto"` finds a single device.

    Raises:
        ValueError: If the backend does not have `name`, or if weights are to be
            sharded and `name` does not shard them.
        RuntimeError: If there is no TPU.
    """
    backend = keras.backend.backend()
    names = [*NAMES.get(backend, ()), "auto"]
    if name not in names:
        raise ValueError(
            f"`distribution` must be one of {names} with the {backend} "
            f"backend. Received: distribution={name!r}. JAX shards experts and "
            "data, TensorFlow data; with PyTorch a model is on one device."
        )
    if name == "auto":
        name = _best(backend, num_experts)
    is_spread = num_expert_shards is not None or shard_dense
    if is_spread and name != "expert_parallel":
        raise ValueError(
            "Only 'expert_parallel' shards weights. Received: "
            f"num_expert_shards={num_expert_shards}, shard_dense={shard_dense} "
            f"with distribution={name!r}. Omit them, or use JAX's "
            "'expert_parallel'."
        )
    if name == "expert_parallel":
        devices = len(keras.distribution.list_devices())
        largest = math.gcd(devices, num_experts or devices)
        shards = largest if num_expert_shards is None else num_expert_shards
        return ExpertParallel(shards, shard_dense=shard_dense)
    makers = {"data_parallel": DataParallel, "mirrored": _mirrored, "tpu": _tpu}
    return makers[name]() if name else None


def _best(backend, num_experts):
    """The name of the best one that this machine supports, or None."""
    if backend == "jax":
        if len(keras.distribution.list_devices()) == 1:
            return None
        return "expert_parallel" if num_experts else "data_parallel"
    if backend != "tensorflow":
        return None
    import tensorflow as tf

    # TensorFlow lists no TPU before it is initialized.
    has_tpu = any(map(os.environ.get, TPU_VARIABLES)) or glob.glob(TPU_FILES)
    if has_tpu or tf.config.list_physical_devices("TPU"):
        return "tpu"
    gpus = tf.config.list_physical_devices("GPU")
    return "mirrored" if len(gpus) > 1 else None


def _mirrored():
    """One worker's strategy: with several, Keras's `fit` fails."""
    import tensorflow as tf

    kind = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
    devices = tf.config.list_logical_devices(kind)
    return tf.distribute.MirroredStrategy([x.name for x in devices])


def _tpu():
    import tensorflow as tf

    # A TPU of another host by its name, else the one of this host.
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
