"""Arrays of a checkpoint to the weights of a model: all of them or none."""

import warnings

import keras
import numpy as np

from keras_vmoe.layers.patches import patch_grid
from keras_vmoe.models.base import image_pair

HEAD = ("head/kernel", "head/bias")
POSITIONS = "Encoder/posembed_input/pos_embedding"


def assign(weights, arrays):
    """Assigns arrays to weights of the same names, after checking all.

    Args:
        weights: Dict from name to `keras.Variable`.
        arrays: Dict from name to array.

    Raises:
        ValueError: If arrays are missing, left over, of another shape or no
            numbers; the message lists all of them. No weight has changed then.
    """
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
            f"Of another shape: {_list(wrong)}. "
            "Build the model with the architecture of the checkpoint (blocks, "
            "MoE placement, experts, pooling, pre-logits); "
            "`checkpoints.vmoe_config` finds it."
        )
    for name, array in arrays.items():
        if array.dtype.kind in "OSUMm":
            raise ValueError(
                "The arrays must hold numbers. "
                f"Received: {name} of dtype {array.dtype}."
            )
    for name, weight in weights.items():
        weight.assign(arrays[name].astype(weight.dtype))


def _list(items):
    return "; ".join(sorted(items)) or "none"


def fit_head(arrays, weights, num_classes):
    """Arrays whose head is a new one, where the model's has other classes.

    Args:
        arrays: Dict from name to array.
        weights: Dict from name to `keras.Variable`.
        num_classes: Classes of the model; None if it has no head.

    Returns:
        Dict of arrays: without a head if the model has none, or with the values
        at the start of a new one if its number of classes is another.
    """
    kernel, bias = (arrays.get(name) for name in HEAD)
    if kernel is None or bias is None:
        return arrays
    if num_classes is None:
        return {k: v for k, v in arrays.items() if k not in HEAD}
    if np.shape(bias) == tuple(weights[HEAD[1]].shape):
        return arrays
    warnings.warn(
        f"The head of the checkpoint has {len(bias)} classes and that of the "
        f"model {num_classes}: the model's starts anew.",
        stacklevel=4,
    )
    fresh = {name: np.zeros(weights[name].shape, "float32") for name in HEAD}
    return {**arrays, **fresh}


def fit_positions(arrays, name, grid, has_token):
    """Arrays whose position embedding fits another resolution.

    Args:
        arrays: Dict from name to array.
        name: Name of the position embedding.
        grid: `(rows, columns)` of the model's patches.
        has_token: Whether the embedding of a class token stands first.

    Returns:
        Dict of arrays.
    """
    rows, columns = grid
    embedding = arrays.get(name)
    if embedding is None or np.ndim(embedding) != 3:
        return arrays
    prefix = 1 if has_token else 0
    num_patches = embedding.shape[1] - prefix
    side = round(max(0, num_patches) ** 0.5)
    if num_patches == rows * columns or side < 1 or side**2 != num_patches:
        return arrays  # It fits, or the shapes are compared and reported.
    table = np.asarray(embedding[0, prefix:], "float32")
    table = zoom(table.reshape(side, side, -1), grid)
    table = table.reshape(rows * columns, -1)
    token = np.asarray(embedding[0, :prefix], "float32")
    return {**arrays, name: np.concatenate([token, table])[None]}


def fit_table(embedding, model):
    """A position embedding at the resolution of a `ViTMoE`.

    Args:
        embedding: `(1, N, D)` array.
        model: A `ViTMoE` with learned positions.

    Returns:
        `(1, N, D)` array with the model's N, where the patches form a square.
    """
    grid = patch_grid(image_pair(model.image_size), model.patch_size)
    has_token = model.pooling == "token"
    return fit_positions({"": embedding}, "", grid, has_token)[""]


def zoom(image, size):
    """Bilinear zoom; the corners stay where they are.

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
    for axis, count in enumerate(size):
        last = image.shape[axis] - 1
        place = np.linspace(0, last, count)
        low = np.minimum(place.astype(int), max(0, last - 1))
        high = np.minimum(low + 1, last)
        shape = [1, 1, 1]
        shape[axis] = count
        share = (place - low).reshape(shape).astype(image.dtype)
        image = (1 - share) * np.take(image, low, axis) + share * np.take(
            image, high, axis
        )
    return image


def check_model(model, kinds):
    """Raises unless the model is one of ours."""
    if not isinstance(model, kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(
            f"`model` must be a {names}. "
            f"Received: model={model!r} of type {type(model).__name__}. Of a "
            "clone, load the original's weights by `set_weights`."
        )


def kernel_bias(name, layer):
    """The two weights of a dense or convolution layer, by name."""
    return {f"{name}/kernel": layer.kernel, f"{name}/bias": layer.bias}


def to_numpy(variables):
    """Numpy arrays of a dict of variables."""
    return {
        name: keras.ops.convert_to_numpy(variable)
        for name, variable in variables.items()
    }
