"""Trains on virtual devices under MirroredStrategy; prints JSON.

KERAS_BACKEND=tensorflow python -m tests.distribution.run_mirrored vit 2
"""

import json
import sys

import keras
import numpy as np
import tensorflow as tf

from keras_vmoe import distribution
from keras_vmoe import evaluation
from keras_vmoe import layers
from keras_vmoe import models
from keras_vmoe.distribution import _replicas
from keras_vmoe.layers import stochastic
from keras_vmoe.training import optimizers
from keras_vmoe.training.callbacks import RoutingHistory

FAMILY, DEVICES = sys.argv[1], int(sys.argv[2])
BATCH, STEPS = 16, 5


def make_model(noise_std=0.0, jit_compile=False):
    """A tiny model with two MoE layers, in groups of two images."""
    keras.utils.set_random_seed(0)
    moe = {
        "layers": "every_1", "num_experts": 4, "images_per_group": 2,
        "capacity_factor": 1.0, "noise_std": noise_std,
        "importance_loss_weight": 1.0, "load_loss_weight": 1.0,
    }  # fmt: skip
    if FAMILY.startswith("vit"):
        model = models.ViTMoE(
            image_size=8, patch_size=4, hidden_dim=16, num_layers=2,
            num_heads=2, mlp_dim=32, num_classes=4, moe=moe,
        )  # fmt: skip
    else:
        model = models.ConvNeXtMoE(
            depths=(1, 1), dims=(8, 16), num_classes=4, image_size=8,
            patch_size=2, moe=moe,
        )  # fmt: skip
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # Weights move by the gradients themselves.
    optimizer = optimizers.SGD(0.1)
    if FAMILY == "vit_clip":
        optimizer = optimizers.AdamW(
            1e-3, weight_decay=0.1, global_clipnorm=0.1
        )
    accuracy = keras.metrics.SparseCategoricalAccuracy("accuracy")
    model.compile(optimizer, loss, metrics=[accuracy], jit_compile=jit_compile)
    return model


def train(model):
    """Losses and weights of a few steps."""
    images = np.random.default_rng(0).normal(size=(STEPS * BATCH, 8, 8, 3))
    images = images.astype("float32")
    labels = np.arange(len(images)) % 4
    history = model.fit(
        images, labels, BATCH, 2, verbose=0, shuffle=False,
        callbacks=[RoutingHistory()],
    ).history  # fmt: skip
    measured = evaluation.measure(model, [(images[:11], labels[:11])])
    return {
        **{name: list(map(float, x)) for name, x in history.items()},
        "evaluate": model.evaluate(images, labels, BATCH, verbose=0),
        "measure": [measured.accuracy, measured.loss],
        "weights": [x.numpy().tolist() for x in model.trainable_weights],
    }


def noise_of_replicas(strategy):
    """What dropout, drop path and a noisy gate draw in each replica."""
    with strategy.scope():
        dropout, path = stochastic.SeededDropout(0.5), stochastic.DropPath(0.5)
        router = layers.TopKRouter(4, 1, noise_std=1.0)
        router.build((None, 6, 8))

    def draw():
        logits = tf.zeros((1, 6, 4))
        return (
            dropout(tf.ones((64,)), training=True),
            path(tf.ones((64, 1)), training=True),
            router._add_noise(logits),
        )

    result = tf.function(lambda: strategy.run(draw))()
    return [
        [
            x.numpy().ravel().tolist()
            for x in strategy.experimental_local_results(y)
        ]
        for y in result
    ]


def compiles():
    """Whether XLA takes the training step, as a TPU would."""
    model = make_model(noise_std=1.0, jit_compile=True)
    images = np.zeros((BATCH, 8, 8, 3), "float32")
    loss = model.train_on_batch(images, np.zeros(BATCH, "int32"))
    return bool(np.isfinite(loss).all())


def main():
    """One device, or several."""
    if DEVICES == 1:
        result = train(make_model())
        result["compiles"] = compiles()
    else:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * DEVICES
        )
        strategy = distribution.resolve("mirrored")
        assert _replicas.num_replicas(strategy) == DEVICES
        with strategy.scope():
            result = train(make_model())
        result["noise"] = noise_of_replicas(strategy)
    print(json.dumps(result))


main()
