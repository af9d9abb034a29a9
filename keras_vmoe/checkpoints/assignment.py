"""Assigns the arrays of a checkpoint to a model: all or none."""

import warnings

import keras
import ml_dtypes
import numpy as np

from keras_vmoe.layers.patches import patch_grid
from keras_vmoe.models.base import image_pair

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
HEAD = ("head/kernel", "head/bias")
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
            real numbers; the message lists them. No weight has changed then.
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
            f"{what}: {'; '.join(sorted(names)) or 'none'}."
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


def fit_head(arrays, model):
    """Arrays with a newly initialised head where the classes differ.

    Args:
        arrays: Dict from name to numpy array.
        model: A model, without whose head the arrays lose theirs.
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
        return arrays  # It fits, or the shapes are compared and reported.
    warnings.warn(
        f"The head of the checkpoint has {len(bias)} classes and that of the "
        f"model {num_classes}: the model's is newly initialised.",
        stacklevel=4,
    )
    fresh = (
        head.kernel_initializer(head.kernel.shape, "float32"),
        head.bias_initializer(head.bias.shape, "float32"),
    )
    fresh = map(keras.ops.convert_to_numpy, fresh)
    return arrays | dict(zip(HEAD, fresh, strict=True))


def fit_positions(embedding, model):
    """Resizes a position embedding `(1, N, D)` to the N of a `ViTMoE`.

    One that fits is returned as it is, and so is one that is not of a square
    patch grid (after the class token if there is one), which `assign` reports.
    """
    rows, columns = patch_grid(image_pair(model.image_size), model.patch_size)
    if np.ndim(embedding) != 3 or embedding.shape[0] != 1:
        return embedding
    prefix = 1 if model.pooling == "token" else 0
    num_patches = embedding.shape[1] - prefix
    side = round(max(0, num_patches) ** 0.5)
    if num_patches == rows * columns or side < 1 or side**2 != num_patches:
        return embedding
    embedding = np.asarray(embedding[0], "float32")
    table = embedding[prefix:].reshape(side, side, -1)
    table = zoom(table, (rows, columns)).reshape(rows * columns, -1)
    return np.concatenate([embedding[:prefix], table])[None]


def zoom(image, size):
    """Bilinear zoom of `(rows, columns, features)` with fixed corners.

    Example:

    >>> zoom(np.array([[[0.0], [1.0]], [[2.0], [3.0]]]), (3, 3))[..., 0]
    array([[0. , 0.5, 1. ],
           [1. , 1.5, 2. ],
           [2. , 2.5, 3. ]])

    Reference:
        [Dosovitskiy et al., 2021](https://arxiv.org/abs/2010.11929), section
        3.2; the authors' program calls `scipy.ndimage.zoom` of order 1.
    """
    rows, columns = map(_hats, image.shape[:2], size)
    zoomed = np.einsum("ir,jc,rcd->ijd", rows, columns, image)
    return zoomed.astype(image.dtype)


def _hats(old, new):
    """The weights of linear interpolation, `(new, old)`."""
    points = np.linspace(0, old - 1, new)[:, None]
    return np.maximum(0, 1 - np.abs(points - np.arange(old)))


def check_model(model, kind):
    """Raises unless the model is of a kind."""
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
