"""Assigns the arrays of a checkpoint to a model: all or none."""

import dataclasses
import math

import keras
import ml_dtypes
import numpy as np

from keras_vmoe._checks import counted
from keras_vmoe._warnings import warn
from keras_vmoe.layers.patches import patch_grid
from keras_vmoe.layers.positions import pair
from keras_vmoe.layers.positions import resize_positions

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
HEAD = ("head/kernel", "head/bias")
GATE = "/Moe/Router/dense/kernel"  # The end of its name.
POSITIONS = "Encoder/posembed_input/pos_embedding"


VMOE_MEND = (
    "Build the model with the architecture of the checkpoint (blocks, MoE "
    "placement, experts, pooling, pre-logits; no layer scale, shared expert or "
    "bias of the router); `checkpoints.vmoe_config` finds it."
)


def assign(model, weights, arrays, mend=VMOE_MEND):
    """Assigns arrays to weights of the same names, after checking all.

    Args:
        model: The model, all of whose weights must be assigned.
        weights, arrays: Dicts by name.
        mend: How to fix arrays that do not fit, for the message.

    Raises:
        ValueError: If arrays are missing, unknown, of another shape or not of
            real numbers; the message lists them. Then no weight has changed.
    """
    named = {id(weight) for weight in weights.values()}
    weights |= {w.path: w for w in model.weights if id(w) not in named}
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    problems = {
        "Missing in the file": [
            f"{name} {tuple(weight.shape)}"
            for name, weight in weights.items()
            if name not in arrays
        ],
        "Not in the model": [
            f"{name} {array.shape}"
            for name, array in arrays.items()
            if name not in weights
        ],
        "Of another shape": [
            f"{name} {arrays[name].shape} for {tuple(weight.shape)}"
            for name, weight in weights.items()
            if name in arrays and arrays[name].shape != tuple(weight.shape)
        ],
    }
    if any(problems.values()):
        found = (
            f"{what}: {some(sorted(names))}."
            for what, names in problems.items()
        )
        raise ValueError(
            "The arrays must be those of the model, name by name and shape by "
            f"shape. Received: {len(arrays)} arrays for {len(weights)} weights."
            f" {' '.join(found)} {mend}"
        )
    for name, array in arrays.items():
        is_number = array.dtype.kind in "biuf" or array.dtype == BFLOAT16
        if not is_number:
            raise ValueError(
                "The arrays must hold real numbers. "
                f"Received: {name} of dtype {array.dtype}. Save it as float32."
            )
    for name, weight in weights.items():
        weight.assign(arrays[name].astype(weight.dtype))


def some(names, most=5):
    """The first of many names, and the number of the rest."""
    more = len(names) - most
    rest = [f"and {more} more"] if more > 0 else []
    return "; ".join([*names[:most], *rest]) or "none"


def with_head(arrays, model) -> dict:
    """Gives arrays without a head one of no class, for `fit_head`."""
    if model.num_classes is None or HEAD[0] in arrays:
        return arrays
    features = model.get_layer("head").kernel.shape[0]
    empty = np.zeros((features, 0)), np.zeros(0)
    return arrays | dict(zip(HEAD, empty, strict=True))


def fit_head(arrays, model):
    """Returns arrays with a newly initialized head if the classes differ.

    Args:
        arrays: Dict from name to numpy array.
        model: A model; if it has no head, the arrays lose theirs.
    """
    kernel, bias = (arrays.get(name) for name in HEAD)
    if kernel is None or bias is None:
        return arrays
    if model.num_classes is None:
        return {k: v for k, v in arrays.items() if k not in HEAD}
    head = model.get_layer("head")
    features, num_classes = head.kernel.shape
    whole = np.ndim(bias) == 1 and np.shape(kernel) == (features, len(bias))
    if not whole or len(bias) == num_classes:
        return arrays  # It fits, or `assign` reports the shapes.
    warn(
        f"The head of the checkpoint has {len(bias)} classes and that of the "
        f"model {num_classes}: the model's is newly initialized."
    )
    fresh = (
        head.kernel_initializer(head.kernel.shape, "float32"),
        head.bias_initializer(head.bias.shape, "float32"),
    )
    fresh = map(keras.ops.convert_to_numpy, fresh)
    return arrays | dict(zip(HEAD, fresh, strict=True))


