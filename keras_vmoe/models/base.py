"""What the models of the papers have in common."""

import difflib
import inspect

import keras

from keras_vmoe import layers
from keras_vmoe._checks import is_integer
from keras_vmoe._checks import is_number


class MoEModel(keras.Model):
    """A functional model that is made by its arguments, not by its graph.

    A subclass builds its graph in `__init__`, keeps every argument under its
    own name, and its dtype policy's name as `layers_dtype`.
    """

    def with_graph(self, inputs, outputs):
        """A model of the same arguments around another graph."""
        model = type(self).__new__(type(self))
        super(MoEModel, model).__init__(inputs, outputs, name=self.name)
        for argument in set(self.get_config()) - {"dtype", "name", "trainable"}:
            setattr(model, argument, getattr(self, argument))
        model.layers_dtype = self.layers_dtype
        return model

    @property
    def moe_layers(self):
        """The model's `MoEMLP` layers, from first to last."""
        return [
            layer for layer in self.layers if isinstance(layer, layers.MoEMLP)
        ]

    @classmethod
    def from_config(cls, config, custom_objects=None):
        return cls(**config)


def check_unknown(model_class, kwargs):
    """Raises a TypeError for arguments that no model has.

    Keras ignores those of a functional model.
    """
    known = list(inspect.signature(model_class.__init__).parameters)[1:-1]
    for name in kwargs.keys() - {"trainable"}:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise TypeError(
            f"`{model_class.__name__}` takes the arguments {known}. "
            f"Received: {name}={kwargs[name]!r}.{hint}"
        )


def check_layer_scale(value):
    """Raises unless this is a number above 0 or None."""
    if value is not None and (not is_number(value) or value <= 0):
        raise ValueError(
            "`layer_scale` must be a number above 0, or None for none. "
            f"Received: layer_scale={value!r}. DeiT III has 1e-4."
        )


def image_pair(size):
    """`(height, width)` of an image size, checked."""
    pair = (size, size) if is_integer(size) else size
    good = isinstance(pair, (list, tuple)) and len(pair) == 2
    if not good or not all(is_integer(side) and side > 0 for side in pair):
        raise ValueError(
            "`image_size` must be an integer of at least 1 or a pair (height, "
            f"width) of them, in pixels. Received: image_size={size!r}. "
            "Set for example `image_size=224`."
        )
    return tuple(pair)
