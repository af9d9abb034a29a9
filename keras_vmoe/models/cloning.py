"""New models that share the variables of others."""

import functools
import itertools

import keras

from keras_vmoe import layers
from keras_vmoe._keras import all_layers
from keras_vmoe.models.base import MoEModel


def is_graph(model):
    """Whether the layers of this layer can be replaced."""
    if isinstance(model, keras.Sequential):
        return True
    return isinstance(model, keras.Model) and hasattr(model, "operations")


def clone_around(model, change=None, change_config=None):
    """Returns an uncompiled model of new layers with the same variables.

    Args:
        model: A functional or sequential Keras model; nested ones are cloned
            as well.
        change: Function from a `MoEMLP` to its replacement; None makes one
            with the same settings.
        change_config: Function from the `MoEConfig` of a `MoEModel` to the
            clone's; None keeps it.

    Returns:
        A model, of the same class if it is a `MoEModel` or if Keras's
        `clone_model` keeps the class.

    Raises:
        ValueError: If MoE layers are hidden inside other layers.
    """

    def copy(layer):
        if isinstance(layer, layers.MoEMLP):
            return layer.sharing() if change is None else change(layer)
        if is_graph(layer):
            return clone_around(layer, change, change_config)
        return _sharing(layer)

    clone = keras.models.clone_model(model, clone_function=copy)
    if isinstance(model, MoEModel):
        clone = model.with_graph(clone.input, clone.output)
        if model.moe is not None and change_config is not None:
            clone.moe = change_config(model.moe)
    return clone


def _sharing(layer):
    """Returns a layer with the same variables and sublayers, for a new graph.

    A layer that is called a second time has two outputs, and the new model
    could no longer find its features by name. A copy from `from_config` would
    first fill memory with its own weights. Instead, Keras's constructor makes a
    layer without parts, which then gets the parts of the other. If the parts do
    not fully define the layer, the layer itself is called a second time.
    """
    if not isinstance(layer, keras.layers.Layer):  # An operation.
        return type(layer).from_config(layer.get_config())
    if any(isinstance(x, layers.MoEMLP) for x in all_layers(layer)):
        raise ValueError(
            "MoE layers must be in the graph of a functional model. "
            f"Received: {layer.name!r}, a {type(layer).__name__} that holds "
            "one. Call it on the tensors themselves."
        )
    try:
        new = type(layer).__new__(type(layer), **layer.get_config())
    except NotImplementedError:  # By Keras, for a layer without a config.
        return layer
    keras.layers.Layer.__init__(
        new,
        activity_regularizer=layer.activity_regularizer,
        trainable=layer.trainable,
        dtype=layer.dtype_policy,
        autocast=layer.autocast,
        name=layer.name,
    )
    for name, part in _attributes(layer).items():
        if name not in _of_every_layer() or isinstance(part, bool):
            setattr(new, name, part)
    new.input_spec = layer.input_spec
    same = itertools.zip_longest(new.variables, layer.variables)
    return new if all(a is b for a, b in same) else layer


def _attributes(layer):
    """Returns the attributes of a layer, not of its class, by name.

    They are in the order in which the layer created its variables and
    sublayers, as files store its weights, whatever its `__init__` set first.
    """
    parts = [*layer.variables, *all_layers(layer)]
    order = {id(part): i for i, part in enumerate(parts)}
    children = getattr(layer, "named_children", dict)  # Of PyTorch.
    attributes = {**vars(layer), **dict(children())}

    def first(name):
        found = keras.tree.flatten(attributes[name])
        return min((order.get(id(x), -1) for x in found), default=-1)

    return {name: attributes[name] for name in sorted(attributes, key=first)}


@functools.cache
def _of_every_layer():
    """Names of the attributes that Keras uses for its own bookkeeping."""
    layer = keras.layers.Layer()
    layer.part = keras.layers.Layer()
    layer.part.build(())
    layer.build(())
    return _attributes(layer).keys() - {"part"}
