"""Routing plans: who goes where, and the two moves that follow from it.

`Plan` is the contract; `SparsePlan` is that of token choice.
"""

import dataclasses
import functools
import operator
from typing import Any
from typing import Protocol
from typing import runtime_checkable

from keras import ops

from keras_vmoe._checks import is_integer
from keras_vmoe.routing._rows import take_rows


@runtime_checkable
class Plan(Protocol):
    """What a router returns: which expert gets which token.

    `SparsePlan`, `DroplessPlan`, `ExpertChoicePlan` and `SoftPlan` fulfil it. A
    plan of one's own has these five methods; an expert bank maps what
    `dispatch` returns to what `combine` takes, of the same shape. Letters as in
    `keras_vmoe.routing`.
    """

    def dispatch(self, tokens):
        """Fills the experts' buffers.

        Args:
            tokens: `(G, S, D)` tensor.

        Returns:
            `(G, E, C, D)` tensor, 0 in empty slots; C is P for a `SoftPlan`. A
            `DroplessPlan` returns blocks, with rows `(M, T, D)`.
        """

    def combine(self, buffers):
        """Returns the experts' outputs to the tokens.

        Args:
            buffers: Of the shape that `dispatch` returns.

        Returns:
            `(G, S, D)` tensor: per token the sum of its experts' outputs times
            the combine weights, 0 for a token that no expert serves.
        """

    def load_share(self):
        """Share of the load on each expert, `(E,)` float, sum 1 or all 0."""

    def dropped_share(self):
        """Share of the load that was dropped, a scalar in `[0, 1]`."""

    def experts_of_images(self, num_images):
        """Which experts serve each image, `(G, num_images, E)` bool.

        Args:
            num_images: Images of a group, of equally many tokens each.
        """


@dataclasses.dataclass(frozen=True)
class SparsePlan:
    """A `Plan` of token choice, known from both of its ends.

    Buffers know which choice fills each slot and choices know their slot, so
    tokens move by gathers alone, forward and backward. The `(G, S, E, C)`
    tensor of the reference program's one-hot einsums is never made. The moves
    have custom gradients, in reverse mode only.

    Attributes:
        choice: `(G, E, C)` int32, the choice `s * K + k` that holds the slot;
            `S * K` where the slot is empty.
        slot: `(G, S, K)` int32, the slot `e * C + c` of the choice; `E * C`
            where the choice was dropped.
        weight: `(G, S, K)` float, the combine weight; 0 where dropped
            (NaN where the gate is NaN).
        load: `(G, E)` int32, how many choices fell on each expert, dropped ones
            included.
    """

    choice: Any
    slot: Any
    weight: Any
    load: Any

    def dispatch(self, tokens):
        """Fills the experts' buffers; see `Plan.dispatch`."""
        # An empty slot holds S * K, so that the quotient is S: no token.
        source = self.choice // self.slot.shape[-1]

        # Indices are arguments, not closed over: JAX's rematerialisation traces
        # the gradient where the values of the closure no longer exist.
        @ops.custom_gradient
        def move(tokens, source, slot):
            def gradient(*args, upstream=None):
                upstream = args[-1] if upstream is None else upstream
                returned = take_rows(_flat(upstream), slot)  # (G, S, K, D)
                return _sum_choices(returned), None, None

            return take_rows(tokens, source), gradient

        return move(tokens, source, self.slot)

    def combine(self, buffers):
        """Returns the experts' outputs to the tokens; see `Plan.combine`."""
        weight = ops.cast(self.weight, buffers.dtype)

        @ops.custom_gradient
        def move(buffers, weight, choice, slot):
            returned = take_rows(_flat(buffers), slot)  # (G, S, K, D)

            def gradient(*args, upstream=None):
                upstream = args[-1] if upstream is None else upstream
                source = choice // slot.shape[-1]
                gain = take_rows(_choices(weight), choice)
                d_buffers = take_rows(upstream, source) * gain
                d_weight = ops.sum(returned * upstream[:, :, None, :], axis=-1)
                return d_buffers, d_weight, None, None

            return _sum_choices(returned * weight[..., None]), gradient

        return move(buffers, weight, self.choice, self.slot)

    def load_share(self):
        """Share of all choices that fell on each expert, `(E,)`, sum 1."""
        load = ops.cast(ops.sum(self.load, axis=0), "float32")
        return ops.divide_no_nan(load, ops.sum(load))

    def dropped_share(self):
        """Share of all choices that were dropped, a scalar in `[0, 1]`."""
        num_slots = self.choice.shape[1] * ops.shape(self.choice)[2]
        served = ops.sum(ops.cast(self.slot < num_slots, "float32"))
        total = ops.cast(ops.sum(self.load), "float32")
        return ops.divide_no_nan(total - served, total)

    def experts_of_images(self, num_images):
        """Which experts serve each image, `(G, num_images, E)` bool."""
        num_tokens, num_choices = ops.shape(self.slot)[1:]
        size = num_tokens // num_images * num_choices
        # An empty slot holds S * K, so that the quotient is no image.
        return experts_of_images(self.choice // size, num_images)


def check_capacity(capacity):
    """Raises if the capacity is an int below 1."""
    if is_integer(capacity) and capacity < 1:
        raise ValueError(
            "`capacity` must be at least 1. "
            f"Received: capacity={capacity}. "
            "`routing.capacity` computes one from a capacity factor."
        )


def experts_of_images(image, num_images):
    """Which experts hold a token of which image.

    Args:
        image: `(G, E, C)` int tensor, the image, counted within the group, of
            the token in each slot; `num_images` or more where it is empty.
        num_images: Images of a group.

    Returns:
        `(G, num_images, E)` bool tensor.
    """
    images = ops.arange(num_images, dtype="int32")[:, None, None]
    return ops.any(image[:, None] == images, axis=-1)


def _flat(buffers):
    """`(G, E, C, D)` as `(G, E * C, D)`."""
    groups, num_experts, capacity, features = ops.shape(buffers)
    return ops.reshape(buffers, (groups, num_experts * capacity, features))


def _choices(weight):
    """`(G, S, K)` as `(G, S * K, 1)`."""
    groups, num_tokens, num_choices = ops.shape(weight)
    return ops.reshape(weight, (groups, num_tokens * num_choices, 1))


def _sum_choices(x):
    """`(G, S, K, D)` summed over K."""
    # Added one by one: XLA on CPU fuses a reduction over K with the gather in
    # front of it and takes forty times as long.
    return functools.reduce(operator.add, ops.unstack(x, axis=2))
