"""Weights of `keras.applications.ConvNeXt*` into a `ConvNeXtMoE`."""

import re

import keras
import numpy as np
from keras import ops

from keras_vmoe._keras import all_layers
from keras_vmoe._preprocessing import IMAGENET_MEAN
from keras_vmoe._preprocessing import IMAGENET_STD
from keras_vmoe.checkpoints.assignment import assign
from keras_vmoe.checkpoints.assignment import check_model
from keras_vmoe.checkpoints.assignment import fit_head
from keras_vmoe.checkpoints.assignment import kernel_bias
from keras_vmoe.checkpoints.assignment import known_to
from keras_vmoe.checkpoints.assignment import scale_bias
from keras_vmoe.checkpoints.assignment import with_head
from keras_vmoe.models.convnext import ConvNeXtMoE

MEND = (
    "Build the twin with the same depths, dims and layer scale, such as "
    "models.from_preset('convnext_t') for ConvNeXtTiny."
)


def load_keras_applications(
    model: ConvNeXtMoE, keras_model: keras.Model
) -> ConvNeXtMoE:
    """Assigns the weights of a `keras.applications` ConvNeXt to a dense twin.

    Both then give the same logits for the same images. A `keras.applications`
    model with `include_preprocessing=True` normalizes pixels in [0, 255]
    itself. Ours takes images normalized by `model.preprocessing`, which becomes
    that of `keras_model` or, if it has none, ImageNet's, with which the weights
    were trained. Crop and interpolation stay. A head that is missing or has
    other classes is newly initialized, with a warning. For an MoE model, call
    `models.upcycle` on the twin.

    Args:
        model: A `ConvNeXtMoE` with `moe=None` and the same depths and dims.
        keras_model: A model of `keras.applications`, such as
            `ConvNeXtTiny(weights="imagenet")`.

    Returns:
        The model.

    Raises:
        TypeError: If `model` is not a ConvNeXtMoE.
        ValueError: If weights do not fit; the message lists them.

    Example:

    >>> theirs = keras.applications.ConvNeXtTiny()  # doctest: +SKIP
    >>> ours = models.from_preset("convnext_t")  # doctest: +SKIP
    >>> load_keras_applications(ours, theirs)  # doctest: +SKIP
    """
    _check_dense(model)
    if not isinstance(keras_model, keras.Model):
        raise TypeError(
            "`keras_model` must be a Keras model. Received: keras_model="
            f"{keras_model!r}."
        )
    return _assign(
        model, _keras_arrays(keras_model), _normalization(keras_model)
    )


def load_convnext(model, arrays):
    """Assigns the `TorchArrays` of a ConvNeXt to a dense twin."""
    _check_dense(model)
    return _assign(model, dict(arrays), arrays.preprocessing)


def _check_dense(model):
    check_model(model, ConvNeXtMoE)
    if model.moe is not None:
        raise ValueError(
            "`model` must be dense: experts start from its MLPs. "
            f"Received: model={model.name!r} with {model.moe.num_experts} "
            "experts. Load the twin with moe=None, then call `models.upcycle`."
        )


def _assign(model, arrays, preprocessing):
    """Assigns arrays by our names, and the known preprocessing."""
    preprocessing = known_to(model, preprocessing)
    arrays = fit_head(with_head(arrays, model), model)
    assign(model, _weights(model), arrays, MEND)
    model.preprocessing = preprocessing
    return model


def _normalization(keras_model):
    """Mean and standard deviation of the pixels that a model subtracts."""
    scale, offset = 1.0, 0.0  # Of a `Rescaling` before.
    for layer in all_layers(keras_model):
        if isinstance(layer, keras.layers.Rescaling):
            scale, offset = layer.scale, layer.offset
        if isinstance(layer, keras.layers.Normalization):
            mean = ops.convert_to_numpy(layer.mean).ravel().astype(float)
            std = ops.convert_to_numpy(layer.variance).ravel().astype(float)
            mean, std = (mean - offset) / scale, np.sqrt(std) / scale
            # Without float32's rounding errors.
            return {"mean": mean.round(4), "std": std.round(4)}
    return {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}


