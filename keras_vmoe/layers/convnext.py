"""Parts of a ConvNeXt, as pieces of functional graph."""

import keras

from keras_vmoe.layers.stochastic import DropPath
from keras_vmoe.layers.stochastic import LayerScale


def kernel_initializer():
    """What kernels of a ConvNeXt start from."""
    return keras.initializers.TruncatedNormal(stddev=0.02)


def convnext_block(
    x, mlp, name, drop_path_rate=0.0, layer_scale_init_value=1e-6
):
    """A ConvNeXt block around any MLP.

    A depthwise 7 x 7 convolution, a norm and the MLP on one residual branch. A
    function and not a layer, for the reasons of `layers.encoder_block`.

    Args:
        x: `(B, H, W, D)` symbolic tensor.
        mlp: Layer from `(B, H, W, D)` to the same shape, such as `layers.MLP`
            or `layers.MoEMLP`, whose tokens are then the H * W positions.
        name: Prefix of the layers' names.
        drop_path_rate: Probability of dropping the branch of an image.
        layer_scale_init_value: Initial value of the layer scale; None leaves
            it out.

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
        depthwise_initializer=kernel_initializer(),
        dtype=dtype,
        name=f"{name}_conv",
    )(x)
    y = mlp(convnext_norm(f"{name}_norm", dtype)(y))
    if layer_scale_init_value is not None:
        y = LayerScale(
            layer_scale_init_value, dtype=dtype, name=f"{name}_scale"
        )(y)
    if drop_path_rate:
        y = DropPath(drop_path_rate, dtype=dtype, name=f"{name}_drop")(y)
    return keras.layers.Add(dtype=dtype, name=f"{name}_add")([x, y])


def patchify(features, size, name, dtype):
    """A convolution whose patches of side `size` do not overlap.

    Args:
        features: Features of a position of the result.
        size: Side of a patch.
        name: Name of the layer.
        dtype: Dtype policy of the layer.

    Returns:
        A layer from `(B, H, W, D)` to `(B, H / size, W / size, features)`.
    """
    return keras.layers.Conv2D(
        features,
        size,
        strides=size,
        data_format="channels_last",
        kernel_initializer=kernel_initializer(),
        dtype=dtype,
        name=name,
    )


def convnext_norm(name, dtype):
    """The norm of ConvNeXt, over the features of each position."""
    return keras.layers.LayerNormalization(epsilon=1e-6, dtype=dtype, name=name)
