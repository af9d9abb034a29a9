"""What the models of the papers have in common."""

import inspect
import types
import typing

import keras

from keras_vmoe import layers
from keras_vmoe._checks import check_rates
from keras_vmoe._checks import check_sizes
from keras_vmoe._checks import is_integer
from keras_vmoe._checks import is_number
from keras_vmoe._checks import nearest
from keras_vmoe.layers.freezing import hand_down
from keras_vmoe.layers.freezing import set_trainable_parts
from keras_vmoe.layers.freezing import trainable_parts
from keras_vmoe.models.moe import of_version_0_1

# Arguments of version 0.1.0, under which its `.keras` files hold them.
RENAMED = {
    "drop_path": "drop_path_rate",
    "layer_scale": "layer_scale_init_value",
}


class Options(typing.TypedDict, total=False):
    """The arguments that models of every family take by keyword."""

    activation: str
    channels: int
    drop_path_rate: float
    dtype: typing.Any
    layer_scale_init_value: float | None
    name: str
    trainable: bool


class MoEModel(keras.Model):
    """A functional model made by its arguments, not by its graph.

    A subclass builds its graph in `__init__` and hands over its arguments.
    Each becomes an attribute of its name (`dtype`: `layers_dtype`).
    """

    def __init__(self, inputs, outputs, arguments):
        arguments = dict(arguments)
        super().__init__(
            inputs,
            outputs,
            name=arguments.pop("name"),
            trainable=arguments.pop("trainable"),
        )
        self.layers_dtype = arguments.pop("dtype")
        for name, value in arguments.items():
            setattr(self, name, value)
        self._argument_names = tuple(arguments)
        hand_down(self)

    def get_config(self):
        config = {name: getattr(self, name) for name in self._argument_names}
        return {
            **config,
            "moe": None if self.moe is None else self.moe.to_dict(),
            "dtype": self.layers_dtype,
            "name": self.name,
            "trainable": self.trainable,
            "trainable_parts": trainable_parts(self),
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        if RENAMED.keys() & config.keys() and isinstance(config["moe"], dict):
            config = {**config, "moe": of_version_0_1(config["moe"])}
        config = {RENAMED.get(k, k): v for k, v in config.items()}
        found = config.pop("trainable_parts", {})
        model = cls(**config)
        set_trainable_parts(model, found)
        return model

    def with_graph(self, inputs, outputs):
        """A model of the same arguments around another graph."""
        model = type(self).__new__(type(self))
        arguments = {**self.get_config(), "moe": self.moe}
        MoEModel.__init__(model, inputs, outputs, arguments)
        return model

    @property
    def moe_layers(self):
        """The model's `MoEMLP` layers, from first to last."""
        return [
            layer for layer in self.layers if isinstance(layer, layers.MoEMLP)
        ]


def complete(model_class, options: Options, **defaults):
    """The options of a model with their defaults, checked.

    Args:
        model_class: The model's class, for the message.
        options: What the user gave.
        **defaults: What differs from family to family.

    Returns:
        A namespace of all `Options`, `dtype` as the name of the policy.

    Raises:
        TypeError: If an argument is unknown; Keras ignores those of a
            functional model.
        ValueError: If a value is out of range.
    """
    own = list(inspect.signature(model_class.__init__).parameters)[1:-1]
    known = own + list(Options.__annotations__)
    for name in options.keys() - set(known):
        raise TypeError(
            f"`{model_class.__name__}` takes the arguments {known}. "
            f"Received: {name}={options[name]!r}.{nearest(name, known)}"
        )
    made = types.SimpleNamespace(
        **{
            "channels": 3,
            "drop_path_rate": 0.0,
            "dtype": None,
            "layer_scale_init_value": None,
            "trainable": True,
            **defaults,
            **options,
        }
    )
    check_sizes(channels=made.channels)
    check_rates(drop_path_rate=made.drop_path_rate)
    scale = made.layer_scale_init_value
    if scale is not None and (not is_number(scale) or scale <= 0):
        raise ValueError(
            "`layer_scale_init_value` must be a number above 0, or None for "
            f"no layer scale. Received: layer_scale_init_value={scale!r}."
        )
    dtype = made.dtype or keras.config.dtype_policy()
    made.dtype = keras.dtype_policies.get(dtype).name
    return made


def image_pair(size):
    """`(height, width)` of an image size, checked."""
    pair = (size, size) if is_integer(size) else size
    good = isinstance(pair, (list, tuple)) and len(pair) == 2
    if not good or not all(is_integer(side) and side > 0 for side in pair):
        raise ValueError(
            "`image_size` must be an integer of at least 1 or a pair (height, "
            f"width) of them, in pixels. Received: image_size={size!r}."
        )
    return tuple(pair)
