"""Gates: from tokens to logits over experts, in float32 under every policy.

bfloat16 logits choose another expert for up to 1% of the tokens and tie
exactly. A gate's kernels, codes and logits are therefore float32, and tokens
are cast to float32.
"""

import math
from typing import Any

import keras
from keras import ops

from keras_vmoe._checks import check_sizes
from keras_vmoe._checks import is_number
from keras_vmoe._checks import nearest
from keras_vmoe._checks import plain
from keras_vmoe._typing import Config
from keras_vmoe._typing import Constraint
from keras_vmoe._typing import Initializer
from keras_vmoe._typing import Regularizer
from keras_vmoe._typing import Shape
from keras_vmoe._typing import Tensor
from keras_vmoe.layers.precision import in_float32
from keras_vmoe.layers.weights import get_options
from keras_vmoe.layers.weights import options_config
from keras_vmoe.layers.weights import set_options


class Gate(keras.layers.Layer):
    """Base of gates with one logit per expert.

    Args:
        num_experts: E.
        kernel_initializer: Initializer of the kernel.
        kernel_regularizer: Optional regularizer of the kernel.
        kernel_constraint: Optional constraint on the kernel.
    """

    def __init__(
        self,
        num_experts: int,
        kernel_initializer: Initializer = "lecun_normal",
        kernel_regularizer: Regularizer | None = None,
        kernel_constraint: Constraint | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_sizes(num_experts=num_experts)
        self.supports_masking = True
        self.num_experts = int(num_experts)
        set_options(
            self,
            kernel_initializer=kernel_initializer,
            kernel_regularizer=kernel_regularizer,
            kernel_constraint=kernel_constraint,
        )

    def add_kernel(self, shape: tuple[int, ...]) -> keras.Variable:
        """Adds the kernel that maps the tokens' features."""
        return self.add_float32("kernel", shape, **get_options(self, "kernel"))

    def add_float32(
        self,
        name: str,
        shape: tuple[int, ...],
        initializer: Initializer,
        **options: Any,
    ) -> keras.Variable:
        """Adds a weight that is float32 under every policy."""
        return self.add_weight(
            name=name,
            shape=shape,
            initializer=initializer,
            dtype="float32",
            autocast=False,
            **options,
        )

    def compute_output_spec(self, tokens: Tensor) -> keras.KerasTensor:
        shape = (*tokens.shape[:-1], self.num_experts)
        return keras.KerasTensor(shape, dtype="float32")

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            **options_config(self, "kernel"),
        }


