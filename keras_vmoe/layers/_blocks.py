"""ViT, Swin and ConvNeXt blocks around any MLP, as pieces of a graph.

These are functions, not layers, to make every part a named layer of the model:
`summary()` shows it, `get_layer` finds it, and its output can be used as a
feature.
"""

import keras

from keras_vmoe.layers.normalization import LayerNormalization
from keras_vmoe.layers.stochastic import DropPath
from keras_vmoe.layers.stochastic import LayerScale
from keras_vmoe.layers.stochastic import SeededDropout
from keras_vmoe.layers.weights import small_normal


def encoder_block(
    x, attention, mlp, name, dropout=0.0, epsilon=1e-6, **branches
):
    """A pre-norm transformer block around any attention and any MLP.

    Args:
        x: `(B, ..., D)` symbolic tensor.
        attention: Layer from `(B, ..., D)` to the same shape, such as
            `layers.attention.SelfAttention`, named `<name>_attention`.
        mlp: Layer from `(B, ..., D)` to the same shape, such as `layers.MLP` or
            `layers.MoEMLP`.
        name: Prefix of the layers' names.
        dropout: Dropout rate after the attention.
        epsilon: Epsilon of the norms.
        **branches: `drop_path_rate` and `layer_scale_init_value` of both
            residual branches; see `residual`.

    Returns:
        Symbolic tensor of the shape of `x`.

    Example:

    >>> from keras_vmoe.layers.attention import SelfAttention
    >>> x = keras.Input((4, 8))
    >>> attention = SelfAttention(num_heads=2, name="block_0_attention")
    >>> encoder_block(x, attention, MLP(16), name="block_0").shape
    (None, 4, 8)

    Reference:
        [Dosovitskiy et al., 2021](https://arxiv.org/abs/2010.11929), equations
        2 and 3.
    """
    dtype = mlp.dtype_policy.name
    first, second = f"{name}_attention", f"{name}_mlp"
    norms = [
        LayerNormalization(epsilon, dtype=dtype, name=f"{branch}_norm")
        for branch in (first, second)
    ]
    y = attention(norms[0](x))
    if dropout:
        y = SeededDropout(dropout, dtype=dtype, name=f"{first}_dropout")(y)
    x = residual(x, y, first, dtype, **branches)
    return residual(x, mlp(norms[1](x)), second, dtype, **branches)


def convnext_block(x, mlp, name, **branch):
    """A ConvNeXt block around any MLP.

    A depthwise 7 x 7 convolution, a norm and the MLP on one residual branch.

    Args:
        x: `(B, H, W, D)` symbolic tensor.
        mlp: Layer from `(B, H, W, D)` to the same shape, such as `layers.MLP`
            or `layers.MoEMLP`. Its tokens are the H * W positions.
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
        depthwise_initializer=small_normal(),
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
        y: Symbolic tensor of the same shape, the branch's output for `x`.
        name: Prefix of the layers' names.
        dtype: Dtype policy of the layers.
        drop_path_rate: Probability of dropping an image's branch.
        layer_scale_init_value: Initial value of the layer scale; None omits
            it.

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
