"""New models around the variables of others."""

import keras

from keras_vmoe import layers
from keras_vmoe.models.base import MoEModel


def is_graph(model):
    """Whether the layers of this layer can be replaced."""
    if isinstance(model, keras.Sequential):
        return True
    return isinstance(model, keras.Model) and hasattr(model, "operations")


def clone_around(model, change=None, change_config=None):
    """A model of new layers around the same variables, not compiled.

    Args:
        model: A functional or sequential Keras model; nested ones are cloned
            as well.
        change: Function from a `MoEMLP` to the layer in its place; None puts
            one of the same settings there.
        change_config: Function from the `MoEConfig` of our models to that of
            the clone; None leaves it.

    Returns:
        A model of the same class.

    Raises:
        ValueError: If MoE layers are hidden inside of other layers.
    """

    def copy(layer):
        if change is not None and isinstance(layer, layers.MoEMLP):
            return change(layer)
        if is_graph(layer):
            return clone_around(layer, change, change_config)
        return _alias(layer)

    clone = keras.models.clone_model(model, clone_function=copy)
    if isinstance(model, MoEModel):
        clone = model.with_graph(clone.input, clone.output)
        if model.moe is not None and change_config is not None:
            clone.moe = change_config(model.moe)
    return clone


def _alias(layer):
    """A layer of the same variables and sublayers, to stand in another graph.

    A layer that is called a second time has two outputs, and features of the
    new model could no longer be taken by name. A copy by `from_config` would
    fill memory with weights of its own first.
    """
    is_layer = isinstance(layer, keras.layers.Layer)  # Not an operation.
    inner = layer._flatten_layers(include_self=False) if is_layer else ()
    if any(isinstance(x, layers.MoEMLP) for x in inner):
        raise ValueError(
            "MoE layers must stand in the graph of a functional model. "
            f"Received: {layer.name!r}, a {type(layer).__name__} that holds "
            "one. Call it on the tensors themselves."
        )
    alias = object.__new__(type(layer))
    alias.__dict__.update(vars(layer))
    alias.__dict__.update(_inbound_nodes=[], _outbound_nodes=[])
    return alias
