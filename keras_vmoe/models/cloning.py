"""New models around the variables of others."""

import functools

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
    """A layer of the same variables and sublayers, to stand in another graph.

    A layer that is called a second time has two outputs, and features of the
    new model could no longer be taken by name. A copy by `from_config` would
    fill memory with weights of its own first: here Keras's constructor makes a
    layer without parts, which then gets those of the other.
    """
    if not isinstance(layer, keras.layers.Layer):  # An operation.
        return type(layer).from_config(layer.get_config())
    if any(isinstance(x, layers.MoEMLP) for x in all_layers(layer)):
        raise ValueError(
            "MoE layers must stand in the graph of a functional model. "
            f"Received: {layer.name!r}, a {type(layer).__name__} that holds "
            "one. Call it on the tensors themselves."
        )
    new = type(layer).__new__(type(layer), **layer.get_config())
    keras.layers.Layer.__init__(
        new,
        activity_regularizer=layer.activity_regularizer,
        trainable=layer.trainable,
        dtype=layer.dtype_policy,
        autocast=layer.autocast,
        name=layer.name,
    )
    for name, part in _attributes(layer).items():
        if name not in _of_every_layer():
            setattr(new, name, part)
    new.supports_masking = layer.supports_masking
    new.input_spec = layer.input_spec
    new.built = layer.built
    return new


def _attributes(layer):
    """The attributes of a layer by name, without those of its class."""
    children = getattr(layer, "named_children", dict)  # Of PyTorch.
    return {**vars(layer), **dict(children())}


@functools.cache
def _of_every_layer():
    """Names of the attributes by which Keras does its own bookkeeping."""
    layer = keras.layers.Layer()
    layer.part = keras.layers.Layer()
    layer.build(())
    return _attributes(layer).keys() - {"part"}
