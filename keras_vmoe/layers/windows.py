"""Attention within windows of a feature map, as in the Swin transformer."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_vmoe._checks import check_flags
from keras_vmoe._checks import check_sizes
from keras_vmoe._checks import plain
from keras_vmoe._typing import Config
from keras_vmoe._typing import Shape
from keras_vmoe._typing import Tensor
from keras_vmoe.layers.parts import KeepsParts
from keras_vmoe.layers.weights import mark
from keras_vmoe.layers.weights import small_normal
from keras_vmoe.routing._selection import softmax

BIAS_DIM = 512  # Hidden features of the position bias.
REACH = 8  # The offset of a window's corner, before the logarithm.
APART = -100.0  # Added to the scores of positions hidden from each other.


@keras.saving.register_keras_serializable("keras_vmoe")
class WindowAttention(KeepsParts, keras.layers.Layer):
    """Multi-head attention within square windows of a feature map.

    Scores get a bias for the offset of two positions. A small MLP computes it
    from the offset's logarithm: its weights do not depend on the window. With
    `shift`, the map is first rolled by half a window, and rolled back at the
    end. Positions that are neighbors only by rolling do not see each other.

    A map that does not divide into whole windows is padded with zeros at the
    right and bottom; these take part as keys, as in the authors' code. If a
    side of the map is no longer than the window, windows have that side and are
    not shifted.

    Args:
        num_heads: Heads; must divide D.
        window_size: Side of a window, in positions.
        shift: Whether to roll the map by half a window.
        pretrained_window_size: Side of the windows that the position bias was
            trained with, if it differs.

    Call arguments:
        inputs: `(B, H, W, D)` float tensor of known height and width.

    Returns:
        `(B, H, W, D)` tensor.

    Raises:
        ValueError: If the heads do not divide D, or the height or the width is
            unknown.

    Example:

    >>> layer = WindowAttention(num_heads=2, window_size=4, shift=True)
    >>> layer(keras.ops.ones((1, 8, 12, 6))).shape
    (1, 8, 12, 6)

    Reference:
        [Liu et al., 2021](https://arxiv.org/abs/2103.14030), section 3.2;
        [Liu et al., 2022](https://arxiv.org/abs/2111.09883), section 3.3, for
        the bias. As in the authors' MoE models, it is not passed through a
        sigmoid, and scores are dot products, not cosines.
    """

    def __init__(
        self,
        num_heads: int,
        window_size: int,
        shift: bool = False,
        pretrained_window_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_sizes(num_heads=num_heads, window_size=window_size)
        check_sizes(pretrained_window_size=pretrained_window_size or 1)
        check_flags(shift=shift)
        self.num_heads = int(num_heads)
        self.window_size = int(window_size)
        self.shift = shift
        self.pretrained_window_size = plain(pretrained_window_size)

    def build(self, input_shape: Shape) -> None:
        _, height, width, features = input_shape
        if None in (height, width):
            raise ValueError(
                "The height and width of the feature map must be known. "
                f"Received: input_shape={tuple(input_shape)}. Set them: "
                "`keras.Input((height, width, features))`."
            )
        if features % self.num_heads:
            raise ValueError(
                "The features must be divisible by `num_heads`. Received: "
                f"{features} features, num_heads={self.num_heads}."
            )
        self.windows = Windows((height, width), self.window_size, self.shift)
        table = offsets(self.windows.side, self.pretrained_window_size)
        self.offset_table = table.astype("float32")
        self.query_key_value = self._dense("query_key_value", features, 3)
        self.output_dense = self._dense("output", features, 1)
        self.bias_hidden = keras.layers.Dense(
            BIAS_DIM,
            "relu",
            kernel_initializer=small_normal(),
            dtype=self.dtype_policy,
            name="bias_hidden",
        )
        self.bias_hidden.build((None, 2))
        self.bias_output = keras.layers.Dense(
            self.num_heads,
            use_bias=False,
            kernel_initializer=small_normal(),
            dtype=self.dtype_policy,
            name="bias_output",
        )
        self.bias_output.build((None, BIAS_DIM))
        for dense in (self.bias_hidden, self.bias_output):
            mark(dense.weights, "positions")
        self.set_up_parts()

    def _dense(self, name, features, count):
        dense = keras.layers.Dense(
            count * features,
            kernel_initializer=small_normal(),
            dtype=self.dtype_policy,
            name=name,
        )
        dense.build((None, features))
        return dense

    def call(self, inputs: Tensor) -> Tensor:
        x = self.windows.cut(inputs)  # (B, windows, N, D)
        batch, (windows, size, features) = ops.shape(x)[0], x.shape[1:]
        x = self.query_key_value(x)
        heads = (3, self.num_heads, features // self.num_heads)
        x = ops.reshape(x, (batch * windows, size, *heads))
        query, key, value = ops.unstack(ops.transpose(x, (2, 0, 3, 1, 4)), 3)
        query = query / math.sqrt(heads[-1])
        scores = ops.matmul(query, ops.swapaxes(key, -1, -2))
        shape = (batch, windows, self.num_heads, size, size)
        scores = ops.reshape(scores, shape) + self.bias()
        if self.windows.mask is not None:
            mask = ops.cast(self.windows.mask, scores.dtype)
            scores = scores + mask[:, None]
        weights = ops.cast(softmax(ops.cast(scores, "float32")), value.dtype)
        weights = ops.reshape(weights, (batch * windows, *shape[2:]))
        x = ops.transpose(ops.matmul(weights, value), (0, 2, 1, 3))
        x = ops.reshape(x, (batch, windows, size, features))
        return self.windows.join(self.output_dense(x))

    def bias(self) -> Tensor:
        """Returns the bias of the scores, `(heads, N, N)`."""
        table = ops.convert_to_tensor(self.offset_table, self.compute_dtype)
        table = self.bias_output(self.bias_hidden(table))  # (offsets, heads)
        bias = ops.take(table, offset_index(self.windows.side), axis=0)
        return ops.transpose(bias, (2, 0, 1))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "window_size": self.window_size,
            "shift": self.shift,
            "pretrained_window_size": self.pretrained_window_size,
        }


class Windows:
    """Cuts a feature map into windows and joins them again.

    Args:
        grid: `(height, width)` of the map.
        side: Side of a window.
        shift: Whether the map is rolled by half a window before it is cut.

    Attributes:
        side: Side of a window, no longer than a side of the map.
        step: Number of positions by which the map is rolled.
        padded: `(height, width)` of the map, padded to whole windows.
        mask: `(windows, N, N)` float32 array added to the scores of a window's
            N positions; None if all of them see each other.
    """

    def __init__(self, grid: Sequence[int], side: int, shift: bool) -> None:
        self.grid = tuple(grid)
        self.side = min(side, *grid)
        self.step = side // 2 if shift and side < min(grid) else 0
        self.padded = tuple(-(-x // self.side) * self.side for x in grid)
        self.mask = self._mask() if self.step else None

    @property
    def count(self) -> int:
        """Number of windows in a map."""
        return math.prod(x // self.side for x in self.padded)

    def cut(self, x: Tensor) -> Tensor:
        """Maps `(B, H, W, D)` to `(B, windows, N, D)`."""
        if self.padded != self.grid:
            pairs = zip(self.grid, self.padded, strict=True)
            missing = [(0, new - old) for old, new in pairs]
            x = ops.pad(x, [(0, 0), *missing, (0, 0)])
        if self.step:
            x = _rolled(x, self.step)
        rows, columns = (x // self.side for x in self.padded)
        batch, features = ops.shape(x)[0], x.shape[-1]
        x = ops.reshape(
            x, (batch, rows, self.side, columns, self.side, features)
        )
        x = ops.transpose(x, (0, 1, 3, 2, 4, 5))
        return ops.reshape(x, (batch, self.count, self.side**2, features))

    def join(self, x: Tensor) -> Tensor:
        """Maps `(B, windows, N, D)` to `(B, H, W, D)`."""
        rows, columns = (x // self.side for x in self.padded)
        batch, features = ops.shape(x)[0], x.shape[-1]
        x = ops.reshape(
            x, (batch, rows, columns, self.side, self.side, features)
        )
        x = ops.transpose(x, (0, 1, 3, 2, 4, 5))
        x = ops.reshape(x, (batch, *self.padded, features))
        if self.step:
            x = _rolled(x, -self.step)
        height, width = self.grid
        return x if self.padded == self.grid else x[:, :height, :width]

    def _mask(self):
        # Regions along a side: windows without rolled positions, the rest of
        # the last window, and the part that was rolled around.
        rows, columns = (
            np.repeat(
                [0, 1, 2], [x - self.side, self.side - self.step, self.step]
            )
            for x in self.padded
        )
        region = 3 * rows[:, None] + columns
        shape = [y for x in self.padded for y in (x // self.side, self.side)]
        region = region.reshape(shape).transpose(0, 2, 1, 3)
        region = region.reshape(self.count, -1)
        apart = region[:, :, None] != region[:, None]
        return np.where(apart, APART, 0.0).astype("float32")


def _rolled(x, step):
    """Rolls a map up and to the left; LiteRT has no `roll`."""
    x = ops.concatenate([x[:, step:], x[:, :step]], axis=1)
    return ops.concatenate([x[:, :, step:], x[:, :, :step]], axis=2)


@functools.cache
def offset_index(side):
    """Returns the index in `offsets` for each pair of positions, `(N, N)`."""
    rows, columns = np.divmod(np.arange(side**2), side)
    row, column = (x[:, None] - x + side - 1 for x in (rows, columns))
    return (row * (2 * side - 1) + column).astype("int32")


def offsets(side, pretrained=None):
    """Returns the log offsets within a window, scaled to its corners.

    Args:
        side: Side of a window.
        pretrained: Side of the window that sets the scale; None means `side`.

    Returns:
        `((2 * side - 1)**2, 2)` float array of rows and columns.
    """
    steps = np.arange(1.0 - side, side)
    # A window of one position has one offset, which is 0.
    steps = REACH * steps / max(1, (pretrained or side) - 1)
    steps = np.sign(steps) * np.log2(np.abs(steps) + 1) / math.log2(REACH)
    return np.stack(np.meshgrid(steps, steps, indexing="ij"), -1).reshape(-1, 2)


@keras.saving.register_keras_serializable("keras_vmoe")
class MergePatches(keras.layers.Layer):
    """Concatenates the features of each 2 x 2 positions.

    An odd side is padded with zeros.

    Call arguments:
        inputs: `(B, H, W, D)` float tensor.

    Returns:
        `(B, ceil(H / 2), ceil(W / 2), 4 * D)` tensor: upper left, lower left,
        upper right, lower right.

    Example:

    >>> MergePatches()(keras.ops.ones((1, 7, 4, 3))).shape
    (1, 4, 2, 12)

    Reference:
        [Liu et al., 2021](https://arxiv.org/abs/2103.14030), section 3.1.
    """

    def call(self, inputs: Tensor) -> Tensor:
        x = inputs
        _, height, width, features = x.shape
        if height % 2 or width % 2:
            x = ops.pad(x, [(0, 0), (0, height % 2), (0, width % 2), (0, 0)])
        _, height, width, features = self.compute_output_shape(inputs.shape)
        batch = ops.shape(x)[0]
        x = ops.reshape(x, (batch, height, 2, width, 2, features // 4))
        x = ops.transpose(x, (0, 1, 3, 4, 2, 5))
        return ops.reshape(x, (batch, height, width, features))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        batch, height, width, features = input_shape
        return (batch, -(-height // 2), -(-width // 2), 4 * features)
