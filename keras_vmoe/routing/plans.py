"""Routing plans: which token goes where, and the two moves this implies.

`Plan` is the contract; `SparsePlan` implements it for token choice.
"""

import dataclasses
from typing import Any
from typing import Protocol
from typing import runtime_checkable

from keras import ops

from keras_vmoe._checks import is_integer
from keras_vmoe._typing import Tensor
from keras_vmoe.routing._moves import collect
from keras_vmoe.routing._moves import spread
from keras_vmoe.routing._rows import add_rows


@runtime_checkable
class Plan(Protocol):
    """What a router returns: which expert gets which token.

    Implemented by `SparsePlan`, `DroplessPlan`, `ExpertChoicePlan` and
    `SoftPlan`. A custom plan has these five methods. An expert bank maps the
    output of `dispatch` to an input of `combine` with the same shape. Letters
    are explained in `keras_vmoe.routing`.
    """

    def dispatch(self, tokens: Tensor) -> Tensor:
        """Fills the experts' buffers.

        Args:
            tokens: `(G, S, D)` tensor.

        Returns:
            `(G, E, C, D)` tensor, 0 in empty slots; C is P for a `SoftPlan`. A
            `DroplessPlan` returns blocks, with rows `(M, T, D)`.
        """

    def combine(self, buffers: Tensor) -> Tensor:
        """Returns the experts' outputs to the tokens.

        Args:
            buffers: Of the shape that `dispatch` returns.

        Returns:
            `(G, S, D)` tensor: for each token, the sum of its experts' outputs
            times the combine weights; 0 for a token that no expert serves.
        """

    def load_share(self) -> Tensor:
        """Each expert's share of the load, `(E,)` float, sum 1 or all 0."""

    def dropped_share(self) -> Tensor:
        """Share of the load that was dropped, a scalar in `[0, 1]`."""

    def experts_of_images(self, num_images: int | Tensor) -> Tensor:
        """Which experts serve each image, `(G, num_images, E)` bool.

        Args:
            num_images: Images per group, with equally many tokens each.
        """


@dataclasses.dataclass(frozen=True)
class SparsePlan:
    """A `Plan` of token choice, indexed from both ends.

    Buffers store the choice in each slot, and choices store their slot: tokens
    move by gathers alone, forward and backward. The `(G, S, E, C)` tensor of
    the reference code's one-hot einsums is never made. Gradients are correct to
    any order. Forward mode works on PyTorch; JAX does not support it for
    functions with custom gradients, such as these gathers and those of a
    `DroplessPlan`. There `jax.jvp`, `jax.linearize` and `jax.hessian` raise;
    reverse over reverse, `jax.jacrev(jax.jacrev(f))`, is correct.

    Attributes:
        choice: `(G, E, C)` int32, the choice `s * K + k` that holds the slot;
            `S * K` if the slot is empty.
        slot: `(G, S, K)` int32, the slot `e * C + c` of the choice; `E * C` if
            the choice was dropped.
        weight: `(G, S, K)` float, the combine weight; 0 if dropped (NaN if the
            gate is NaN).
        load: `(G, E)` int32, the number of choices for each expert, dropped
            ones included.
    """

    choice: Any
    slot: Any
    weight: Any
    load: Any

    def dispatch(self, tokens: Tensor) -> Tensor:
        """Fills the experts' buffers; see `Plan.dispatch`."""
        return spread(tokens, self.choice, self.slot)

    def combine(self, buffers: Tensor) -> Tensor:
        """Returns the experts' outputs to the tokens; see `Plan.combine`."""
        weight = ops.cast(self.weight, buffers.dtype)
        groups, num_tokens, num_choices = ops.shape(weight)
        flat = (groups, num_tokens * num_choices, 1)
        gain = spread(
            ops.reshape(weight, flat),
            self.choice,
            ops.reshape(self.slot, flat),
        )
        tokens = collect(buffers * gain, self.choice, self.slot)
        # Adds 0, or the NaN of a NaN gate whose choices may all be dropped.
        return tokens + ops.sum(weight - weight, axis=-1, keepdims=True)

    def load_share(self) -> Tensor:
        """Each expert's share of all choices, `(E,)`, sum 1."""
        load = ops.cast(ops.sum(self.load, axis=0), "float32")
        return ops.divide_no_nan(load, ops.sum(load))

    def dropped_share(self) -> Tensor:
        """Dropped share of all choices, a scalar in `[0, 1]`."""
        num_slots = self.choice.shape[1] * ops.shape(self.choice)[2]
        served = ops.sum(ops.cast(self.slot < num_slots, "float32"))
        total = ops.cast(ops.sum(self.load), "float32")
        return ops.divide_no_nan(total - served, total)

    def experts_of_images(self, num_images: int | Tensor) -> Tensor:
        """Which experts serve each image, `(G, num_images, E)` bool."""
        num_tokens, num_choices = ops.shape(self.slot)[1:]
        size = num_tokens // num_images * num_choices
        # An empty slot holds S * K, and the quotient is no image.
        image, expert = flat_experts(self.choice // size)
        num_experts = self.choice.shape[1]
        return experts_of_images(image, expert, num_images, num_experts)


def check_capacity(capacity):
    """Raises if the capacity is an int below 1."""
    if is_integer(capacity) and capacity < 1:
        raise ValueError(
            "`capacity` must be at least 1. "
            f"Received: capacity={capacity}. "
            "`routing.capacity` computes one from a capacity factor."
        )


def experts_of_images(image, expert, num_images, num_experts):
    """Finds the experts that hold a token of each image.

    Args:
        image: `(G, N)` int tensor, the image, counted within the group, of
            the token in each slot; `num_images` or more if the slot is empty.
        expert: `(G, N)` int tensor, the expert of each slot.
        num_images: Images per group.
        num_experts: E.

    Returns:
        `(G, num_images, E)` bool tensor.
    """
    # Counted: comparing slots with images would grow with both.
    pairs = num_images * num_experts
    index = ops.where(image < num_images, image * num_experts + expert, pairs)
    ones = ops.ones((*ops.shape(index), 1))
    count = add_rows(ones, index, pairs)
    groups = ops.shape(index)[0]
    return ops.reshape(count, (groups, num_images, num_experts)) > 0


def flat_experts(slots):
    """Flattens slots `(G, E, C)` and their experts, both to `(G, E * C)`."""
    groups, num_experts, capacity = ops.shape(slots)
    shape = (groups, num_experts * capacity)
    expert = ops.arange(num_experts, dtype="int32")[:, None]
    expert = ops.broadcast_to(expert, ops.shape(slots))
    return ops.reshape(slots, shape), ops.reshape(expert, shape)
