"""Blocks of a ViT and of a ConvNeXt around any MLP, as pieces of graph.

Functions and not layers, so that every part is a layer of the model that calls
them, with a name: `summary()` shows it, `get_layer` finds it and its output can
be taken as a feature.
"""

import keras

from keras_vmoe.layers.attention import SelfAttention
from keras_vmoe.layers.normalization import LayerNormalization
from keras_vmoe.layers.stochastic import DropPath
from keras_vmoe.layers.stochastic import LayerScale
from keras_vmoe.layers.stochastic import SeededDropout


def encoder_block(
    x, mlp, num_heads, name, dropout=0.0, qk_norm=False, **branches
):
    """A pre-norm transformer block around any MLP.

    Args:
        x: `(B, N, D)` symbolic tensor.
        mlp: Layer from `(B, N, D)` to the same shape, such as `layers.MLP` or
            `layers.MoEMLP`.
        num_heads: Heads of the attention; must divide D.
        name: Prefix of the layers' names.
        dropout: Dropout rate after the attention.
        qk_norm: Whether to normalize queries and keys; see `SelfAttention`.
        **branches: `drop_path_rate` and `layer_scale_init_value` of both
            residual branches; see `residual`.

    Returns:
        `(B, N, D)` symbolic tensor.

    Raises:
        ValueError: If the heads do not divide D.

    Example:

    >>> x = keras.Input((4, 8))
    >>> encoder_block(x, MLP(16), num_heads=2, name="block_0").shape
    (None, 4, 8)

    Reference:
        [Dosovitskiy et al., 2021](https://arxiv.org/abs/2010.11929), equations
        2 and 3.
    """
    dtype, attention = mlp.dtype_policy.name, f"{name}_attention"
    y = LayerNormalization(dtype=dtype, name=f"{attention}_norm")(x)
    y = SelfAttention(num_heads, qk_norm, dtype=dtype, name=attention)(y)
    if dropout:
        y = SeededDropout(dropout, dtype=dtype, name=f"{attention}_dropout")(y)
    x = residual(x, y, attention, dtype, **branches)
    y = mlp(LayerNormalization(dtype=dtype, name=f"{name}_mlp_norm")(x))
    return residual(x, y, f"{name}_mlp", dtype, **branches)


def convnext_block(x, mlp, name, **branch):
    """A ConvNeXt block around any MLP.

    A depthwise 7 x 7 convolution, a norm and the MLP on one residual branch.

    Args:
        x: `(B, H, W, D)` symbolic tensor.
        mlp: Layer from `(B, H, W, D)` to the same shape, such as `layers.MLP`
            or `layers.MoEMLP`, whose tokens are then the H * W positions.
        name: Prefix of the layers' names.
        **branch: `drop_path_rate` and `layer_scale_init_value`; see `residual`.

    Returns:
        `(B, H, W, D)` symbolic tensor.

    Example:

    >>> x = keras.Input((7, 7, 8))
    >>> convnext_block(x, MLP(32), name="block_0").shape
    (None, 7, 7, 8)

    Reference:
        [Liu et al., 2022](https://arxiv.org/abs/2201.03545), section 2 and
        figure 4.
    """
    dtype = mlp.dtype_policy.name
    y = keras.layers.DepthwiseConv2D(
        7,
        padding="same",
        data_format="channels_last",
        depthwise_initializer=convnext_initializer(),
        dtype=dtype,
        name=f"{name}_conv",
    )(x)
    y = mlp(LayerNormalization(dtype=dtype, name=f"{name}_norm")(y))
    return residual(x, y, name, dtype, **branch)


def residual(
    x, y, name, dtype, drop_path_rate=0.0, layer_scale_init_value=None
):
    """The sum of `x` and a residual branch.

    Args:
        x: Symbolic tensor.
        y: Symbolic tensor of the same shape, what the branch makes of `x`.
        name: Prefix of the layers' names.
        dtype: Dtype policy of the layers.
        drop_path_rate: Probability of dropping the branch of an image.
        layer_scale_init_value: Initial value of the layer scale; None leaves
            it out.

    Returns:
        Symbolic tensor of the shape of `x`.
    """
    if layer_scale_init_value is not None:
        y = LayerScale(
            layer_scale_init_value, dtype=dtype, name=f"{name}_scale"
        )(y)
    if drop_path_rate:
        y = DropPath(drop_path_rate, dtype=dtype, name=f"{name}_drop")(y)
    return keras.layers.Add(dtype=dtype, name=f"{name}_add")([x, y])


def convnext_initializer():
    """The initializer of ConvNeXt's convolutions and head."""
    return keras.initializers.TruncatedNormal(stddev=0.02)
