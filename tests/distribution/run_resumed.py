"""Stopped runs that resume elsewhere; prints the results as JSON.

KERAS_BACKEND=jax python -m tests.distribution.run_resumed FOLDER
"""

import json
import os
import pathlib
import sys

import keras

from tests import devices

IS_JAX = keras.backend.backend() == "jax"
DEVICES = 8 if IS_JAX else 2
if IS_JAX:  # Read when JAX counts its devices; much is compiled here.
    os.environ["XLA_FLAGS"] = devices.flags(DEVICES)
else:
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * DEVICES
    )

from keras_vmoe import models  # noqa: E402
from keras_vmoe import training  # noqa: E402
from tests.distribution.stopping import copied_after_one_epoch  # noqa: E402
from tests.training.small import SMALL  # noqa: E402
from tests.training.small import changed  # noqa: E402
from tests.training.small import history  # noqa: E402

COLUMNS = ("loss", "accuracy", "val_loss", "val_accuracy", "auxiliary_loss")
FOLDER = pathlib.Path(sys.argv[1])
# Under tf.distribute replicas have noise of their own. The last batch of 50 has
# 18 images, four groups and a half, which no number of devices divides.
RUN = changed(
    SMALL,
    data_dir=str(FOLDER / "data"),
    validation_split="validation[:50]",
    test_split="test[:50]",
    moe=models.MoEConfig(
        layers="every_1",
        num_experts=8,
        images_per_group=4,
        noise_std=None if IS_JAX else 0.0,
    ),
)
# How it starts, and how it goes on.
if IS_JAX:
    SPREAD = {"distribution": "expert_parallel", "expert_shards": 8}
    OTHERS = {
        "two shards": {"distribution": "expert_parallel", "expert_shards": 2},
        "one device": {},
    }
else:
    SPREAD = {"distribution": "mirrored"}
    OTHERS = {"mirrored": SPREAD}


def train(name, **changes):
    """A run in a folder of its own: its history, weights and test."""
    run = changed(RUN, run_dir=str(FOLDER / name), **changes)
    result = training.train(run)
    keras.distribution.set_distribution(None)
    saved = models.load(result.run_dir / "model.keras")
    rows = history(result.run_dir)
    return {
        "history": [[float(row[name]) for name in COLUMNS] for row in rows],
        "weights": [x.numpy().tolist() for x in saved.weights],
        "test": result.test_accuracy,
    }


def refused():
    """What is said of a batch that holds no whole groups for each device."""
    try:
        train("refused", batch_size=12, **SPREAD)
    except ValueError as error:
        keras.distribution.set_distribution(None)
        return str(error)
    return None


def main():
    """Whole runs, and copies of the second that resume after one epoch."""
    results = {"one": train("one")}
    with copied_after_one_epoch(*(FOLDER / name for name in OTHERS)):
        results["whole"] = train("whole", **SPREAD)
    for name, changes in OTHERS.items():
        results[f"resumed, {name}"] = train(name, **changes)
    print(json.dumps({"refused": refused(), **results}))


main()
