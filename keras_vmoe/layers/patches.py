"""From images to tokens."""

from typing import Any

import keras
from keras import ops

from keras_vmoe._checks import check_sizes
from keras_vmoe._typing import Config
from keras_vmoe._typing import Shape
from keras_vmoe._typing import Tensor
from keras_vmoe.layers.parts import KeepsParts


@keras.saving.register_keras_serializable("keras_vmoe")
class PatchEmbedding(KeepsParts, keras.layers.Layer):
    """Cuts images into patches and maps each to a token.

    Args:
        hidden_dim: D, features of a token.
        patch_size: Side of a patch in pixels.

    Call arguments:
        images: `(B, H, W, channels)` float tensor, channels last.

    Returns:
        `(B, N, D)` tensor with `N = (H / patch_size) * (W / patch_size)`, row
        by row.

    Raises:
        ValueError: If a size is below 1, or if the image does not divide into
            whole patches.

    Example:

    >>> PatchEmbedding(hidden_dim=8, patch_size=4)(
    ...     keras.ops.ones((2, 8, 12, 3))).shape
    (2, 6, 8)

    Reference:
        [Dosovitskiy et al., 2021](https://arxiv.org/abs/2010.11929),
        equation 1.
    """

    def __init__(self, hidden_dim: int, patch_size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_sizes(hidden_dim=hidden_dim, patch_size=patch_size)
        self.hidden_dim = int(hidden_dim)
        self.patch_size = int(patch_size)
        self.projection = patch_conv(
            self.hidden_dim,
            self.patch_size,
            kernel_initializer="lecun_normal",
            dtype=self.dtype_policy,
            name="projection",
        )

    def build(self, input_shape: Shape) -> None:
        self.image_size = tuple(input_shape[1:3])
        patch_grid(self.image_size, self.patch_size)
        self.projection.build(input_shape)
        self.set_up_parts()

    def call(self, images: Tensor) -> Tensor:
        patches = self.projection(images)  # (B, H / p, W / p, D)
        height, width = self._grid(images.shape)
        return ops.reshape(
            patches, (ops.shape(images)[0], height * width, self.hidden_dim)
        )

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        height, width = self._grid(input_shape)
        return (input_shape[0], height * width, self.hidden_dim)

    def _grid(self, shape):
        """Rows and columns; an unknown side is taken from `build`."""
        known = self.image_size if self.built else shape[1:3]
        sides = [
            own if side is None else side
            for side, own in zip(shape[1:3], known, strict=True)
        ]
        return patch_grid(sides, self.patch_size)

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "hidden_dim": self.hidden_dim,
            "patch_size": self.patch_size,
        }


def patch_conv(features, patch_size, **kwargs):
    """Returns a convolution whose patches do not overlap.

    Args:
        features: Features of each output position.
        patch_size: Side of a patch.
        **kwargs: Further arguments of `keras.layers.Conv2D`.

    Returns:
        A layer from `(B, H, W, channels)` to
        `(B, H / patch_size, W / patch_size, features)`.
    """
    return keras.layers.Conv2D(
        features,
        patch_size,
        strides=patch_size,
        data_format="channels_last",
        **kwargs,
    )


def patch_grid(image_size, patch_size):
    """Returns the rows and columns of patches in an image.

    Args:
        image_size: `(height, width)` in pixels.
        patch_size: Side of a patch in pixels.

    Returns:
        `(rows, columns)`.

    Raises:
        ValueError: If a size is below 1, or if the image is not made of whole
            patches.
    """
    height, width = image_size
    if None in image_size:
        raise ValueError(
            "The number of patches depends on the size of the images, which "
            f"must be known. Received: image_size={(height, width)}. Set it: "
            "`keras.Input((height, width, channels))`."
        )
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(
            "`image_size` must be divisible by `patch_size`. "
            f"Received: image_size={(height, width)}, patch_size={patch_size}. "
            "Resize the images or change `patch_size`."
        )
    return height // patch_size, width // patch_size


@keras.saving.register_keras_serializable("keras_vmoe")
class ClassToken(keras.layers.Layer):
    """Prepends a learned token, initialized to 0, to the tokens of each image.

    Call arguments:
        tokens: `(B, N, D)` float tensor.

    Returns:
        `(B, N + 1, D)` tensor.

    Example:

    >>> ClassToken()(keras.ops.ones((2, 4, 8))).shape
    (2, 5, 8)
    """

    def build(self, input_shape: Shape) -> None:
        self.token = self.add_weight(
            name="token", shape=(1, 1, input_shape[-1]), initializer="zeros"
        )

    def call(self, tokens: Tensor) -> Tensor:
        shape = (ops.shape(tokens)[0], 1, tokens.shape[-1])
        token = ops.broadcast_to(ops.cast(self.token, tokens.dtype), shape)
        return ops.concatenate([token, tokens], axis=1)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        batch, num_tokens, features = input_shape
        return (batch, num_tokens + 1, features)


@keras.saving.register_keras_serializable("keras_vmoe")
class RegisterTokens(keras.layers.Layer):
    """Inserts learned tokens after the class token, as scratch space.

    They are not part of any result.

    Args:
        num_registers: Number of registers.

    Call arguments:
        tokens: `(B, N, D)` float tensor; each image's first is a class token.

    Returns:
        `(B, N + num_registers, D)` tensor.

    Example:

    >>> RegisterTokens(num_registers=4)(keras.ops.ones((2, 5, 8))).shape
    (2, 9, 8)

    Reference:
        [Darcet et al., 2024](https://arxiv.org/abs/2309.16588), section 2.2.
    """

    def __init__(self, num_registers: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_sizes(num_registers=num_registers)
        self.num_registers = int(num_registers)

    def build(self, input_shape: Shape) -> None:
        self.registers = self.add_weight(
            name="registers",
            shape=(1, self.num_registers, input_shape[-1]),
            initializer=keras.initializers.RandomNormal(stddev=0.02),
        )

    def call(self, tokens: Tensor) -> Tensor:
        shape = (ops.shape(tokens)[0], *self.registers.shape[1:])
        registers = ops.cast(self.registers, tokens.dtype)
        registers = ops.broadcast_to(registers, shape)
        parts = [tokens[:, :1], registers, tokens[:, 1:]]
        return ops.concatenate(parts, axis=1)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        batch, num_tokens, features = input_shape
        return (batch, num_tokens + self.num_registers, features)

    def get_config(self) -> Config:
        return {**super().get_config(), "num_registers": self.num_registers}
