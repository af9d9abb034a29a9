"""Dropless routing: every choice is served, in blocks of one expert."""

import dataclasses
from typing import Any

from keras import ops

from keras_vmoe._checks import check_mask
from keras_vmoe._typing import Tensor
from keras_vmoe.routing._blocks import Blocks
from keras_vmoe.routing._blocks import fill_blocks
from keras_vmoe.routing._groups import check_selection
from keras_vmoe.routing._groups import largest
from keras_vmoe.routing._selection import renormalized
from keras_vmoe.routing._selection import select_experts
from keras_vmoe.routing.plans import SparsePlan
from keras_vmoe.routing.plans import experts_of_images
from keras_vmoe.routing.plans import flat_experts
from keras_vmoe.routing.top_k import queue_choices


@dataclasses.dataclass(frozen=True)
class DroplessPlan:
    """A sparse routing decision without a capacity.

    A `Plan` whose buffers are blocks. An expert's tokens fill as many blocks as
    they need. The number of blocks only depends on the number of tokens: shapes
    stay static, and the data determine the expert of each block. Groups do not
    matter: all tokens are served together.

    Attributes:
        sparse: `SparsePlan` of one group with all tokens; its experts and
            capacity are blocks and their slots.
        block_expert: `(M,)` int32, the expert of each block.
        count: int32 scalar, the number of blocks with tokens; these come first.
        load: `(G, E)` int32, the number of choices for each expert.
    """

    sparse: SparsePlan
    block_expert: Any
    count: Any
    load: Any

    def dispatch(self, tokens: Tensor) -> Blocks:
        """Fills the blocks; see `Plan.dispatch`."""
        rows = self.sparse.dispatch(_one_group(tokens))
        return Blocks(rows[0], self.block_expert, self.count)

    def combine(self, buffers: Blocks) -> Tensor:
        """Returns the experts' outputs to the tokens; see `Plan.combine`."""
        tokens = self.sparse.combine(buffers.rows[None])
        groups, features = ops.shape(self.load)[0], tokens.shape[-1]
        size = ops.shape(tokens)[1] // largest(1, groups)
        return ops.reshape(tokens, (groups, size, features))

    def load_share(self) -> Tensor:
        """Each expert's share of all choices, `(E,)`, sum 1."""
        return dataclasses.replace(self.sparse, load=self.load).load_share()

    def dropped_share(self) -> Tensor:
        """0: no choice is ever dropped."""
        return ops.zeros(())

    def experts_of_images(self, num_images: int | Tensor) -> Tensor:
        """Which experts serve each image, `(G, num_images, E)` bool."""
        groups, num_experts = ops.shape(self.load)
        num_tokens, num_choices = ops.shape(self.sparse.slot)[1:]
        images = groups * num_images
        size = num_tokens // largest(1, images) * num_choices
        # An empty slot exceeds the last choice: it belongs to no image.
        image, block = flat_experts(self.sparse.choice // largest(1, size))
        expert = ops.take(self.block_expert, block)
        used = experts_of_images(image, expert, images, num_experts)
        return ops.reshape(used, (groups, num_images, num_experts))


def dropless_plan(
    gates: Tensor,
    num_selected_experts: int,
    mask: Tensor | None = None,
    scores: Tensor | None = None,
    renormalize: bool = False,
) -> DroplessPlan:
    """Sends each token to all of its K best experts.

    Args:
        gates: `(G, S, E)` float tensor.
        num_selected_experts: K.
        mask: Optional `(G, S)` bool tensor. Tokens at False choose nothing:
            they take no slot and get 0 back.
        scores: Optional `(G, S, E)` tensor to select by, instead of the gates.
        renormalize: Whether to divide the combine weights of a token by their
            sum.

    Returns:
        A `DroplessPlan`.

    Raises:
        ValueError: If K is not between 1 and E, or if the mask has another
            shape.

    Example:

    >>> gates = keras.ops.convert_to_tensor([[[0.9, 0.1], [0.6, 0.4]]])
    >>> plan = dropless_plan(gates, num_selected_experts=1)
    >>> keras.ops.convert_to_numpy(plan.load).tolist()
    [[2, 0]]

    Reference:
        [Gale et al., 2022](https://arxiv.org/abs/2211.15841) (MegaBlocks): the
        same idea with another block size and custom sparse kernels.
    """
    groups, num_tokens, _ = ops.shape(gates)
    num_experts = gates.shape[-1]
    check_selection(num_experts, num_selected_experts)
    check_mask(mask, gates.shape[:2])
    experts, weight = select_experts(gates, num_selected_experts, scores)
    if mask is not None:
        experts = ops.where(mask[..., None], experts, num_experts)
        weight = ops.where(mask[..., None], weight, ops.zeros_like(weight))
    if renormalize:
        weight = renormalized(weight)
    chosen = experts[..., None] == ops.arange(num_experts, dtype="int32")
    load = ops.sum(ops.cast(chosen, "int32"), axis=(1, 2))

    total = groups * num_tokens * num_selected_experts
    flat = ops.reshape(experts, (1, total))
    order = ops.arange(total, dtype="int32")[None]
    queues = queue_choices(flat, order, num_experts)
    choice, slot, owner, count = fill_blocks(flat[0], queues, num_experts)
    shape = (1, groups * num_tokens, num_selected_experts)
    sparse = SparsePlan(
        choice=choice[None],
        slot=ops.reshape(slot, shape),
        weight=ops.reshape(weight, shape),
        load=queues.load,
    )
    return DroplessPlan(
        sparse=sparse, block_expert=owner, count=count, load=load
    )


def _one_group(tokens):
    groups, num_tokens, features = ops.shape(tokens)
    return ops.reshape(tokens, (1, groups * num_tokens, features))
