"""Gates: from tokens to logits over experts, in float32 under every policy.

bfloat16 logits choose another expert for up to 1% of the tokens and tie
exactly: kernels, codes and logits of a gate are float32, and its tokens are
cast to it.
"""

import math

import keras
from keras import ops

from keras_vmoe._checks import check_sizes
from keras_vmoe._checks import is_number
from keras_vmoe._checks import nearest
from keras_vmoe.routing._groups import check_capacity_factor


class Gate(keras.layers.Layer):
    """What the gates of one logit per expert share.

    Args:
        num_experts: E.
    """

    def __init__(self, num_experts, **kwargs):
        super().__init__(**kwargs)
        check_sizes(num_experts=num_experts)
        self.supports_masking = True
        self.num_experts = int(num_experts)

    def add_float32(self, name, shape, initializer):
        """A float32 weight under every policy."""
        return self.add_weight(
            name=name,
            shape=shape,
            initializer=initializer,
            dtype="float32",
            autocast=False,
        )

    def compute_output_spec(self, tokens):
        shape = (*tokens.shape[:-1], self.num_experts)
        return keras.KerasTensor(shape, dtype="float32")

    def get_config(self):
        return {**super().get_config(), "num_experts": self.num_experts}


@keras.saving.register_keras_serializable("keras_vmoe")
class LinearGate(Gate):
    """One linear map from tokens to logits, without a bias.

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

    def build(self, input_shape):
        self.kernel = self.add_float32(
            "kernel", (input_shape[-1], self.num_experts), "lecun_normal"
        )

    def call(self, tokens):
        return ops.matmul(ops.cast(tokens, "float32"), self.kernel)


class ProjectedGate(Gate):
    """Compares a projection of the tokens with one learned code per expert.

    The logits are multiplied by a learned scale, the inverse of a temperature
    that starts at `temperature` and never falls below `min_temperature`. It is
    learned as the logarithm of the scale. These defaults, the standard
    deviation of the codes and the bias of the projection are those of the
    cosine gate of the Tutel library. There the projection has 256 features;
    here it has never more than half of the token's.

    Args:
        num_experts: E.
        projection_dim: Features of the projection, at most D; None means the
            smaller of 256 and D / 2.
        temperature: Starting value of the temperature, positive.
        min_temperature: Smallest temperature, positive.
    """

    def __init__(
        self,
        num_experts,
        projection_dim=None,
        temperature=0.5,
        min_temperature=0.01,
        **kwargs,
    ):
        super().__init__(num_experts, **kwargs)
        if projection_dim is not None:
            check_sizes(projection_dim=projection_dim)
        numbers = is_number(temperature) and is_number(min_temperature)
        if not numbers or not 0 < min_temperature <= temperature:
            raise ValueError(
                "`temperature` and `min_temperature` must be positive numbers, "
                "the first not below the second. Received: temperature="
                f"{temperature!r}, min_temperature={min_temperature!r}. "
                "The defaults are 0.5 and 0.01."
            )
        self.projection_dim = projection_dim
        self.temperature = temperature
        self.min_temperature = min_temperature

    def build(self, input_shape):
        features = input_shape[-1]
        size = self.projection_dim or min(256, max(1, features // 2))
        if size > features:
            raise ValueError(
                "`projection_dim` must not be larger than the tokens' features."
                f" Received: projection_dim={size} for {features} features. "
                "The default is half of them, at most 256."
            )
        self.kernel = self.add_float32(
            "kernel", (features, size), "lecun_normal"
        )
        self.bias = self.add_float32("bias", (size,), "zeros")
        self.codes = self.add_float32(
            "codes",
            (size, self.num_experts),
            keras.initializers.RandomNormal(stddev=0.01),
        )
        self.log_scale = self.add_float32(
            "log_scale",
            (),
            keras.initializers.Constant(-math.log(self.temperature)),
        )

    def call(self, tokens):
        tokens = ops.cast(tokens, "float32")
        projected = ops.matmul(tokens, self.kernel) + self.bias
        largest = -math.log(self.min_temperature)
        scale = ops.exp(ops.minimum(self.log_scale, largest))
        return scale * self.compare(projected, self.codes)

    def compare(self, projected, codes):
        """Similarity of `(G, S, P)` tokens and `(P, E)` codes, `(G, S, E)`."""
        raise NotImplementedError(f"{type(self).__name__} must define compare.")

    def get_config(self):
        return {
            **super().get_config(),
            "projection_dim": self.projection_dim,
            "temperature": self.temperature,
            "min_temperature": self.min_temperature,
        }


@keras.saving.register_keras_serializable("keras_vmoe")
class CosineGate(ProjectedGate):
    """Cosine similarity of projected tokens and learned codes of the experts.

    `scale * cos(W x + b, code_e)`, with a learned scale; see the arguments.

    Args:
        num_experts: E.
        projection_dim: Features of the projection, at most D; None means the
            smaller of 256 and D / 2. (Chi et al. take E / 2.)
        temperature: Starting value of the learned temperature, 1 / scale.
        min_temperature: Smallest temperature; the scale is at most its inverse.

    Call arguments:
        tokens: `(G, S, D)` float tensor.

    Returns:
        `(G, S, E)` float32 logits, in `[-scale, scale]`.

    Raises:
        ValueError: If the projection is larger than D, or a temperature is not
            positive.

    Example:

    >>> CosineGate(num_experts=4)(keras.ops.ones((1, 6, 8))).shape
    (1, 6, 4)

    Reference:
        [Chi et al., 2022](https://arxiv.org/abs/2204.09179); the gate called
        "cosine" in appendix A of
        [arXiv:2411.18322](https://arxiv.org/abs/2411.18322). The values of
        the defaults are those of Tutel's cosine gate.
    """

    def compare(self, projected, codes):
        return ops.matmul(unit_norm(projected, -1), unit_norm(codes, 0))


@keras.saving.register_keras_serializable("keras_vmoe")
class L2Gate(ProjectedGate):
    """Negative squared distance of projected tokens and the experts' codes.

    `-scale * |W x + b - code_e|²`, with a learned scale; see the arguments.

    Args:
        num_experts: E.
        projection_dim: Features of the projection, at most D; None means the
            smaller of 256 and D / 2.
        temperature: Starting value of the learned temperature, 1 / scale.
        min_temperature: Smallest temperature; the scale is at most its inverse.

    Call arguments:
        tokens: `(G, S, D)` float tensor.

    Returns:
        `(G, S, E)` float32 logits, at most 0.

    Raises:
        ValueError: If the projection is larger than D, or a temperature is not
            positive.

    Example:

    >>> L2Gate(num_experts=4)(keras.ops.ones((1, 6, 8))).shape
    (1, 6, 4)

    Reference:
        The gate called "l2" in appendix A of
        [arXiv:2411.18322](https://arxiv.org/abs/2411.18322).
    """

    def compare(self, projected, codes):
        # |p - c|² without a tensor of all differences. What experts differ in
        # comes first: |p|² may be much larger.
        product = 2.0 * ops.matmul(projected, codes)
        differing = product - ops.sum(ops.square(codes), axis=0)
        return differing - ops.sum(ops.square(projected), -1, keepdims=True)


@keras.saving.register_keras_serializable("keras_vmoe")
class SoftGate(keras.layers.Layer):
    """Similarity of tokens and slots, for Soft MoE.

    `scale * cos(x, mu)` of unit-norm tokens and slot parameters, P slots for
    each expert.

    Args:
        num_experts: E.
        num_slots: P; None means `round(S * capacity_factor / E)` for the S
            tokens of an image.
        capacity_factor: Slots relative to tokens, where `num_slots` is None.

    Call arguments:
        tokens: `(G, S, D)` float tensor; a group is one image.

    Returns:
        `(G, S, E, P)` float32 logits.

    Raises:
        ValueError: If the number of slots comes out at 0, or if it follows
            from a number of tokens that is not known.

    Example:

    >>> SoftGate(num_experts=2, num_slots=3)(keras.ops.ones((1, 6, 8))).shape
    (1, 6, 2, 3)

    Reference:
        [Puigcerver et al., 2023](https://arxiv.org/abs/2308.00951), section
        2.3.
    """

    def __init__(
        self, num_experts, num_slots=None, capacity_factor=1.0, **kwargs
    ):
        super().__init__(**kwargs)
        self.supports_masking = True
        check_sizes(num_experts=num_experts)
        check_capacity_factor(capacity_factor)
        if num_slots is not None:
            check_sizes(num_slots=num_slots)
        self.num_experts = int(num_experts)
        self.num_slots = num_slots
        self.capacity_factor = capacity_factor

    def build(self, input_shape):
        _, num_tokens, features = input_shape
        self.mu = self.add_weight(
            name="mu",
            shape=(features, self.num_experts, self._slots(num_tokens)),
            # Of the fan-in D, as if each slot were alone.
            initializer=keras.initializers.VarianceScaling(
                mode="fan_in",
                distribution="truncated_normal",
                input_axes=(0,),
                output_axes=(1, 2),
            ),
            dtype="float32",
            autocast=False,
        )
        self.scale = self.add_weight(
            name="scale",
            shape=(),
            initializer="ones",
            dtype="float32",
            autocast=False,
        )

    def _slots(self, num_tokens):
        if self.num_slots is not None:
            return self.num_slots
        if num_tokens is None:
            raise ValueError(
                "The number of slots follows from the number of tokens of an "
                "image, which must be known. Received: num_slots=None and "
                "tokens of unknown number. Set `num_slots`."
            )
        slots = round(num_tokens * self.capacity_factor / self.num_experts)
        if slots < 1:
            raise ValueError(
                "Each expert needs at least 1 slot. Received: "
                f"num_experts={self.num_experts}, capacity_factor="
                f"{self.capacity_factor} and {num_tokens} tokens per image, "
                "which gives 0 slots. Set `num_slots`, raise the capacity "
                "factor or take fewer experts."
            )
        return slots

    def call(self, tokens):
        tokens = unit_norm(ops.cast(tokens, "float32"), -1)
        mu = unit_norm(ops.convert_to_tensor(self.mu), 0)
        features, num_experts, num_slots = mu.shape
        mu = ops.reshape(mu, (features, num_experts * num_slots))
        logits = self.scale * ops.matmul(tokens, mu)
        groups, num_tokens, _ = ops.shape(logits)
        return ops.reshape(logits, (groups, num_tokens, num_experts, num_slots))

    def compute_output_spec(self, tokens):
        shape = (*tokens.shape[:-1], *self.mu.shape[1:])
        return keras.KerasTensor(shape, dtype="float32")

    def get_config(self):
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "num_slots": self.num_slots,
            "capacity_factor": self.capacity_factor,
        }


def unit_norm(x, axis):
    """`x` divided by its Euclidean norm; the epsilon is the reference's."""
    square = ops.sum(ops.square(x), axis=axis, keepdims=True)
    return x * ops.rsqrt(square + 1e-6)


GATES = {"cosine": CosineGate, "l2": L2Gate, "linear": LinearGate}


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
        raise ValueError(
            f"`gate` must be one of {sorted(GATES)} or a Keras layer. "
            f"Received: gate={identifier!r}.{nearest(identifier, GATES)}"
        )
    return GATES[identifier](num_experts, **kwargs)
