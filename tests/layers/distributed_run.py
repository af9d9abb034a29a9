"""Trains a MoE layer on virtual devices; prints the history as JSON.

KERAS_BACKEND=jax python -m tests.layers.distributed_run 2
"""

import json
import os
import sys

from tests import devices

DEVICES = int(sys.argv[1])
os.environ["XLA_FLAGS"] = devices.flags(DEVICES)  # Read when JAX is imported.

import keras  # noqa: E402
import numpy as np  # noqa: E402

from keras_vmoe import layers  # noqa: E402
from keras_vmoe.training.callbacks import RoutingHistory  # noqa: E402


def make_model():
    """Two groups of two images for each of two devices; without noise."""
    keras.utils.set_random_seed(0)
    router = layers.TopKRouter(
        4, num_selected_experts=2, capacity_factor=0.5, noise_std=0.0
    )
    inputs = keras.Input((6, 8))
    outputs = layers.MoEMLP(4, 8, router, images_per_group=2, name="moe")(
        inputs
    )
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    return model


def make_distributed_model():
    if keras.backend.backend() == "jax":
        found = keras.distribution.list_devices()
        assert len(found) == DEVICES
        parallel = keras.distribution.DataParallel(devices=found)
        keras.distribution.set_distribution(parallel)
        return make_model()
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * DEVICES
    )
    names = [f"CPU:{i}" for i in range(DEVICES)]
    with tf.distribute.MirroredStrategy(names).scope():
        return make_model()


def main():
    model = make_distributed_model()
    images = np.random.default_rng(0).normal(size=(16, 6, 8))
    images = images.astype("float32")
    routing = RoutingHistory(per_layer=True)
    history = model.fit(
        images,
        images,
        batch_size=8,
        epochs=2,
        shuffle=False,
        verbose=0,
        callbacks=[routing],
    ).history
    print(json.dumps({k: list(map(float, v)) for k, v in history.items()}))


if __name__ == "__main__":
    main()
