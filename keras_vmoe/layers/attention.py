"""Multi-head attention, initialized as in vision transformers."""

import math
from typing import Any

import keras

from keras_vmoe._checks import plain
from keras_vmoe._typing import Config
from keras_vmoe._typing import Shape
from keras_vmoe._typing import Tensor
from keras_vmoe.layers.normalization import LayerNormalization
from keras_vmoe.layers.parts import KeepsParts


@keras.saving.register_keras_serializable("keras_vmoe")
class MultiHeadAttention(keras.layers.MultiHeadAttention):
    """Keras's attention with D features in and out, initialized as in V-MoE.

    All four kernels map D to D features, so one Glorot limit, `sqrt(3 / D)`,
    fits them all. By default Keras treats the kernels `(D, heads, D / heads)`
    as convolutions and initializes them several times too small.

    Args:
        num_heads: Heads; must divide `features`.
        features: D.
        qk_norm: Whether to normalize each head's queries and keys (LayerNorm
            without bias) before their product.

    Call arguments:
        query: `(B, N, D)` float tensor.
        value: `(B, M, D)` float tensor; also the key.

    Returns:
        `(B, N, D)` tensor.

    Raises:
        ValueError: If the heads do not divide the features.

    Example:

    >>> x = keras.ops.ones((1, 4, 8))
    >>> MultiHeadAttention(num_heads=2, features=8)(x, x).shape
    (1, 4, 8)

    Reference:
        [Dosovitskiy et al., 2021](https://arxiv.org/abs/2010.11929),
        appendix A; [Dehghani et al., 2023](https://arxiv.org/abs/2302.05442),
        section 2, for the norms.
    """

    def __init__(
        self,
        num_heads: int,
        features: int,
        qk_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        if num_heads < 1 or features % num_heads:
            divisors = [n for n in range(1, 33) if features % n == 0]
            raise ValueError(
                "`hidden_dim` must be divisible by `num_heads`. "
                f"Received: hidden_dim={features}, num_heads={num_heads}. "
                f"Numbers of heads that fit: {divisors}."
            )
        limit = math.sqrt(3 / features)
        super().__init__(
            num_heads,
            features // num_heads,
            kernel_initializer=keras.initializers.RandomUniform(-limit, limit),
            **kwargs,
        )
        self.features = features
        self.qk_norm = bool(qk_norm)

    def build(
        self,
        query_shape: Shape,
        value_shape: Shape,
        key_shape: Shape | None = None,
    ) -> None:
        super().build(query_shape, value_shape, key_shape)
        if self.qk_norm:
            self.query_norm = self._head_norm("query_norm")
            self.key_norm = self._head_norm("key_norm")

    def _head_norm(self, name):
        norm = LayerNormalization(
            center=False, dtype=self.dtype_policy, name=name
        )
        norm.build((None, None, self.num_heads, self.key_dim))
        return norm

    def _compute_attention(self, query, key, *args, **kwargs):
        # The hook that Keras documents for custom attention. No public one
        # exists between the projections and their product.
        if self.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        return super()._compute_attention(query, key, *args, **kwargs)

    def call(
        self,
        query: Tensor,
        value: Tensor,
        key: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        # JAX's fused attention has no float16 on CPU. Asking for the scores
        # selects the explicit one.
        explicit = keras.backend.backend() == "jax" and (
            keras.backend.standardize_dtype(query.dtype) == "float16"
        )
        outputs = super().call(
            query, value, key, return_attention_scores=explicit, **kwargs
        )
        return outputs[0] if explicit else outputs

    def get_config(self) -> Config:
        config = keras.layers.Layer.get_config(self)
        return {
            **config,
            "num_heads": self.num_heads,
            "features": self.features,
            "qk_norm": self.qk_norm,
        }


@keras.saving.register_keras_serializable("keras_vmoe")
class SelfAttention(KeepsParts, keras.layers.Layer):
    """Multi-head self-attention, with D features in and out.

    Args:
        num_heads: Heads; must divide D.
        qk_norm: Whether to normalize each head's queries and keys (LayerNorm
            without bias) before their product, to keep attention in large
            models from collapsing.

    Call arguments:
        tokens: `(B, N, D)` float tensor.

    Returns:
        `(B, N, D)` tensor.

    Raises:
        ValueError: If the heads do not divide D.

    Example:

    >>> SelfAttention(num_heads=2)(keras.ops.ones((1, 4, 8))).shape
    (1, 4, 8)

    Reference:
        [Dosovitskiy et al., 2021](https://arxiv.org/abs/2010.11929),
        appendix A; [Dehghani et al., 2023](https://arxiv.org/abs/2302.05442),
        section 2, for the norms.
    """

    def __init__(
        self, num_heads: int, qk_norm: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.num_heads = plain(num_heads)
        self.qk_norm = bool(qk_norm)

    def build(self, input_shape: Shape) -> None:
        self.attention = MultiHeadAttention(
            self.num_heads,
            input_shape[-1],
            self.qk_norm,
            dtype=self.dtype_policy,
            name="attention",
        )
        self.attention.build(input_shape, input_shape)
        self.set_up_parts()

    def call(self, tokens: Tensor) -> Tensor:
        return self.attention(tokens, tokens)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "qk_norm": self.qk_norm,
        }
