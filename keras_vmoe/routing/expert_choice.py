"""Expert choice: each expert picks its C best tokens."""

import dataclasses
from typing import Any

from keras import ops

from keras_vmoe._checks import check_mask
from keras_vmoe._checks import is_integer
from keras_vmoe._typing import Tensor
from keras_vmoe.routing._rows import add_rows
from keras_vmoe.routing._rows import take_rows
from keras_vmoe.routing.plans import check_capacity
from keras_vmoe.routing.plans import experts_of_images
from keras_vmoe.routing.plans import flat_experts


@dataclasses.dataclass(frozen=True)
class ExpertChoicePlan:
    """A `Plan` of expert choice: a token may go to any number of experts.

    Attributes:
        token: `(G, E, C)` int32, the token in each slot; S where it is empty.
        weight: `(G, E, C)` float, the combine weight; 0 where empty.
        mask: `(G, S)` bool, False for tokens that are left out.
    """

    token: Any
    weight: Any
    mask: Any

    def dispatch(self, tokens: Tensor) -> Tensor:
        """Fills the experts' buffers; see `Plan.dispatch`."""
        return take_rows(tokens, self.token)

    def combine(self, buffers: Tensor) -> Tensor:
        """Returns the experts' outputs to the tokens; see `Plan.combine`."""
        weight = ops.cast(self.weight, buffers.dtype)
        num_tokens = ops.shape(self.mask)[1]
        return add_rows(buffers * weight[..., None], self.token, num_tokens)

    def load_share(self) -> Tensor:
        """Each expert's share of the filled slots, `(E,)`, sum 1."""
        filled = self.token < ops.shape(self.mask)[1]
        load = ops.sum(ops.cast(filled, "float32"), axis=(0, 2))
        return ops.divide_no_nan(load, ops.sum(load))

    def dropped_share(self) -> Tensor:
        """Share of the tokens that no expert chose, a scalar in `[0, 1]`."""
        ones = ops.ones_like(self.weight)[..., None]
        count = add_rows(ones, self.token, ops.shape(self.mask)[1])[..., 0]
        total = ops.sum(ops.cast(self.mask, "float32"))
        chosen = ops.sum(ops.cast(count > 0, "float32"))
        return ops.divide_no_nan(total - chosen, total)

    def experts_of_images(self, num_images: int | Tensor) -> Tensor:
        """Which experts serve each image, `(G, num_images, E)` bool."""
        size = ops.shape(self.mask)[1] // num_images
        image, expert = flat_experts(self.token // size)
        num_experts = self.token.shape[1]
        return experts_of_images(image, expert, num_images, num_experts)


def expert_choice_plan(
    gates: Tensor, capacity: int | Tensor, mask: Tensor | None = None
) -> ExpertChoicePlan:
    """Sends each expert the `capacity` tokens with its largest gates.

    Combine weights are the unchanged gates. Ties go to the earlier token.

    Args:
        gates: `(G, S, E)` float tensor, positive: softmax over the experts.
        capacity: C, an int (or a scalar int tensor if S is symbolic), at most
            S.
        mask: Optional `(G, S)` bool tensor. Tokens at False are chosen by
            no expert and get 0 back.

    Returns:
        An `ExpertChoicePlan`.

    Raises:
        ValueError: If the capacity is below 1 or above S, or if the mask has
            another shape.

    Example:

    >>> gates = keras.ops.convert_to_tensor([[[0.9, 0.1], [0.6, 0.4]]])
    >>> plan = expert_choice_plan(gates, capacity=1)
    >>> keras.ops.convert_to_numpy(plan.token).tolist()
    [[[0], [1]]]

    Reference:
        [Zhou et al., 2022](https://arxiv.org/abs/2202.09368), section 3.2, with
        V-MoE's capacity, rounded up to a multiple of 4.
    """
    check_capacity(capacity)
    check_mask(mask, gates.shape[:2])
    num_tokens = ops.shape(gates)[1]
    if is_integer(num_tokens) and is_integer(capacity):
        if capacity > num_tokens:
            raise ValueError(
                "`capacity` must be at most the number of tokens. Received: "
                f"capacity={capacity} for {num_tokens} tokens. "
                "`routing.capacity` computes one from a capacity factor."
            )
    gates = ops.transpose(gates, (0, 2, 1))  # (G, E, S)
    scores = ops.stop_gradient(gates)
    # NaN after all finite gates: TensorFlow's sort cannot order it.
    scores = ops.where(ops.isnan(scores), -0.5, scores)
    if mask is None:
        mask = ops.ones((ops.shape(gates)[0], num_tokens), "bool")
    else:
        # Masked tokens last, no matter how small the other gates are.
        scores = ops.where(mask[:, None], scores, -1.0)
    # Not `ops.top_k`, for the reasons given in `select_experts`.
    order = ops.cast(ops.argsort(-scores, axis=-1), "int32")
    token = order[..., :capacity]
    weight = ops.take_along_axis(gates, token, axis=-1)
    exists = ops.take_along_axis(mask[:, None], token, axis=-1)
    return ExpertChoicePlan(
        token=ops.where(exists, token, num_tokens),
        weight=ops.where(exists, weight, ops.zeros_like(weight)),
        mask=mask,
    )
