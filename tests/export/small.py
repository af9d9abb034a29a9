"""Small models with weights far from their start, for all exports."""

import sys

import keras
import numpy as np
import pytest

from keras_vmoe import export
from keras_vmoe import models

# The other backends start a process of TensorFlow, which does the same.
IN_TENSORFLOW = pytest.mark.backends("tensorflow")
# Without a process of the runtime for the agreement check; see `asked_here`.
ASKED_HERE = pytest.mark.usefixtures("asked_here")
CLASSES = tuple("abcdefghij")
FAST = {"capacity_factor": 0.5, "batch_priority": True}
BATCHES = (0, 1, 3, 8, 17)


def vit(num_classes=10, **moe):
    keras.utils.set_random_seed(0)
    return wild(
        models.ViTMoE(
            16, 4, 32, 2, 4, 64, num_classes,
            moe={"layers": [0], "num_experts": 4, **moe} if moe else None,
        )
    )  # fmt: skip


def convnext():
    keras.utils.set_random_seed(0)
    moe = {"layers": "last_2", "num_experts": 4}
    return wild(
        models.ConvNeXtMoE([1, 1], [16, 32], 10, image_size=16, moe=moe)
    )


def swin():
    """Of maps that are filled up and rolled."""
    keras.utils.set_random_seed(0)
    moe = {"layers": "last_2", "num_experts": 4}
    return wild(
        models.SwinMoE(
            [2, 1], [8, 16], [2, 2], 10, 3, 16, patch_size=2, moe=moe
        )
    )


def ensemble():
    keras.utils.set_random_seed(0)
    moe = {"layers": [0], "num_experts": 4}
    return wild(
        models.ViTMoE(16, 4, 32, 2, 4, 64, 10, moe=moe, ensemble_size=2)
    )


MODELS = {
    "swin": swin,
    "ensemble": ensemble,
    "bpr": lambda: vit(num_selected_experts=2, batch_priority=True),
    "expert_choice": lambda: vit(router="expert_choice"),
    "soft": lambda: vit(router="soft"),
    "convnext": convnext,
    "dense": vit,
}


def wild(model):
    """The model with a head that says something."""
    generator = np.random.default_rng(0)
    for weight in model.weights:
        noise = 0.2 * generator.normal(size=weight.shape)
        weight.assign(keras.ops.convert_to_numpy(weight) + noise)
    return model


def images(batch, seed=0):
    """Those of a small batch are the first of a larger one."""
    generator = np.random.default_rng(seed)
    return generator.uniform(-1, 1, (batch, 16, 16, 3)).astype("float32")


def logits(model, images):
    if not len(images):
        return np.zeros((0, 10), "float32")
    return keras.ops.convert_to_numpy(model(images, training=False))


def alone(model, **dials):
    """The model as it is served."""
    if not model.moe_layers or model.moe.router == "soft":
        return model
    return models.set_routing(model, images_per_group=1, **dials)


SIGNATURES = {
    "fast": FAST,
    "accurate": {"num_selected_experts": np.int64(3)},
    "crowded": {"images_per_group": 8, "capacity_factor": 0.5},
    "fast_jpeg": {"input": "encoded", **FAST},
}


def served_folder(model, parent):
    """Exports a model with all kinds of signatures.

    Other backends export the standard ones alone, which takes half the time.
    """
    tested = keras.backend.backend() == "tensorflow"
    return export.saved_model(
        model,
        parent,
        version=3,
        signatures=SIGNATURES if tested else None,
        class_names=CLASSES,
        card={"test_accuracy": 0.5, "preset": None},
    )


if __name__ == "__main__":  # For run_hostile.py.
    print(served_folder(MODELS["bpr"](), sys.argv[1]))
