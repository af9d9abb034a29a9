"""Assigns the arrays of a checkpoint to a model: all of them or none."""

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
        model: The model, none of whose weights may be left out.
        weights: Dict from name to `keras.Variable`.
        arrays: Dict from name to array.
        mend: What to do about arrays that do not fit.

    Raises:
        ValueError: If arrays are missing, left over, of another shape or no
            real numbers; the message lists all of them. No weight has changed
            then.
    """
    named = {id(weight) for weight in weights.values()}
    rest = {w.path: w for w in model.weights if id(w) not in named}
    weights = {**weights, **rest}
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    lacking = [
        f"{name} {tuple(weight.shape)}"
        for name, weight in weights.items()
        if name not in arrays
    ]
    extra = [
        f"{name} {array.shape}"
        for name, array in arrays.items()
        if name not in weights
    ]
    wrong = [
        f"{name} {arrays[name].shape} for {tuple(weight.shape)}"
        for name, weight in weights.items()
        if name in arrays and arrays[name].shape != tuple(weight.shape)
    ]
    if lacking or extra or wrong:
        raise ValueError(
            "The arrays must be those of the model, name by name and shape by "
            f"shape. Received: {len(arrays)} arrays for {len(weights)} weights."
            f" Missing in the file: {_list(lacking)}. "
            f"Not in the model: {_list(extra)}. "
            f"Of another shape: {_list(wrong)}. {mend}"
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


def _list(items):
    return "; ".join(sorted(items)) or "none"


def fit_head(arrays, head):
    """Arrays with a newly initialised head where the classes differ.

    Args:
        arrays: Dict from name to numpy array.
        head: The model's head, a built dense layer. Without one (None) the
            arrays are returned without a head.
    """
    kernel, bias = (arrays.get(name) for name in HEAD)
    if kernel is None or bias is None:
        return arrays
    if head is None:
        return {k: v for k, v in arrays.items() if k not in HEAD}
    features, num_classes = head.kernel.shape
    whole = np.ndim(bias) == 1 and np.shape(kernel) == (features, len(bias))
    if not whole or len(bias) == num_classes:
        return arrays  # It fits, or the shapes are compared and reported.
    warnings.warn(
        f"The head of the checkpoint has {len(bias)} classes and that of the "
        f"model {num_classes}: the model's is initialised anew.",
        stacklevel=4,
    )
    fresh = (
        head.kernel_initializer(head.kernel.shape, "float32"),
        head.bias_initializer(head.bias.shape, "float32"),
    )
    fresh = map(keras.ops.convert_to_numpy, fresh)
    return {**arrays, **dict(zip(HEAD, fresh, strict=True))}


def head_of(model):
    """The head of a ViTMoE or ConvNeXtMoE, or None."""
    return None if model.num_classes is None else model.get_layer("head")


def fit_positions(embedding, model):
    """Resizes a position embedding to the resolution of a `ViTMoE`.

    Args:
        embedding: `(1, N, D)` array of a square grid of patches, behind the
            class token if the model has one.
        model: A `ViTMoE` with learned positions.

    Returns:
        `(1, N, D)` array with the model's N; the embedding itself if it fits
        already, or is of no square grid, which `assign` then reports.
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
    """Bilinear zoom with fixed corners.

    Args:
        image: `(rows, columns, features)` array.
        size: `(rows, columns)` of the result.

    Returns:
        `(*size, features)` array.

    Example:

    >>> zoom(np.array([[[0.0], [1.0]], [[2.0], [3.0]]]), (3, 3))[..., 0]
    array([[0. , 0.5, 1. ],
           [1. , 1.5, 2. ],
           [2. , 2.5, 3. ]])

    Reference:
        [Dosovitskiy et al., 2021](https://arxiv.org/abs/2010.11929), section
        3.2; the authors' program calls `scipy.ndimage.zoom` of order 1.
    """
    rows, columns = (
        _hats(old, new) for old, new in zip(image.shape, size, strict=False)
    )
    zoomed = np.einsum("ir,jc,rcd->ijd", rows, columns, image)
    return zoomed.astype(image.dtype)


def _hats(old, new):
    """The weights of linear interpolation, `(new, old)`."""
    points = np.linspace(0, old - 1, new)[:, None]
    return np.maximum(0, 1 - np.abs(points - np.arange(old)))


def check_model(model, kinds):
    """Raises unless the model is one of ours."""
    if not isinstance(model, kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(
            f"`model` must be a {names}. "
            f"Received: model={model!r} of type {type(model).__name__}. Make "
            "one by `keras_vmoe.models` (a clone of one is a plain model)."
        )


def kernel_bias(name, layer):
    """The two weights of a dense or convolution layer, by name."""
    return {f"{name}/kernel": layer.kernel, f"{name}/bias": layer.bias}


def scale_bias(name, layer):
    """The two weights of a layer normalization, by name."""
    return {f"{name}/scale": layer.gamma, f"{name}/bias": layer.beta}