def fit_positions(
    embedding, model, grid=None, of_class=True, interpolation="bilinear"
):
    """Resizes position embeddings `(1, N, D)` to the patches of a `ViTMoE`.

    Returns those of another rank unchanged: `assign` reports them.

    Args:
        embedding: Array.
        model: A `ViTMoE` with learned positions.
        grid: `(rows, columns)` of its patches. None means the square that the
            tokens form, else the model's.
        of_class: Whether the class token has a position; else it gets zeros.
            The grid takes precedence.
        interpolation: As in `resize_positions`.
    """
    shape, ours = np.shape(embedding), grid_of(model)
    if len(shape) != 3 or shape[0] != 1:
        return embedding
    count, has_class = shape[1], model.pooling == "token"
    num_extra = 0
    if has_class:
        num_extra = num_class_positions(count, grid, of_class)
    if grid is None:
        side = math.isqrt(max(0, count - num_extra))
        grid = (side, side) if count - num_extra == side**2 else ours
        if count - num_extra != math.prod(grid) or not side:
            raise ValueError(
                "Learned positions must be those of a square of patches unless "
                f"`grid` is given. Received: {count} positions for a model "
                f"of {ours[0]} x {ours[1]} patches. Pass grid=(rows, columns) "
                "to `checkpoints.load`."
            )
    table = resize_positions(embedding, grid, ours, num_extra, interpolation)
    if has_class and not num_extra:
        table = np.pad(table, ((0, 0), (1, 0), (0, 0)))
    return table


def num_class_positions(count, grid, of_class):
    """The number of the class token's positions, in a model that has one.

    Args:
        count: Positions.
        grid: `(rows, columns)` or an integer; None if it is unknown.
        of_class: Whether it has one, if the grid does not tell.
    """
    if grid is not None:
        num_patches = math.prod(pair("grid", grid))
        if count - num_patches in (0, 1):
            return count - num_patches
    return int(of_class)


def known_to(model, known):
    """Returns a model's `Preprocessing` with the weights' known attributes.

    Args:
        model: A `ViTMoE` or `ConvNeXtMoE`.
        known: Dict of attributes of a `Preprocessing`.
    """
    ours, known = model.preprocessing, dict(known)
    per_channel = [np.ravel(known.get(x, 0)).tolist() for x in ("mean", "std")]
    if any(len(x) not in (1, ours.channels) for x in per_channel):
        warn(
            f"The mean and standard deviation of the weights' images, "
            f"{per_channel[0]} and {per_channel[1]}, are not those of "
            f"{counted(ours.channels, 'channel')}: the model keeps "
            f"{ours.mean} and {ours.std}."
        )
        del known["mean"], known["std"]
    return dataclasses.replace(ours, **known)


def grid_of(model):
    """`(rows, columns)` of the patches of a `ViTMoE` or its clone."""
    patches = model.get_layer("embedding")
    return patch_grid(model.input_shape[1:3], patches.patch_size)


def check_model(model, kind):
    """Raises unless the model is a `kind`."""
    if not isinstance(model, kind):
        raise TypeError(
            f"`model` must be a {kind.__name__}. "
            f"Received: model={model!r} of type {type(model).__name__} (a "
            "clone is a plain model)."
        )


def kernel_bias(name, layer):
    """The two weights of a dense or convolution layer, by name."""
    return {f"{name}/kernel": layer.kernel, f"{name}/bias": layer.bias}


def scale_bias(name, layer):
    """The two weights of a layer normalization, by name."""
    return {f"{name}/scale": layer.gamma, f"{name}/bias": layer.beta}
