"""Soft MoE: experts work on mixtures of tokens."""

from typing import Any

import keras
from keras import ops

from keras_vmoe import routing
from keras_vmoe._checks import check_sizes
from keras_vmoe._checks import plain
from keras_vmoe._typing import Config
from keras_vmoe._typing import Shape
from keras_vmoe._typing import Tensor
from keras_vmoe.layers.gates import unit_norm
from keras_vmoe.layers.precision import in_float32
from keras_vmoe.layers.routers import Router
from keras_vmoe.layers.routers import check_settings
from keras_vmoe.routing._groups import check_capacity_factor
from keras_vmoe.routing._selection import softmax
from keras_vmoe.routing.plans import Plan


@keras.saving.register_keras_serializable("keras_vmoe")
class SoftGate(keras.layers.Layer):
    """Similarity of tokens and slots, for Soft MoE.

    `scale * cos(x, mu)` of unit-norm tokens and slot parameters, P slots per
    expert.

    Args:
        num_experts: E.
        num_slots: P; None means `round(S * capacity_factor / E)` for the S
            tokens of an image.
        capacity_factor: Slots relative to tokens, if `num_slots` is None.

    Call arguments:
        tokens: `(G, S, D)` float tensor; a group is one image.

    Returns:
        `(G, S, E, P)` float32 logits.

    Raises:
        ValueError: If the number of slots is 0, or if it depends on an unknown
            number of tokens.

    Example:

    >>> SoftGate(num_experts=2, num_slots=3)(keras.ops.ones((1, 6, 8))).shape
    (1, 6, 2, 3)

    Reference:
        [Puigcerver et al., 2023](https://arxiv.org/abs/2308.00951), section
        2.3.
    """

    def __init__(
        self,
        num_experts: int,
        num_slots: int | None = None,
        capacity_factor: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        check_sizes(num_experts=num_experts)
        check_capacity_factor(capacity_factor)
        if num_slots is not None:
            check_sizes(num_slots=num_slots)
        self.num_experts = int(num_experts)
        self.num_slots = plain(num_slots)
        self.capacity_factor = capacity_factor

    def build(self, input_shape: Shape) -> None:
        _, num_tokens, features = input_shape
        self.mu = self.add_weight(
            name="mu",
            shape=(features, self.num_experts, self._slots(num_tokens)),
            # With fan-in D, as if each slot were alone.
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
                "The number of slots depends on the number of tokens in an "
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
                "factor or use fewer experts."
            )
        return slots

    @in_float32
    def call(self, tokens: Tensor) -> Tensor:
        tokens = unit_norm(ops.cast(tokens, "float32"), -1)
        mu = unit_norm(ops.convert_to_tensor(self.mu), 0)
        features, num_experts, num_slots = mu.shape
        mu = ops.reshape(mu, (features, num_experts * num_slots))
        logits = self.scale * ops.matmul(tokens, mu)
        groups, num_tokens, _ = ops.shape(logits)
        return ops.reshape(logits, (groups, num_tokens, num_experts, num_slots))

    def compute_output_spec(self, tokens: Tensor) -> keras.KerasTensor:
        shape = (*tokens.shape[:-1], *self.mu.shape[1:])
        return keras.KerasTensor(shape, dtype="float32")

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "num_slots": self.num_slots,
            "capacity_factor": self.capacity_factor,
        }


@keras.saving.register_keras_serializable("keras_vmoe")
class SoftRouter(Router):
    """Soft MoE: each expert has P slots, convex mixtures of an image's tokens.

    No token is dropped and the load needs no balancing. Each image is a group
    of its own: with this router, `MoEMLP` routes every image alone.

    Args:
        num_experts: E, at least 1.
        num_slots: P, slots per expert. None means `round(N * capacity_factor /
            E)` for the N tokens of an image; N must then be known.
        capacity_factor: Slots relative to tokens, if `num_slots` is None.
        noise_std: Standard deviation of the logits' noise in training, in
            units of `1 / E`.
        seed: Optional integer seed of the noise.
        gate: A `SoftGate`; None makes one. Routers given the same gate share
            it.

    Call arguments:
        tokens: `(G, S, D)` float tensor; a group is one image.
        mask: Optional `(G, S)` bool tensor, False for tokens to leave out.
        training: Whether to add noise.

    Returns:
        A `routing.Plan` from `routing.soft_plan`.

    Raises:
        ValueError: If the number of slots is 0, unknown, given twice or not
            the gate's, `noise_std` is negative, or a setting of another router
            is given.

    Example:

    >>> router = SoftRouter(num_experts=4, num_slots=2)
    >>> tokens = keras.random.normal((3, 32, 8))
    >>> router(tokens).dispatch(tokens).shape
    (3, 4, 2, 8)

    Reference:
        [Puigcerver et al., 2023](https://arxiv.org/abs/2308.00951), section 2.
    """

    images_per_group: int | None = 1

    def __init__(
        self,
        num_experts: int,
        num_slots: int | None = None,
        capacity_factor: float = 1.0,
        noise_std: float = 0.0,
        seed: int | None = None,
        gate: SoftGate | None = None,
        **kwargs: Any,
    ) -> None:
        check_settings(type(self).__name__, kwargs)
        if num_slots is not None and capacity_factor != 1.0:
            raise ValueError(
                "Either `num_slots` or the capacity factor sets the number of "
                f"slots. Received: num_slots={num_slots} together with "
                f"capacity_factor={capacity_factor}. Leave one of them out."
            )
        if gate is None:
            gate = SoftGate(
                num_experts,
                num_slots,
                capacity_factor,
                dtype=kwargs.get("dtype"),
                name="gate",
            )
        elif not isinstance(gate, SoftGate) or (
            (gate.num_slots, gate.capacity_factor)
            != (num_slots, capacity_factor)
        ):
            raise ValueError(
                "The gate of a `SoftRouter` must be a `SoftGate` of its slots "
                f"and capacity factor. Received: {gate=!r}, {num_slots=}, "
                f"{capacity_factor=}. Leave the gate out."
            )
        super().__init__(num_experts, noise_std, gate, seed, **kwargs)
        self.num_slots = plain(num_slots)
        self.capacity_factor = capacity_factor

    def make_plan(
        self, logits: Tensor, mask: Tensor | None, group_size: int | Tensor
    ) -> Plan:
        return routing.soft_plan(logits, mask)

    def expert_gates(self, logits: Tensor) -> Tensor:
        groups, num_tokens, num_experts, num_slots = ops.shape(logits)
        size = num_experts * num_slots
        flat = ops.reshape(logits, (groups, num_tokens, size))
        gates = ops.reshape(softmax(flat), ops.shape(logits))
        return ops.sum(gates, axis=-1)

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "num_slots": self.num_slots,
            "capacity_factor": self.capacity_factor,
        }