def _weights(model):
    """Weights of a dense ConvNeXtMoE by name."""
    weights = {}
    for layer in model.layers:
        name = layer.name
        if name.endswith("norm"):
            weights |= scale_bias(name, layer)
        elif name.endswith("_scale"):
            weights[name] = layer.scale
        elif name.endswith("_mlp"):
            block = name.removesuffix("_mlp")
            weights |= kernel_bias(f"{block}_hidden", layer.hidden_dense)
            weights |= kernel_bias(f"{block}_output", layer.output_dense)
        elif re.fullmatch(r"stem|head|downsample_\d|block_\d+_conv", name):
            weights |= kernel_bias(name, layer)
    return weights


# Keras's names of layers, after the model's name, and ours.
LAYERS = (
    (r"stem_conv", "stem"),
    (r"stem_layernorm", "stem_norm"),
    (r"downsampling_layernorm_(\d)", "downsample_{}_norm"),
    (r"downsampling_conv_(\d)", "downsample_{}"),
    (r"head_layernorm", "norm"),
    (r"head_dense", "head"),
    (r"stage_(\d)_block_(\d+)_depthwise_conv", "block_{}_conv"),
    (r"stage_(\d)_block_(\d+)_layernorm", "block_{}_norm"),
    (r"stage_(\d)_block_(\d+)_pointwise_conv_1", "block_{}_hidden"),
    (r"stage_(\d)_block_(\d+)_pointwise_conv_2", "block_{}_output"),
    (r"stage_(\d)_block_(\d+)_layer_scale", "block_{}_scale"),
)


def _keras_arrays(keras_model):
    """Arrays of a Keras ConvNeXt by our names."""
    found = [
        layer
        for layer in all_layers(keras_model)
        if layer.weights
        and not hasattr(layer, "layers")
        and not isinstance(layer, keras.layers.Normalization)  # Preprocessing.
    ]
    numbers = _block_numbers(found)
    arrays = {}
    for layer in found:
        name = _our_name(layer.name, numbers)
        if not name and isinstance(layer, keras.layers.LayerNormalization):
            name = "norm"  # Without a head Keras gives it a default name.
        arrays |= _arrays(name or layer.name, layer)
    return arrays


def _block_numbers(found):
    """Numbers of the blocks through all stages, by stage and index."""
    pattern = r".*stage_(\d)_block_(\d+)_depthwise_conv"
    matches = (re.fullmatch(pattern, layer.name) for layer in found)
    blocks = sorted((int(m[1]), int(m[2])) for m in matches if m)
    return {block: number for number, block in enumerate(blocks)}


def _our_name(name, numbers):
    """Our name for a Keras layer, or None."""
    for pattern, ours in LAYERS:
        match = re.fullmatch(rf"(?:.*_)?{pattern}", name)
        if match and "block" in ours:
            return ours.format(numbers[int(match[1]), int(match[2])])
        if match:
            return ours.format(*(int(n) + 1 for n in match.groups()))
    return None


def _arrays(name, layer):
    """The arrays of a Keras layer."""
    if isinstance(layer, keras.layers.LayerNormalization):
        variables = scale_bias(name, layer)
    elif isinstance(layer, (keras.layers.Dense, keras.layers.Conv2D)):
        variables = kernel_bias(name, layer)
    elif name.endswith("_scale"):
        variables = {name: layer.gamma}
    else:  # Of another kind of model, which is reported.
        variables = {w.path: w for w in layer.weights}
    arrays = {k: ops.convert_to_numpy(v) for k, v in variables.items()}
    if name.endswith("_conv"):
        # A convolution of D groups: (7, 7, 1, D), ours is (7, 7, D, 1).
        kernel = arrays[f"{name}/kernel"]
        arrays[f"{name}/kernel"] = kernel.swapaxes(2, 3)
    return arrays
