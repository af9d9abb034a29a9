"""What Keras has no public way for; tests/test_keras.py fails if it changes."""

import contextlib

import keras
from keras.src.backend.common import global_state
from keras.src.utils.rng_utils import get_random_seed

__all__ = [
    "all_layers",
    "get_random_seed",
    "parts_of",
    "uninitialized_variables",
]


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


@contextlib.contextmanager
def uninitialized_variables():
    """Variables that are made in this context have shapes but no values.

    After `StatelessScope(initialize_variables=False)` alone, the next scope
    that ends would fill them; no public way takes them off its list.
    """
    name = "uninitialized_variables"
    waiting = list(global_state.get_global_attribute(name, []))
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        global_state.set_global_attribute(name, waiting)
