"""The encoder block of a vision transformer, as a piece of functional graph."""

import keras

from keras_vmoe.layers.attention import SelfAttention
from keras_vmoe.layers.stochastic import Dropout
from keras_vmoe.layers.stochastic import DropPath
from keras_vmoe.layers.stochastic import LayerScale


def encoder_block(
    x,
    mlp,
    num_heads,
    name,
    dropout=0.0,
    drop_path_rate=0.0,
    layer_scale_init_value=None,
):
    """A pre-norm transformer block around any MLP.

    A function and not a layer, so that every part is a layer of the model that
    calls it, with a name: `summary()` shows it, `get_layer` finds it and its
    output can be taken as a feature.

    Args:
        x: `(B, N, D)` symbolic tensor.
        mlp: Layer from `(B, N, D)` to the same shape, such as `layers.MLP` or
            `layers.MoEMLP`.
        num_heads: Heads of the attention; must divide D.
        name: Prefix of the layers' names.
        dropout: Dropout rate after the attention.
        drop_path_rate: Probability of dropping a residual branch of an image.
        layer_scale_init_value: Initial value of the layer scale; None leaves
            it out.

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
    dtype = mlp.dtype_policy.name

    def branch(x, layer, part):
        norm = keras.layers.LayerNormalization(
            epsilon=1e-6, dtype=dtype, name=f"{name}_{part}_norm"
        )
        y = layer(norm(x))
        if dropout and part == "attention":
            y = Dropout(dropout, dtype=dtype, name=f"{name}_{part}_dropout")(y)
        if layer_scale_init_value is not None:
            scale = f"{name}_{part}_scale"
            y = LayerScale(layer_scale_init_value, dtype=dtype, name=scale)(y)
        if drop_path_rate:
            y = DropPath(
                drop_path_rate, dtype=dtype, name=f"{name}_{part}_drop"
            )(y)
        return keras.layers.Add(dtype=dtype, name=f"{name}_{part}_add")([x, y])

    attention = SelfAttention(num_heads, dtype=dtype, name=f"{name}_attention")
    return branch(branch(x, attention, "attention"), mlp, "mlp")
