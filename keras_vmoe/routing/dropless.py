"""Dropless routing: every choice is served, in blocks of one expert each."""

import dataclasses
from typing import Any
from typing import NamedTuple

import keras
from keras import ops

from keras_vmoe.routing.groups import check_selection
from keras_vmoe.routing.plans import SparsePlan
from keras_vmoe.routing.selection import renormalized
from keras_vmoe.routing.selection import select_experts
from keras_vmoe.routing.top_k import queue_choices


class Blocks(NamedTuple):
    """Tokens in blocks, each for one expert; what dropless buffers are.

    Attributes:
        rows: `(M, T, D)`: M blocks of T places, 0 at empty places.
        expert: `(M,)` int32, the expert of each block, ascending.
        count: int32 scalar, how many blocks hold tokens; they stand first.
    """

    rows: Any
    expert: Any
    count: Any


@dataclasses.dataclass(frozen=True)
class DroplessPlan:
    """A sparse routing decision without a capacity.

    An expert's tokens fill as many blocks as they need. The number of blocks is
    fixed by the number of tokens, so that shapes stay static; which expert a
    block belongs to is decided by the data. Groups are of no importance: all
    tokens are served together.

    Attributes:
        sparse: `SparsePlan` of one group that holds all tokens, whose experts
            and capacity are blocks and their places.
        block_expert: `(M,)` int32, the expert of each block.
        count: int32 scalar, how many blocks hold tokens; they stand first.
        load: `(G, E)` int32, how many choices fell on the expert.
    """

    sparse: SparsePlan
    block_expert: Any
    count: Any
    load: Any

    def dispatch(self, tokens):
        """Fills the blocks.

        Args:
            tokens: `(G, S, D)` tensor.

        Returns:
            `Blocks`.
        """
        rows = self.sparse.dispatch(_one_group(tokens))
        return Blocks(rows[0], self.block_expert, self.count)

    def combine(self, blocks):
        """Brings the experts' outputs back to the tokens.

        Args:
            blocks: `Blocks` of the experts' outputs.

        Returns:
            `(G, S, D)` tensor: per token the sum of its experts' outputs times
            the combine weights.
        """
        tokens = self.sparse.combine(blocks.rows[None])
        groups, features = ops.shape(self.load)[0], tokens.shape[-1]
        size = ops.shape(tokens)[1] // _at_least_1(groups)
        return ops.reshape(tokens, (groups, size, features))

    def load_share(self):
        """Share of all choices that fell on each expert, `(E,)`, sum 1."""
        return dataclasses.replace(self.sparse, load=self.load).load_share()

    def dropped_share(self):
        """0: no choice is ever dropped."""
        return ops.zeros(())

    def experts_of_images(self, num_images):
        """Which experts serve each image, `(G, num_images, E)` bool."""
        groups, num_experts = ops.shape(self.load)
        blocks = self.sparse.experts_of_images(groups * num_images)[0]
        experts = ops.arange(num_experts, dtype="int32")
        owner = self.block_expert[:, None] == experts  # (M, E)
        used = ops.any(ops.logical_and(blocks[..., None], owner), axis=1)
        return ops.reshape(used, (groups, num_images, num_experts))


def dropless_plan(
    gates, num_selected_experts, mask=None, scores=None, renormalize=False
):
    """Sends each token to its K best experts, all of them.

    Args:
        gates: `(G, S, E)` float tensor.
        num_selected_experts: K.
        mask: Optional `(G, S)` bool tensor. Tokens at False choose nothing:
            they take no place and get 0 back.
        scores: Optional `(G, S, E)` tensor to select by, instead of the gates.
        renormalize: Whether the combine weights of a token are divided by
            their sum.

    Returns:
        A `DroplessPlan`.

    Raises:
        ValueError: If K is not between 1 and E.

    Example:

    >>> gates = keras.ops.convert_to_tensor([[[0.9, 0.1], [0.6, 0.4]]])
    >>> plan = dropless_plan(gates, num_selected_experts=1)
    >>> keras.ops.convert_to_numpy(plan.load).tolist()
    [[2, 0]]

    Reference:
        [Gale et al., 2022](https://arxiv.org/abs/2211.15841) (MegaBlocks): the
        same idea with blocks of another size and their own sparse kernels.
    """
    groups, num_tokens, _ = ops.shape(gates)
    num_experts = gates.shape[-1]
    check_selection(num_experts, num_selected_experts)
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
    choice, slot, owner, count = _fill_blocks(flat[0], queues, num_experts)
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


def _fill_blocks(experts, queues, num_experts):
    """Cuts the queues of all experts into blocks of T places.

    Args:
        experts: `(K * S,)` int32, the expert of each choice; E for nobody.
        queues: The `Queues` of these choices, one group.
        num_experts: E.

    Returns:
        `(choice, slot, owner, count)`: `(M, T)` the choice in each place,
        `(K * S,)` the place of each choice, `(M,)` the expert of each block,
        and the number of blocks that hold a choice.
    """
    total = ops.shape(experts)[0]
    size = block_size(total, num_experts)
    # Each expert wastes less than one block, and each block holds a choice.
    smaller = min if isinstance(total, int) else ops.minimum
    num_blocks = total // size + smaller(total, num_experts)
    blocks = -(-queues.load[0] // size)  # (E,) blocks that each expert fills
    end = ops.cumsum(blocks)
    index = ops.arange(num_blocks, dtype="int32")
    owner = ops.sum(ops.cast(index[:, None] >= end, "int32"), axis=-1)
    owner = ops.minimum(owner, num_experts - 1)  # Blocks that nobody needs.

    first = ops.take(end - blocks, owner)  # (M,) first block of the same expert
    place = ops.arange(size, dtype="int32")
    rank = (index - first)[:, None] * size + place  # (M, T)
    start, length = (
        ops.take(x[0], owner)[:, None] for x in (queues.start, queues.load)
    )
    position = ops.clip(start + rank, 0, total - 1)
    choice = ops.where(
        rank < length, ops.take(queues.order[0], position), total
    )
    expert = ops.minimum(experts, num_experts - 1)
    slot = ops.take(end - blocks, expert) * size + queues.rank[0]
    slot = ops.where(experts < num_experts, slot, num_blocks * size)
    return choice, slot, owner, end[-1]


def block_size(num_choices, num_experts):
    """Places of a block: small against an expert's share, large for the matmul.

    Half of what an expert gets when the load is even wastes a quarter of that
    share on average, in the last block of each expert. PyTorch joins the blocks
    of an expert before it multiplies, and takes the smallest. Of a batch of
    unknown size the blocks are large, because each takes a copy of its kernel.
    """
    if keras.backend.backend() == "torch":
        return 8
    if not isinstance(num_choices, int):
        return 128
    half = num_choices // (2 * num_experts)
    return max(8, min(256, half // 8 * 8))


def _at_least_1(number):
    """The number or 1, of an int or, of a symbolic batch, a tensor."""
    return max(1, number) if isinstance(number, int) else ops.maximum(1, number)


def _one_group(tokens):
    groups, num_tokens, features = ops.shape(tokens)
    return ops.reshape(tokens, (1, groups * num_tokens, features))
