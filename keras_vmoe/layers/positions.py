"""Position embeddings, added to the tokens."""

import math
from collections.abc import Sequence
from typing import Any
from typing import Literal

import keras
import numpy as np
from keras import ops

from keras_vmoe._checks import check_choice
from keras_vmoe._checks import is_integer
from keras_vmoe._typing import Config
from keras_vmoe._typing import Shape
from keras_vmoe._typing import Tensor
from keras_vmoe.layers.weights import mark


@keras.saving.register_keras_serializable("keras_vmoe")
class LearnedPositions(keras.layers.Layer):
    """Adds a learned embedding to every token, the class token included.

    Args:
        grid: `(rows, columns)` of the patches, which files store with the
            embedding: the same number of patches in another grid has other
            positions. None for tokens that form no grid.

    Call arguments:
        tokens: `(B, N, D)` float tensor.

    Returns:
        `(B, N, D)` tensor.

    Raises:
        ValueError: If N is below `rows * columns`.

    Example:

    >>> LearnedPositions()(keras.ops.ones((2, 4, 8))).shape
    (2, 4, 8)

    Reference:
        [Dosovitskiy et al., 2021](https://arxiv.org/abs/2010.11929),
        equation 1.
    """

    def __init__(
        self, grid: Sequence[int] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.grid = None if grid is None else tuple(grid)

    def build(self, input_shape: Shape) -> None:
        if self.grid is not None and math.prod(self.grid) > input_shape[1]:
            raise ValueError(
                "`grid` must have a token for each of its patches. "
                f"Received: grid={self.grid} for input_shape="
                f"{tuple(input_shape)}."
            )
        self.embedding = self.add_weight(
            name="embedding",
            shape=(1, *input_shape[1:]),
            initializer=keras.initializers.RandomNormal(stddev=0.02),
        )
        mark([self.embedding], "positions")

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        if self.grid is not None:
            store["grid"] = np.array(self.grid)

    def load_own_variables(self, store: Any) -> None:
        shape = tuple(self.embedding.shape)
        found = {name: store[name] for name in store.keys()}
        grid = tuple(map(int, found.pop("grid", self.grid or ())))
        theirs = tuple(found["0"].shape) if "0" in found else shape
        if theirs != shape or grid not in ((), self.grid):
            # Keras would print the whole array, or load it unresized.
            raise ValueError(
                "Learned positions must match the model's image size. "
                f"Received: an embedding of shape {theirs} and grid "
                f"{grid or 'unknown'} for {shape} and {self.grid}. "
                "Load the file with keras_vmoe.checkpoints.load(model, path), "
                "which resizes them."
            )
        super().load_own_variables(found)

    def call(self, tokens: Tensor) -> Tensor:
        return tokens + self.embedding

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    def get_config(self) -> Config:
        return {**super().get_config(), "grid": self.grid}


@keras.saving.register_keras_serializable("keras_vmoe")
class SinCos2DPositions(keras.layers.Layer):
    """Adds fixed sines and cosines of row and column to the patches' tokens.

    `omega_i = 10000^(-i / (D/4 - 1))` for `i < D/4`; the embedding is
    `[sin(x·omega), cos(x·omega), sin(y·omega), cos(y·omega)]` for column x and
    row y. A class token before the patches gets none.

    Args:
        grid: `(rows, columns)` of patches.

    Call arguments:
        tokens: `(B, N, D)` float tensor, where N is the number of patches, or
            one more with a class token.

    Returns:
        `(B, N, D)` tensor.

    Raises:
        ValueError: If D is not a multiple of 4 or is below 8, or if N does not
            fit the grid.

    Example:

    >>> SinCos2DPositions(grid=(2, 3))(keras.ops.ones((2, 7, 8))).shape
    (2, 7, 8)

    Reference:
        [Chen et al., 2021](https://arxiv.org/abs/2104.02057) (MoCo v3).
    """

    def __init__(self, grid: Sequence[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.grid = tuple(grid)

    def build(self, input_shape: Shape) -> None:
        _, num_tokens, features = input_shape
        rows, columns = self.grid
        prefix = num_tokens - rows * columns
        if prefix not in (0, 1):
            raise ValueError(
                f"A grid of {rows} x {columns} patches has {rows * columns} "
                "tokens, or one more with a class token. "
                f"Received: input_shape={tuple(input_shape)}."
            )
        self.embedding = np.pad(
            sincos2d(rows, columns, features), ((prefix, 0), (0, 0))
        )

    def call(self, tokens: Tensor) -> Tensor:
        return tokens + ops.cast(self.embedding, tokens.dtype)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    def get_config(self) -> Config:
        return {**super().get_config(), "grid": self.grid}


def sincos2d(rows, columns, features):
    """Returns the table of `SinCos2DPositions`.

    Args:
        rows, columns: Size of the grid.
        features: D, a multiple of 4, at least 8.

    Returns:
        `(rows * columns, D)` float32 numpy array, row by row.

    Raises:
        ValueError: If D does not fit.
    """
    if features % 4 or features < 8:
        raise ValueError(
            "`sincos2d` positions need `hidden_dim` to be a multiple of 4, "
            f"at least 8. Received: hidden_dim={features}."
        )
    quarter = features // 4
    omega = 10000.0 ** (-np.arange(quarter) / (quarter - 1))
    y, x = np.mgrid[:rows, :columns]
    x = x.reshape(-1, 1) * omega
    y = y.reshape(-1, 1) * omega
    table = [np.sin(x), np.cos(x), np.sin(y), np.cos(y)]
    return np.concatenate(table, axis=-1).astype("float32")


def resize_positions(
    embedding: np.ndarray,
    grid: int | tuple[int, int],
    new_grid: int | tuple[int, int],
    num_extra: int | None = None,
    interpolation: Literal["bilinear", "bicubic"] = "bilinear",
) -> np.ndarray:
    """Resizes learned positions to another grid of patches.

    Tokens before the patches, such as a class token or registers, keep theirs.

    Args:
        embedding: `(1, P + rows * columns, D)` array: P tokens before the
            patches, then the patches row by row.
        grid: `(rows, columns)` of the patches, or an integer for a square.
        new_grid: The grid of the result.
        num_extra: P. None means all tokens beyond the grid, at most a class
            token: more are more likely patches of another grid.
        interpolation: `"bilinear"` with fixed corners, as in V-MoE and ViT, or
            `"bicubic"` with antialiasing, as in timm.

    Returns:
        Array `(1, P + new rows * new columns, D)`.

    Raises:
        ValueError: If `embedding` does not hold P tokens and the patches, or
            a grid or the interpolation is not valid.

    Example:

    >>> resize_positions(np.ones((1, 1 + 4 * 16, 8)), (4, 16), (8, 8)).shape
    (1, 65, 8)

    Reference:
        [Dosovitskiy et al., 2021](https://arxiv.org/abs/2010.11929), section
        3.2.
    """
    check_choice("interpolation", interpolation, ("bilinear", "bicubic"))
    rows, columns = pair("grid", grid)
    new_rows, new_columns = pair("new_grid", new_grid)
    shape = np.shape(embedding)
    prefix = shape[1] - rows * columns if len(shape) == 3 else -1
    extra = (0, 1) if num_extra is None else (num_extra,)
    if prefix not in extra or shape[0] != 1:
        raise ValueError(
            "`embedding` must have the shape (1, tokens, features), with one "
            f"token per patch and {' or '.join(map(str, extra))} before. "
            f"Received: shape {shape} for a grid of {rows} x {columns} patches."
            " Give the grid that it was made for; registers need `num_extra`."
        )
    if (rows, columns) == (new_rows, new_columns):
        return embedding
    embedding = np.asarray(embedding[0], "float32")
    weights = _hats if interpolation == "bilinear" else _cubics
    table = embedding[prefix:].reshape(rows, columns, -1)
    table = zoom(table, (new_rows, new_columns), weights)
    table = table.reshape(-1, table.shape[-1])
    return np.concatenate([embedding[:prefix], table])[None]


def pair(name, grid):
    """Returns `(rows, columns)` of the patches from a pair or an integer."""
    pair = (grid, grid) if is_integer(grid) else grid
    good = isinstance(pair, (tuple, list)) and len(pair) == 2
    if not good or not all(is_integer(x) and x > 0 for x in pair):
        raise ValueError(
            f"`{name}` must be (rows, columns) of the patches, or an integer "
            f"for a square. Received: {name}={grid!r}."
        )
    return tuple(pair)


def _hats(old, new):
    """Returns the weights of linear interpolation, `(new, old)`."""
    points = np.linspace(0, old - 1, new)[:, None]
    return np.maximum(0, 1 - np.abs(points - np.arange(old)))


def _cubics(old, new):
    """Returns the weights of antialiased cubic interpolation, `(new, old)`.

    Keys's kernel with a = -1/2, widened if the grid shrinks.
    """
    scale = old / new
    centers = (np.arange(new)[:, None] + 0.5) * scale - 0.5
    x = np.abs(centers - np.arange(old)) / max(scale, 1.0)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((2.5 - 0.5 * x) * x - 4) * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return weights / weights.sum(axis=1, keepdims=True)


def zoom(image, size, weights=_hats):
    """Zooms `(rows, columns, features)`, bilinear with fixed corners.

    Example:

    >>> zoom(np.array([[[0.0], [1.0]], [[2.0], [3.0]]]), (3, 3))[..., 0]
    array([[0. , 0.5, 1. ],
           [1. , 1.5, 2. ],
           [2. , 2.5, 3. ]])

    Reference:
        [Dosovitskiy et al., 2021](https://arxiv.org/abs/2010.11929), section
        3.2; the authors' code calls `scipy.ndimage.zoom` with order 1.
    """
    rows, columns = map(weights, image.shape[:2], size)
    zoomed = np.einsum("ir,jc,rcd->ijd", rows, columns, image)
    return zoomed.astype(image.dtype)
