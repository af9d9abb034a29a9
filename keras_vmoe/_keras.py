"""What Keras has no public way for; tests/test_keras.py fails if it changes."""

from keras.src.utils.rng_utils import get_random_seed

__all__ = ["all_layers", "get_random_seed", "parts_of"]


def all_layers(layer):
    """A layer or model and all layers inside it, nested ones included.

    `Model.layers` lists neither the layers of nested models nor those that a
    layer is made of.
    """
    return list(layer._flatten_layers())


def parts_of(layer):
    """The layers that a layer or model is directly made of."""
    parts = layer._flatten_layers(include_self=False, recursive=False)
    return list(dict.fromkeys(parts))
