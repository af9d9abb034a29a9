"""The common base of the papers' models."""

import dataclasses
import os
import types
import typing
import warnings
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_vmoe import layers
from keras_vmoe._checks import check_flags
from keras_vmoe._checks import check_positive
from keras_vmoe._checks import check_rates
from keras_vmoe._checks import check_sizes
from keras_vmoe._checks import is_integer
from keras_vmoe._checks import nearest
from keras_vmoe._checks import plain
from keras_vmoe._keras import all_layers
from keras_vmoe._preprocessing import Preprocessing
from keras_vmoe._preprocessing import check_preprocessing
from keras_vmoe._typing import Config
from keras_vmoe._typing import Tensor
from keras_vmoe._warnings import warn
from keras_vmoe.layers.parts import hand_down
from keras_vmoe.layers.parts import set_state_of_parts
from keras_vmoe.layers.parts import state_of_parts
from keras_vmoe.models import rematerialization
from keras_vmoe.models.moe import MoEConfig
from keras_vmoe.models.moe import of_version_0_1

# Argument names of version 0.1.0, also in its `.keras` files.
RENAMED = {
    "drop_path": "drop_path_rate",
    "layer_scale": "layer_scale_init_value",
}

# Larger pixels are not normalized: by ImageNet's statistics all are below 3.
LIMIT = 32


class Options(typing.TypedDict, total=False):
    """Keyword arguments common to all model families."""

    activation: str
    channels: int
    drop_path_rate: float
    dtype: Any
    layer_scale_init_value: float | None
    name: str
    preprocessing: Preprocessing | dict | None
    remat: bool
    trainable: bool


