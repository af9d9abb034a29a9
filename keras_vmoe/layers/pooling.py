"""From the tokens of an image to one vector."""

from typing import Any

import keras
from keras import ops

from keras_vmoe._checks import plain
from keras_vmoe._typing import Activation
from keras_vmoe._typing import Config
from keras_vmoe._typing import Shape
from keras_vmoe._typing import Tensor
from keras_vmoe.layers.attention import MultiHeadAttention
from keras_vmoe.layers.mlp import MLP
from keras_vmoe.layers.normalization import LayerNormalization
from keras_vmoe.layers.parts import KeepsParts


@keras.saving.register_keras_serializable("keras_vmoe")
class TokenPooling(keras.layers.Layer):
    """Selects the first token, the class token.

    Call arguments:
        tokens: `(B, N, D)` float tensor.

    Returns:
        `(B, D)` tensor.

    Example:

    >>> TokenPooling()(keras.ops.ones((2, 5, 8))).shape
    (2, 8)
    """

    def call(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return (input_shape[0], input_shape[-1])


@keras.saving.register_keras_serializable("keras_vmoe")
class AttentionPooling(KeepsParts, keras.layers.Layer):
    """A learned probe attends to the tokens, followed by a residual MLP.

    `x = attention(probe, tokens)`, then `x + MLP(LayerNorm(x))`. The reference
    code calls it `MapHead`.

    Args:
        num_heads: Heads; must divide D.
        hidden_dim: F, hidden features of the MLP.
        activation: Activation of the MLP.

    Call arguments:
        tokens: `(B, N, D)` float tensor.

    Returns:
        `(B, D)` tensor.

    Raises:
        ValueError: If the heads do not divide D.

    Example:

    >>> AttentionPooling(num_heads=2, hidden_dim=16)(
    ...     keras.ops.ones((2, 5, 8))).shape
    (2, 8)

    Reference:
        [Zhai et al., 2022](https://arxiv.org/abs/2106.04560), section 3.2;
        [Lee et al., 2019](https://arxiv.org/abs/1810.00825).
    """

    def __init__(
        self,
        num_heads: int,
        hidden_dim: int,
        activation: Activation = "gelu_tanh",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_heads = plain(num_heads)
        self.hidden_dim = plain(hidden_dim)
        self.activation = activation
        self.norm = LayerNormalization(dtype=self.dtype_policy, name="norm")
        self.mlp = MLP(
            hidden_dim, activation, dtype=self.dtype_policy, name="mlp"
        )

    def build(self, input_shape: Shape) -> None:
        features = input_shape[-1]
        self.probe = self.add_weight(
            name="probe",
            shape=(1, 1, features),
            initializer=keras.initializers.GlorotUniform(
                input_axes=(1,), output_axes=(2,)
            ),
        )
        self.attention = MultiHeadAttention(
            self.num_heads, features, dtype=self.dtype_policy, name="attention"
        )
        probe_shape = (input_shape[0], 1, features)
        self.attention.build(probe_shape, input_shape)
        self.norm.build(probe_shape)
        self.mlp.build(probe_shape)
        self.set_up_parts()

    def call(self, tokens: Tensor) -> Tensor:
        shape = (ops.shape(tokens)[0], 1, tokens.shape[-1])
        probe = ops.broadcast_to(ops.cast(self.probe, tokens.dtype), shape)
        x = self.attention(probe, tokens)
        x = x + self.mlp(self.norm(x))
        return ops.squeeze(x, axis=1)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return (input_shape[0], input_shape[-1])

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "hidden_dim": self.hidden_dim,
            "activation": self.activation,
        }
