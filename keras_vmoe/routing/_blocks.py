"""Blocks of slots, one expert per block: the buffers of dropless routing."""

from typing import Any
from typing import NamedTuple

import keras
from keras import ops

from keras_vmoe.routing._groups import ceil_divide
from keras_vmoe.routing._groups import smallest


class Blocks(NamedTuple):
    """The buffers of a `DroplessPlan`: tokens in blocks of one expert each.

    Attributes:
        rows: `(M, T, D)`: M blocks of T slots, 0 in empty slots.
        expert: `(M,)` int32, the expert of each block, ascending.
        count: int32 scalar, the number of blocks with tokens; these come first.
    """

    rows: Any
    expert: Any
    count: Any


def fill_blocks(experts, queues, num_experts):
    """Cuts the queues of all experts into blocks of T slots.

    Args:
        experts: `(K * S,)` int32, the expert of each choice; E for none.
        queues: The `Queues` of these choices, one group.
        num_experts: E.

    Returns:
        `(choice, slot, owner, count)`: the choice in each slot, `(M, T)`; the
        slot of each choice, `(K * S,)`; the expert of each block, `(M,)`; and
        the number of blocks that hold a choice.
    """
    total = ops.shape(experts)[0]
    size = block_size(total, num_experts)
    # Each expert wastes less than one block, and each block holds a choice.
    num_blocks = total // size + smallest(total, num_experts)
    blocks = ceil_divide(queues.load[0], size)  # (E,) that each expert fills
    end = ops.cumsum(blocks)
    index = ops.arange(num_blocks, dtype="int32")
    owner = ops.sum(ops.cast(index[:, None] >= end, "int32"), axis=-1)
    owner = ops.minimum(owner, num_experts - 1)  # Unused blocks.

    first = ops.take(end - blocks, owner)  # (M,) first block of the same expert
    offset = ops.arange(size, dtype="int32")
    rank = (index - first)[:, None] * size + offset  # (M, T)
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
    """Slots per block: few for an expert's load, many for the matmul.

    Blocks of half an even load waste a quarter of that load on average, in each
    expert's last block. PyTorch joins an expert's blocks before multiplying, so
    it uses the smallest. With an unknown batch size the blocks are large,
    because each copies its expert's kernel.
    """
    if keras.backend.backend() == "torch":
        return 8
    if not isinstance(num_choices, int):
        return 128
    half = num_choices // (2 * num_experts)
    return max(8, min(256, half // 8 * 8))
