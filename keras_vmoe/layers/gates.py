"""Gates: from tokens to logits over experts."""

import difflib

import keras
from keras import ops


@keras.saving.register_keras_serializable("keras_vmoe")
class LinearGate(keras.layers.Layer):
    """One linear map from tokens to logits, without a bias.

    Kernel and logits are float32 under every dtype policy: bfloat16 logits
    choose another expert for up to 1% of the tokens and tie exactly.

    Args:
        num_experts: E.

    Call arguments:
        tokens: `(G, S, D)` float tensor.

    Returns:
        `(G, S, E)` float32 logits.

    Example:

    >>> LinearGate(num_experts=4)(keras.ops.ones((1, 6, 8))).shape
    (1, 6, 4)

    Reference:
        [Riquelme et al., 2021](https://arxiv.org/abs/2106.05974), section 2.2;
        the gate called "conv1x1" in appendix A of
        [arXiv:2411.18322](https://arxiv.org/abs/2411.18322).
    """

    def __init__(self, num_experts, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.num_experts = num_experts

    def build(self, input_shape):
        self.kernel = self.add_weight(
            name="kernel",
            shape=(input_shape[-1], self.num_experts),
            initializer="lecun_normal",
            dtype="float32",
            autocast=False,
        )

    def call(self, tokens):
        return ops.matmul(ops.cast(tokens, "float32"), self.kernel)

    def compute_output_spec(self, tokens):
        shape = (*tokens.shape[:-1], self.num_experts)
        return keras.KerasTensor(shape, dtype="float32")

    def get_config(self):
        return {**super().get_config(), "num_experts": self.num_experts}


GATES = {"linear": LinearGate}


def get_gate(identifier, num_experts, **kwargs):
    """Makes the gate that a router's `gate` argument names.

    Args:
        identifier: A name in `GATES`, or a layer from `(G, S, D)` tokens to
            `(G, S, E)` logits, which is used as it is.
        num_experts: E.
        **kwargs: Keyword arguments of a named gate.

    Returns:
        A Keras layer.

    Raises:
        ValueError: If the name is unknown.
    """
    if isinstance(identifier, keras.layers.Layer):
        return identifier
    if not isinstance(identifier, str) or identifier not in GATES:
        near = difflib.get_close_matches(str(identifier), GATES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"`gate` must be one of {sorted(GATES)} or a Keras layer. "
            f"Received: gate={identifier!r}.{hint}"
        )
    return GATES[identifier](num_experts, **kwargs)
