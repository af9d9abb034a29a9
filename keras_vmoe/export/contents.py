"""Contents of a version besides graph and weights: model card and warm-up."""

import dataclasses
import json
import math
import pathlib
import platform

import keras
import numpy as np

from keras_vmoe import models
from keras_vmoe._extras import require
from keras_vmoe.data.tensorflow_runtime import import_tensorflow
from keras_vmoe.export.settings import INPUT_NAMES
from keras_vmoe.export.variants import features_of
from keras_vmoe.export.variants import has_classes
from keras_vmoe.export.variants import moe_layers_of
from keras_vmoe.export.variants import routed
from keras_vmoe.models.costs import slots_of
from keras_vmoe.version import __version__

CARD = pathlib.Path("assets.extra", "model_card.json")
LABELS = CARD.with_name("labels.txt")
WARMUP = CARD.with_name("tf_serving_warmup_requests")
# Names that a user's own entries may not have.
CARD_NAMES = (
    "name", "model", "params", "image_size", "channels", "num_classes",
    "preprocessing", "max_batch_size", "max_pixels", "quantize_experts",
    "signatures", "versions",
)  # fmt: skip


def newest_version(directory):
    """The folder of the highest version in a directory, or None."""
    found = [path.parent for path in directory.glob("*/saved_model.pb")]
    versions = {int(x.name): x for x in found if x.name.isdecimal()}
    return versions[max(versions)] if versions else None


def write_card(folder, model, settings):
    """Writes `model_card.json`, and the class names next to it.

    Args:
        folder: `pathlib.Path` of a version.
        model: The model, with its own routing.
        settings: `Settings`.
    """
    path = folder / CARD
    path.parent.mkdir(exist_ok=True)
    card = make_card(model, settings)
    text = json.dumps(card, indent=2, default=lambda number: number.item())
    path.write_text(text + "\n")
    if settings.class_names is not None:
        names = "".join(f"{x}\n" for x in settings.class_names)
        (folder / LABELS).write_text(names, "utf-8")


def make_card(model, settings):
    """The model card as a dict of JSON values."""
    costs = {}
    for name, signature in settings.signatures.items():
        variant = asked = routed(model, signature.routing)
        if signature.features and has_classes(model):
            asked = keras.Model(variant.inputs[0], features_of(variant))
        cost = models.cost(asked)
        costs[name] = {
            **dataclasses.asdict(signature),
            "routing": [_routing(layer) for layer in moe_layers_of(variant)],
            "multiply_adds_per_image": cost.macs,
            "active_params": cost.active_params,
        }
    return {
        "name": model.name,
        "model": type(model).__name__,
        **settings.card,
        "params": model.count_params(),
        "image_size": list(model.input_shape[1:3]),
        "channels": model.input_shape[-1],
        "num_classes": getattr(model, "num_classes", model.output_shape[-1]),
        "preprocessing": dataclasses.asdict(settings.preprocessing),
        "max_batch_size": settings.max_batch_size,
        "max_pixels": settings.max_pixels,
        "quantize_experts": settings.quantize_experts,
        "signatures": costs,
        "versions": {
            "keras_vmoe": __version__,
            "keras": keras.__version__,
            "tensorflow": import_tensorflow().__version__,
            "python": platform.python_version(),
        },
    }


def _routing(layer):
    """How an MoE layer routes, with all defaults resolved."""
    names = ("num_selected_experts", "capacity_factor", "batch_priority")
    found = {name: getattr(layer.router, name, None) for name in names}
    tokens = math.prod(layer.get_build_config()["input_shape"][1:-1])
    return {
        "layer": layer.name,
        "router": type(layer.router).__name__,
        "num_experts": layer.num_experts,
        "images_per_group": layer.images_per_group,
        **{k: v for k, v in found.items() if v is not None},
        # Rounded up, per group: capacities that round to the same are the same.
        "slots_per_image": slots_of(layer, tokens),
    }


def write_warmup(folder, shape, settings):
    """Writes requests that TF Serving replays before it accepts traffic.

    Args:
        folder: `pathlib.Path` of a version.
        shape: `(H, W, C)` of the model's images.
        settings: `Settings`.
    """
    tf = import_tensorflow()
    logs = require("tensorflow_serving.apis.prediction_log_pb2", "serving")
    path = folder / WARMUP
    path.parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for name, signature in settings.signatures.items():
            for batch in settings.warmup_batches:
                images = noise(signature.input, (batch, *shape))
                log = logs.PredictionLog()
                request = log.predict_log.request
                request.model_spec.signature_name = name
                request.inputs[INPUT_NAMES[signature.input]].CopyFrom(
                    tf.make_tensor_proto(images)
                )
                writer.write(log.SerializeToString())


def noise(kind, shape, seed=0):
    """Noise images in the form that a signature takes.

    Args:
        kind: `Signature.input`.
        shape: `(B, H, W, C)`.
        seed: Integer.

    Returns:
        Array `(B, H, W, C)`, or `(B,)` of JPEG files.
    """
    pixels = np.random.default_rng(seed).integers(0, 256, shape, "uint8")
    if kind == "float":
        return (pixels / 127.5 - 1).astype("float32")
    if kind == "uint8":
        return pixels
    encode = import_tensorflow().io.encode_jpeg
    return np.array([encode(image).numpy() for image in pixels])
