"""Trains on several processes over the batches of one; prints JSON.

KERAS_BACKEND=jax python -m tests.distribution.run_processes \
    localhost:12345 2 0 FOLDER
"""

import faulthandler
import json
import os
import sys

from tests import devices

faulthandler.dump_traceback_later(240, exit=True)
address, count, index, folder = sys.argv[1:5]
COUNT, INDEX, DEVICES = int(count), int(index), 8
# Read when JAX is imported.
os.environ["XLA_FLAGS"] = devices.flags(DEVICES // COUNT)

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

from keras_vmoe import distribution  # noqa: E402
from keras_vmoe import evaluation  # noqa: E402
from keras_vmoe import models  # noqa: E402
from keras_vmoe.distribution import _processes  # noqa: E402

BATCH, EPOCHS, IMAGES = 16, 2, 48


def main():
    """Two epochs; every process feeds its part of the batches."""
    if COUNT > 1:
        distribution.initialize(address, COUNT, INDEX)
    # Nobody has set a seed so far.
    drawn = keras.random.uniform((4,)) if COUNT > 1 else []
    parallel = distribution.ExpertParallel(4)
    keras.distribution.set_distribution(parallel)
    keras.utils.set_random_seed(0)
    model = models.ViTMoE(
        image_size=8, patch_size=4, hidden_dim=16, num_layers=2, num_heads=2,
        mlp_dim=32, num_classes=4,
        moe={"layers": "every_1", "num_experts": 8, "images_per_group": 2,
             "noise_std": 0.0},
    )  # fmt: skip
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])
    images = np.random.default_rng(0).normal(size=(IMAGES, 8, 8, 3))
    images, labels = images.astype("float32"), np.arange(IMAGES) % 4
    data = tf.data.Dataset.from_tensor_slices(part(images, labels))
    history = model.fit(
        data.batch(BATCH // COUNT, drop_remainder=True),
        epochs=EPOCHS,
        verbose=0,
    ).history
    # The last batch of 11 cannot be split over eight devices.
    batches = [(images[:16], labels[:16]), (images[16:27], labels[16:27])]
    measured = evaluation.measure(model, batches)
    models.save(model, f"{folder}/{COUNT}.keras")
    result = {
        "drawn": np.array(drawn).tolist(),
        "losses": history["loss"],
        "accuracy": history["accuracy"],
        "test": [measured.accuracy, measured.loss],
        "load": [x["load_share"].tolist() for x in measured.routing.values()],
        "errors": errors_of(model, images, labels, data),
    }
    keras.distribution.set_distribution(distribution.DataParallel())
    result["dense"] = errors_of(dense_model(), images, labels, data)
    result["versions"] = error(
        _processes.check_agreement,
        "versions",
        **{**_processes.versions(), "keras": f"3.{INDEX}"},
    )
    print(json.dumps(result))
    if COUNT > 1:
        _processes.leave(0)


def dense_model():
    """Another small model, for data parallelism."""
    layers = [keras.layers.Flatten(), keras.layers.Dense(4)]
    model = keras.Sequential([keras.Input((8, 8, 3)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss)
    return model


def errors_of(model, images, labels, data):
    """What `fit` says of data that would deadlock the processes."""
    full = data.batch(8, drop_remainder=True)

    def batches():
        yield from full

    return {
        "short": error(model.fit, data.batch(5), verbose=0),
        "unequal": error(model.fit, unequal(data), verbose=0),
        "unknown": error(model.fit, full.filter(lambda *_: True), verbose=0),
        "arrays": error(model.fit, images, labels, verbose=0),
        "generator": error(model.fit, batches(), verbose=0),
    }


def part(images, labels):
    """The images of this process: its part of each batch."""
    shape = (IMAGES // BATCH, COUNT, BATCH // COUNT)
    index = np.arange(IMAGES).reshape(shape)[:, INDEX].ravel()
    return images[index], labels[index]


def unequal(data):
    """Another number of batches in each process."""
    return data.take(8 * (1 + INDEX)).batch(8, drop_remainder=True)


def error(function, *args, **kwargs):
    """The message of a function's error; a single process has none."""
    if COUNT == 1:
        return None
    try:
        function(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return None


main()
