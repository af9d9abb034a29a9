"""Soft MoE: every slot is a convex mixture of all tokens."""

import dataclasses
from typing import Any

from keras import ops

from keras_vmoe._checks import check_mask
from keras_vmoe._typing import Tensor
from keras_vmoe.routing._selection import softmax


@dataclasses.dataclass(frozen=True)
class SoftPlan:
    """A `Plan` of convex mixtures, with P slots per expert.

    Attributes:
        dispatch_weight: `(G, S, E, P)` float; sums to 1 over the tokens.
        combine_weight: `(G, S, E, P)` float; sums to 1 over the slots of all
            experts, and is 0 for masked tokens.
        mask: `(G, S)` bool, False for tokens that are left out; or None.
    """

    dispatch_weight: Any
    combine_weight: Any
    mask: Any = None

    def dispatch(self, tokens: Tensor) -> Tensor:
        """Mixes the tokens into the experts' slots; see `Plan.dispatch`."""
        weight = ops.cast(self.dispatch_weight, tokens.dtype)
        if self.mask is not None:  # A weight of 0 does not undo a NaN.
            zeros = ops.zeros_like(tokens)
            tokens = ops.where(self.mask[..., None], tokens, zeros)
        _, _, num_experts, num_slots = self.dispatch_weight.shape
        groups, _, features = ops.shape(tokens)
        slots = ops.matmul(ops.transpose(_flat(weight), (0, 2, 1)), tokens)
        return ops.reshape(slots, (groups, num_experts, num_slots, features))

    def combine(self, buffers: Tensor) -> Tensor:
        """Mixes the experts' outputs into the tokens; see `Plan.combine`."""
        weight = ops.cast(self.combine_weight, buffers.dtype)
        groups, num_experts, num_slots, features = ops.shape(buffers)
        num_slots = num_experts * num_slots
        slots = ops.reshape(buffers, (groups, num_slots, features))
        return ops.matmul(_flat(weight), slots)

    def load_share(self) -> Tensor:
        """Each expert's share of the combine weights, `(E,)`, sum 1."""
        load = ops.sum(self.combine_weight, axis=(0, 1, 3))
        return ops.divide_no_nan(load, ops.sum(load))

    def dropped_share(self) -> Tensor:
        """0: no token is ever dropped."""
        return ops.zeros(())

    def experts_of_images(self, num_images: int | Tensor) -> Tensor:
        """All True: every expert serves every image, `(G, num_images, E)`."""
        groups, _, num_experts, _ = ops.shape(self.combine_weight)
        return ops.ones((groups, num_images, num_experts), "bool")


def soft_plan(logits: Tensor, mask: Tensor | None = None) -> SoftPlan:
    """Mixes tokens into slots, and slots into tokens, with two softmaxes.

    Args:
        logits: `(G, S, E, P)` float tensor.
        mask: Optional `(G, S)` bool tensor. Tokens at False go into no slot
            and get 0 back.

    Returns:
        A `SoftPlan`.

    Raises:
        ValueError: If the mask has another shape.

    Example:

    >>> plan = soft_plan(keras.ops.zeros((1, 4, 2, 1)))
    >>> float(plan.dispatch_weight[0, 0, 0, 0])
    0.25
    >>> float(plan.combine_weight[0, 0, 0, 0])
    0.5

    Reference:
        [Puigcerver et al., 2023](https://arxiv.org/abs/2308.00951), section
        2.1, equations 1 and 2.
    """
    check_mask(mask, logits.shape[:2])
    shape = ops.shape(logits)
    flat = _flat(logits)
    combine = softmax(flat, axis=-1)
    if mask is not None:
        kept = mask[..., None]
        combine = ops.where(kept, combine, ops.zeros_like(combine))
        # Finite: a group with only masked tokens must not give NaN.
        flat = ops.where(kept, flat, -1e30)
    dispatch = softmax(flat, axis=1)
    return SoftPlan(
        dispatch_weight=ops.reshape(dispatch, shape),
        combine_weight=ops.reshape(combine, shape),
        mask=mask,
    )


def _flat(weight):
    """`(G, S, E, P)` as `(G, S, E * P)`."""
    groups, num_tokens, num_experts, num_slots = ops.shape(weight)
    return ops.reshape(weight, (groups, num_tokens, num_experts * num_slots))