class MoEModel(keras.Model):
    """A functional model defined by its arguments, not by its graph.

    A subclass builds its graph in `__init__` and passes its arguments on.
    Each becomes an attribute of the same name (`dtype`: `layers_dtype`).
    """

    def __init__(
        self, inputs: Any, outputs: Any, arguments: Mapping[str, Any]
    ) -> None:
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
        self._warns_of_pixels = self._looks_at_batches = True
        if self.remat:  # In a function: Keras would track a list of models.
            parts = rematerialization.segments(self)
            self._segments = lambda: parts
        hand_down(self)

    def for_images(self, image_size: Any) -> dict[str, Any]:
        """Returns the arguments that change for images of another size."""
        return {"image_size": image_size}

    @property
    def preprocessing(self) -> Preprocessing:
        """The `data.Preprocessing` of the model's images."""
        return self._preprocessing

    @preprocessing.setter
    def preprocessing(
        self, value: Preprocessing | Mapping[str, Any] | None
    ) -> None:
        channels = self.input_shape[-1]
        made: Preprocessing = Preprocessing.of(value)
        if made.channels != channels:
            raise ValueError(
                "`preprocessing` must have the channels of the model. "
                f"Received: preprocessing.channels={made.channels} for "
                f"{channels}."
            )
        self._preprocessing = made

    def call(
        self,
        inputs: Any,
        training: bool | None = None,
        mask: Any = None,
    ) -> Tensor:
        (images,) = keras.tree.flatten(inputs)
        self._check_size(images.shape)
        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            # A pipeline that decodes files knows no sizes; the model does.
            inputs = images = tf.ensure_shape(images, self.input_shape)
        dtype = keras.backend.standardize_dtype(images.dtype)
        if "int" in dtype:
            self._warn_of_pixels(f"images of {dtype}")
        if self.remat and training:
            return rematerialization.train_in_segments(self._segments(), images)
        return super().call(inputs, training=training, mask=mask)

    def _check_size(self, shape):
        """Raises for images of another size, as far as sizes are known."""
        if getattr(shape, "rank", 4) is None:  # Of TensorFlow.
            return
        sizes = zip(shape[1:], self.input_shape[1:], strict=False)
        differ = any(None not in pair and len({*pair}) > 1 for pair in sizes)
        if differ or len(shape) != 4:
            raise ValueError(
                "The images of a model must have the shape (B, "
                f"{', '.join(map(str, self.input_shape[1:]))}). Received: "
                f"images of shape {tuple(shape)}. Resize them, as "
                "`keras_vmoe.data.load` does, or the model with "
                "`keras_vmoe.models.with_image_size`."
            )

    def fit(
        self, x: Any = None, *args: Any, **kwargs: Any
    ) -> keras.callbacks.History:
        self._check_pixels(x)
        check_preprocessing(self, kwargs.get("validation_data"))
        is_tensorflow = keras.backend.backend() == "tensorflow"
        if is_tensorflow and self.optimizer and not self.optimizer.built:
            # A first step that creates variables is traced twice.
            with self.distribute_strategy.scope():
                self.optimizer.build(self.trainable_variables)
        return super().fit(x, *args, **kwargs)

    def evaluate(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        self._check_pixels(x)
        return super().evaluate(x, *args, **kwargs)

    def predict(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        self._check_pixels(x)
        return super().predict(x, *args, **kwargs)

    def train_on_batch(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        self._check_first_pixels(x)
        return super().train_on_batch(x, *args, **kwargs)

    def test_on_batch(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        self._check_first_pixels(x)
        return super().test_on_batch(x, *args, **kwargs)

    def predict_on_batch(self, x: Any) -> Any:
        self._check_first_pixels(x)
        return super().predict_on_batch(x)

    def _check_first_pixels(self, x):
        """Checks the pixels of the first batch only: a loop need not wait."""
        if self._looks_at_batches:
            self._looks_at_batches = False
            self._check_pixels(x)

    def _check_pixels(self, x):
        """Raises or warns if images are not normalized for the model.

        Floats from datasets, generators and loaders pass: checking would read
        their first batch a second time, or run in every compiled step.
        """
        check_preprocessing(self, x)
        images = next(iter(keras.tree.flatten(x)), None)
        is_array = "float" in str(getattr(images, "dtype", None))
        if self._warns_of_pixels and is_array:
            first = keras.ops.convert_to_numpy(images[:32])
            largest = abs(first).max(initial=0)
            if largest > LIMIT:
                self._warn_of_pixels(f"values up to {largest:g}")

    def _warn_of_pixels(self, found):
        """Warns once of unnormalized images, unless the model takes them."""
        brightest = self.preprocessing.normalized(np.full(1, 255, "float32"))
        if self._warns_of_pixels and np.max(brightest) <= LIMIT:
            self._warns_of_pixels = False
            warn(
                "Images must be normalized by the model's preprocessing. "
                f"Received: {found}. Pass `model.preprocessing.normalized(x)` "
                "for pixels in [0, 255], or read them with "
                "`keras_vmoe.data.load`."
            )

    def quantize(self, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            # Keras warns of each layer that has nothing to quantize.
            warnings.filterwarnings("ignore", "Layer .* have a `quantize`")
            super().quantize(*args, **kwargs)

    def export(
        self,
        filepath: str | os.PathLike[str],
        format: str = "tf_saved_model",  # noqa: A002
        **kwargs: Any,
    ) -> Any:
        found = {getattr(x, "activation", None) for x in all_layers(self)}
        is_right = keras.backend.backend() == "tensorflow"
        is_right &= keras.activations.gelu not in found
        if format == "onnx" and not is_right:
            raise ValueError(
                "Keras writes ONNX files under TensorFlow only, and without "
                "the exact GELU. Received: format='onnx'. Use "
                "`keras_vmoe.export.onnx(model, path)`."
            )
        return super().export(filepath, format=format, **kwargs)

    def get_config(self) -> Config:
        config = {name: getattr(self, name) for name in self._argument_names}
        return {
            **config,
            "moe": None if self.moe is None else self.moe.to_dict(),
            "preprocessing": dataclasses.asdict(self.preprocessing),
            "dtype": self.layers_dtype,
            "name": self.name,
            "trainable": self.trainable,
            "parts": state_of_parts(self),
        }

    @classmethod
    def from_config(
        cls, config: Config, custom_objects: Mapping[str, Any] | None = None
    ) -> typing.Self:
        if RENAMED.keys() & config.keys() and isinstance(config["moe"], dict):
            config = {**config, "moe": of_version_0_1(config["moe"])}
        config = {RENAMED.get(k, k): v for k, v in config.items()}
        found = config.pop("parts", {})
        model = cls(**config)
        set_state_of_parts(model, found)
        return model

    def with_graph(self, inputs: Any, outputs: Any) -> typing.Self:
        """Returns a model with the same arguments around another graph."""
        model = type(self).__new__(type(self))
        arguments = {**self.get_config(), "moe": self.moe}
        del arguments["parts"]  # The graph's layers hold them.
        MoEModel.__init__(model, inputs, outputs, arguments)
        return model

    @property
    def moe_layers(self) -> list[layers.MoEMLP]:
        """The model's `MoEMLP` layers, from first to last."""
        return [
            layer for layer in self.layers if isinstance(layer, layers.MoEMLP)
        ]


def complete(model_class, arguments, options: Mapping[str, Any], **defaults):
    """Returns all arguments of a model as a checked namespace.

    Args:
        model_class: The model's class, for the message.
        arguments: Dict of the arguments of its family.
        options: The `Options` that the user set.
        **defaults: Defaults of the options that differ between families.

    Returns:
        A namespace, with `moe` as a `MoEConfig` or None and `dtype` as the name
        of the policy.

    Raises:
        TypeError: If an option is unknown; Keras would ignore it.
        ValueError: If a value is out of range.
    """
    known = [*arguments, *Options.__annotations__]
    for name in options.keys() - set(known):
        raise TypeError(
            f"`{model_class.__name__}` takes the arguments {known}. "
            f"Received: {name}={options[name]!r}.{nearest(name, known)}"
        )
    given = {
        **arguments,
        "channels": 3,
        "drop_path_rate": 0.0,
        "dtype": None,
        "layer_scale_init_value": None,
        "preprocessing": None,
        "remat": False,
        "trainable": True,
        **defaults,
        **options,
    }
    made = types.SimpleNamespace(**{k: plain(v) for k, v in given.items()})
    classes = 1 if made.num_classes is None else made.num_classes
    check_sizes(num_classes=classes, channels=made.channels)
    check_rates(drop_path_rate=made.drop_path_rate)
    check_flags(remat=made.remat)
    if made.layer_scale_init_value is not None:
        check_positive(layer_scale_init_value=made.layer_scale_init_value)
    if made.preprocessing is None:
        made.preprocessing = Preprocessing(channels=made.channels)
    made.moe = None if made.moe is None else MoEConfig.from_dict(made.moe)
    dtype = made.dtype or keras.config.dtype_policy()
    made.dtype = keras.dtype_policies.get(dtype).name
    return made


def blocks(
    settings,
    sizes,
    sparse,
    num_selected_experts,
    ensemble_size=None,
    **kwargs,
):
    """Yields each block's MLP or MoE layer and its branches' options.

    `sizes` holds `(features, hidden_dim)` for each block, `sparse` the indices
    of the blocks with a MoE layer.
    """
    kwargs |= {"activation": settings.activation, "dtype": settings.dtype}
    for i, (features, hidden_dim) in enumerate(sizes):
        if i in sparse:
            mlp = settings.moe.make_layer(
                i,
                features,
                hidden_dim,
                f"block_{i}_moe",
                num_selected_experts,
                ensemble_size,
                **kwargs,
            )
        else:
            mlp = layers.MLP(hidden_dim, name=f"block_{i}_mlp", **kwargs)
        rate = settings.drop_path_rate * i / max(1, len(sizes) - 1)
        scale = settings.layer_scale_init_value
        yield mlp, {"drop_path_rate": rate, "layer_scale_init_value": scale}


def image_input(settings):
    """Returns a model's symbolic images, `(B, H, W, channels)`."""
    size = (None, None)
    if settings.image_size is not None:
        size = image_pair(settings.image_size)
    return keras.Input((*size, settings.channels), name="images")


def classifier(x, settings, kernel_initializer):
    """Maps features `(B, D)` to logits; without classes, returns them."""
    if settings.num_classes is None:
        return x
    return keras.layers.Dense(
        settings.num_classes,
        kernel_initializer=kernel_initializer,
        dtype="float32",
        name="head",
    )(x)


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
