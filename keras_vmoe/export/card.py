"""The model card: what an exported folder says of itself."""

import dataclasses
import json
import math
import pathlib
import platform

import keras

from keras_vmoe import models
from keras_vmoe.data.tensorflow_runtime import import_tensorflow
from keras_vmoe.export.variants import features_of
from keras_vmoe.export.variants import has_classes
from keras_vmoe.export.variants import moe_layers_of
from keras_vmoe.export.variants import routed
from keras_vmoe.models.costs import slots_of
from keras_vmoe.version import __version__

CARD = pathlib.Path("assets.extra", "model_card.json")
LABELS = CARD.with_name("labels.txt")


def write_card(folder, model, settings):
    """Writes `model_card.json`, and the names of the classes beside it.

    Args:
        folder: `pathlib.Path` of a version.
        model: The model, under its own routing.
        settings: `ServedSettings`.
    """
    path = folder / CARD
    path.parent.mkdir(exist_ok=True)
    card = make_card(model, settings)
    path.write_text(json.dumps(card, indent=2) + "\n")
    if settings.class_names is not None:
        names = "".join(f"{x}\n" for x in settings.class_names)
        (folder / LABELS).write_text(names, "utf-8")


def make_card(model, settings):
    """The model card as a dict that JSON takes."""
    costs = {}
    for name, signature in settings.signatures.items():
        variant = routed(model, signature.routing)
        cost = models.cost(_asked(variant, signature))
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
        "quantize_experts": settings.quantize_experts,
        "signatures": costs,
        "versions": {
            "keras_vmoe": __version__,
            "keras": keras.__version__,
            "tensorflow": import_tensorflow().__version__,
            "python": platform.python_version(),
        },
    }


def _asked(model, signature):
    """The part of a model that a signature runs."""
    if not (signature.features and has_classes(model)):
        return model
    return keras.Model(model.inputs, features_of(model))


def _routing(layer):
    """What a MoE layer's router really does."""
    names = ("num_selected_experts", "capacity_factor", "batch_priority")
    found = {name: getattr(layer.router, name, None) for name in names}
    tokens = math.prod(layer.get_build_config()["input_shape"][1:-1])
    return {
        "layer": layer.name,
        "router": type(layer.router).__name__,
        "num_experts": layer.num_experts,
        "images_per_group": layer.images_per_group,
        **{k: v for k, v in found.items() if v is not None},
        # Rounded up, for a group: dials that round to the same do the same.
        "places_per_image": slots_of(layer, tokens),
    }