@keras.saving.register_keras_serializable("keras_vmoe")
class LinearGate(Gate):
    """One linear map from tokens to logits, without a bias.

    Args:
        num_experts: E.
        kernel_initializer: Initializer of the kernel, `(D, E)`.
        kernel_regularizer: Optional regularizer of the kernel.
        kernel_constraint: Optional constraint on the kernel.

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

    def build(self, input_shape: Shape) -> None:
        self.kernel = self.add_kernel((input_shape[-1], self.num_experts))

    @in_float32
    def call(self, tokens: Tensor) -> Tensor:
        return ops.matmul(ops.cast(tokens, "float32"), self.kernel)


class ProjectedGate(Gate):
    """Compares a projection of the tokens with one learned code per expert.

    The logits are multiplied by a learned scale, the inverse of a temperature
    that starts at `temperature` and never falls below `min_temperature`. The
    learned weight is the logarithm of the scale. These defaults, the standard
    deviation of the codes and the bias of the projection follow the cosine gate
    of the Tutel library. Tutel's projection has 256 features; here the default
    is at most half of the token's features.

    Args:
        num_experts: E.
        projection_dim: Features of the projection, at most D; None means the
            smaller of 256 and D / 2.
        temperature: Starting value of the temperature, positive.
        min_temperature: Smallest temperature, positive.
        **kwargs: Further arguments of `Gate`.
    """

    def __init__(
        self,
        num_experts: int,
        projection_dim: int | None = None,
        temperature: float = 0.5,
        min_temperature: float = 0.01,
        **kwargs: Any,
    ) -> None:
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
        self.projection_dim = plain(projection_dim)
        self.temperature = temperature
        self.min_temperature = min_temperature

    def build(self, input_shape: Shape) -> None:
        features = input_shape[-1]
        size = self.projection_dim or min(256, max(1, features // 2))
        if size > features:
            raise ValueError(
                "`projection_dim` must not be larger than the tokens' features."
                f" Received: projection_dim={size} for {features} features. "
                "The default is half the features, at most 256."
            )
        self.kernel = self.add_kernel((features, size))
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

    @in_float32
    def call(self, tokens: Tensor) -> Tensor:
        tokens = ops.cast(tokens, "float32")
        projected = ops.matmul(tokens, self.kernel) + self.bias
        largest = -math.log(self.min_temperature)
        scale = ops.exp(ops.minimum(self.log_scale, largest))
        return scale * self.compare(projected, self.codes)

    def compare(self, projected: Tensor, codes: Tensor) -> Tensor:
        """Similarity of `(G, S, P)` tokens and `(P, E)` codes, `(G, S, E)`."""
        raise NotImplementedError(f"{type(self).__name__} must define compare.")

    def get_config(self) -> Config:
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
        kernel_initializer: Initializer of the kernel of the projection.
        kernel_regularizer: Optional regularizer of the kernel.
        kernel_constraint: Optional constraint on the kernel.

    Call arguments:
        tokens: `(G, S, D)` float tensor.

    Returns:
        `(G, S, E)` float32 logits, in `[-scale, scale]`.

    Raises:
        ValueError: If the projection is larger than D, or a temperature is not
            positive or below the minimum.

    Example:

    >>> CosineGate(num_experts=4)(keras.ops.ones((1, 6, 8))).shape
    (1, 6, 4)

    Reference:
        [Chi et al., 2022](https://arxiv.org/abs/2204.09179); the gate called
        "cosine" in appendix A of
        [arXiv:2411.18322](https://arxiv.org/abs/2411.18322). The values of
        the defaults are those of Tutel's cosine gate.
    """

    def compare(self, projected: Tensor, codes: Tensor) -> Tensor:
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
        kernel_initializer: Initializer of the kernel of the projection.
        kernel_regularizer: Optional regularizer of the kernel.
        kernel_constraint: Optional constraint on the kernel.

    Call arguments:
        tokens: `(G, S, D)` float tensor.

    Returns:
        `(G, S, E)` float32 logits, at most 0.

    Raises:
        ValueError: If the projection is larger than D, or a temperature is not
            positive or below the minimum.

    Example:

    >>> L2Gate(num_experts=4)(keras.ops.ones((1, 6, 8))).shape
    (1, 6, 4)

    Reference:
        The gate called "l2" in appendix A of
        [arXiv:2411.18322](https://arxiv.org/abs/2411.18322).
    """

    def compare(self, projected: Tensor, codes: Tensor) -> Tensor:
        # |p - c|² without a tensor of all differences. The terms that differ
        # between experts come first: |p|² may be much larger.
        product = 2.0 * ops.matmul(projected, codes)
        differing = product - ops.sum(ops.square(codes), axis=0)
        return differing - ops.sum(ops.square(projected), -1, keepdims=True)


def unit_norm(x, axis):
    """Divides `x` by its Euclidean norm, with the reference's epsilon."""
    square = ops.sum(ops.square(x), axis=axis, keepdims=True)
    return x * ops.rsqrt(square + 1e-6)


GATES = {"cosine": CosineGate, "l2": L2Gate, "linear": LinearGate}


def get_gate(identifier, num_experts, **kwargs):
    """Makes the gate that a router's `gate` argument names.

    Args:
        identifier: A name in `GATES`, or a layer from `(G, S, D)` tokens to
            `(G, S, E)` logits, which is returned unchanged.
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
