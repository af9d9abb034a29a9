"""The tanh approximation of gelu, which has no name in Keras."""

import keras

from keras_vmoe._typing import Tensor


@keras.saving.register_keras_serializable("keras_vmoe")
def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of gelu, as in V-MoE and the original ViT.

    Keras's own `"gelu"` is the exact function. The string `"gelu_tanh"` names
    this one wherever this package takes an activation.

    Args:
        x: Float tensor of any shape.

    Returns:
        Tensor of the shape of `x`.

    Example:

    >>> round(float(gelu_tanh(keras.ops.convert_to_tensor(1.0))), 4)
    0.8412

    Reference:
        [Hendrycks and Gimpel, 2016](https://arxiv.org/abs/1606.08415),
        section 2.
    """
    return keras.activations.gelu(x, approximate=True)


def get_activation(identifier):
    """Resolves `"gelu_tanh"` and everything `keras.activations.get` accepts."""
    if identifier == "gelu_tanh":
        return gelu_tanh
    try:
        return keras.activations.get(identifier)
    except ValueError as error:
        raise ValueError(
            "`activation` must be 'gelu_tanh', a name that Keras knows, such "
            "as 'gelu' or 'relu', or a function. "
            f"Received: activation={identifier!r}."
        ) from error


def serialize_activation(activation):
    """Returns the string or config that `get_activation` restores."""
    if activation is gelu_tanh:
        return "gelu_tanh"
    return keras.activations.serialize(activation)
