"""Routing statistics of any model with MoE layers."""

from typing import Any

import keras

from keras_vmoe import layers
from keras_vmoe._keras import all_layers


def routing_statistics(model: keras.Model) -> dict[str, dict[str, Any]]:
    """Returns the training statistics of each router since the last reset.

    Args:
        model: Any Keras model with `MoEMLP` layers, nested ones included.

    Returns:
        Dict from layer name to a dict with the floats `auxiliary_loss`,
        `dropped_share`, `gate_entropy`, `importance_cv2` and
        `experts_per_image`, and `load_share`, a numpy array `(E,)`: means over
        the training steps. Layers without any are omitted.

    Example:

    >>> routing_statistics(keras.Sequential([keras.layers.Dense(2)]))
    {}
    """
    found = {
        name: layer.router.statistics.result()
        for name, layer in moe_layers(model).items()
    }
    return {name: result for name, result in found.items() if result}


def reset_routing_statistics(model: keras.Model) -> None:
    """Resets the statistics of all MoE layers of a model.

    Args:
        model: Any Keras model.

    Example:

    >>> reset_routing_statistics(keras.Sequential([keras.layers.Dense(2)]))
    """
    for layer in moe_layers(model).values():
        layer.router.statistics.reset()


def moe_layers(model):
    """The `MoEMLP` layers of a model or layer by name, nested ones included.

    Layers of different nested models may share a name: the second becomes
    `<name>_1`, and so on.
    """
    found = {}
    for layer in all_layers(model):
        if isinstance(layer, layers.MoEMLP):
            same = [name for name in found if found[name].name == layer.name]
            suffix = f"_{len(same)}" if same else ""
            found[layer.name + suffix] = layer
    return found
