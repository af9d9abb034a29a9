"""Token choice: each token picks its K best experts (V-MoE, section 2.1)."""

from typing import Any
from typing import NamedTuple

from keras import ops

from keras_vmoe._checks import check_mask
from keras_vmoe._typing import Tensor
from keras_vmoe.routing._groups import check_selection
from keras_vmoe.routing._selection import renormalized
from keras_vmoe.routing._selection import select_experts
from keras_vmoe.routing.plans import SparsePlan
from keras_vmoe.routing.plans import check_capacity


def top_k_plan(
    gates: Tensor,
    num_selected_experts: int,
    capacity: int | Tensor,
    batch_priority: bool = False,
    mask: Tensor | None = None,
    scores: Tensor | None = None,
    renormalize: bool = False,
) -> SparsePlan:
    """Sends each token to its K best experts, `capacity` tokens per expert.

    All first choices are served before all second choices, and so on. Within
    one choice, tokens are served in order (vanilla), or with `batch_priority`
    by decreasing gate of their first choice, with a stable sort (Batch
    Prioritized Routing). A choice whose expert is full is dropped. Combine
    weights are the selected gates, unchanged unless `renormalize`.

    Args:
        gates: `(G, S, E)` float tensor.
        num_selected_experts: K.
        capacity: C, an int (or a scalar int tensor if S is symbolic).
        batch_priority: Whether confident tokens are served first.
        mask: Optional `(G, S)` bool tensor. Tokens at False choose nothing:
            they take no slot and get 0 back.
        scores: Optional `(G, S, E)` tensor to select by, instead of the gates.
        renormalize: Whether to divide the combine weights of a token by their
            sum, before any is dropped.

    Returns:
        A `SparsePlan`.

    Raises:
        ValueError: If K is not between 1 and E, if the capacity is below 1, or
            if the mask has another shape.

    Example:

    >>> gates = keras.ops.convert_to_tensor([[[0.9, 0.1], [0.6, 0.4]]])
    >>> plan = top_k_plan(gates, num_selected_experts=1, capacity=1)
    >>> keras.ops.convert_to_numpy(plan.weight)[0, :, 0] > 0
    array([ True, False])

    Reference:
        [Riquelme et al., 2021](https://arxiv.org/abs/2106.05974), algorithm 1
        (vanilla) and algorithm 2 (BPR by the largest gate; the paper's
        alternative, the sum of the K gates, is not available).
    """
    num_experts = gates.shape[-1]
    check_selection(num_experts, num_selected_experts)
    check_capacity(capacity)
    check_mask(mask, gates.shape[:2])
    experts, weights = select_experts(gates, num_selected_experts, scores)
    if mask is not None:
        # One past the last expert: sorted last, counted nowhere.
        experts = ops.where(mask[..., None], experts, num_experts)
        weights = ops.where(mask[..., None], weights, ops.zeros_like(weights))
    best = weights[..., 0] if batch_priority else None
    if renormalize:
        weights = renormalized(weights)
    order = _service_order(weights, best)
    return _serve(experts, weights, order, num_experts, capacity)


def _service_order(weights, best):
    """Returns all choices `s * K + k` in service order, `(G or 1, K * S)`."""
    _, num_tokens, num_choices = ops.shape(weights)
    choice = ops.reshape(ops.arange(num_choices, dtype="int32"), (1, -1, 1))
    if best is not None:  # (G, S)
        best = ops.stop_gradient(best)
        # NaN last: TensorFlow's sort cannot order it.
        best = ops.where(ops.isnan(best), -1.0, best)
        tokens = ops.cast(ops.argsort(-best, axis=1), "int32")
    else:
        tokens = ops.expand_dims(ops.arange(num_tokens, dtype="int32"), 0)
    order = tokens[:, None, :] * num_choices + choice  # (G or 1, K, S)
    return ops.reshape(order, (ops.shape(order)[0], num_choices * num_tokens))


class Queues(NamedTuple):
    """Choices in line for their experts.

    Attributes:
        order: `(G, K * S)`, the choices by expert, each expert's in service
            order; choices of no expert come last.
        load: `(G, E)`, the length of each queue.
        start: `(G, E)`, the index in `order` where each queue starts.
        rank: `(G, K * S)`, the position of each choice in its queue.
    """

    order: Any
    load: Any
    start: Any
    rank: Any


def queue_choices(experts, order, num_experts):
    """Lines the choices up by expert.

    Args:
        experts: `(G, K * S)` int32, the expert of each choice; E for none.
        order: `(G or 1, K * S)` int32, the choices in service order.
        num_experts: E.

    Returns:
        `Queues`, all int32.
    """
    order = ops.broadcast_to(order, ops.shape(experts))
    queue = ops.take_along_axis(experts, order, axis=1)
    # A stable sort by expert makes every expert's queue one segment.
    by_expert = ops.cast(ops.argsort(queue, axis=1), "int32")
    order = ops.take_along_axis(order, by_expert, axis=1)
    indices = ops.arange(num_experts, dtype="int32")
    chosen = ops.cast(experts[..., None] == indices, "int32")
    load = ops.sum(chosen, axis=1)
    start = ops.cumsum(load, axis=1) - load
    # The inverse of a permutation, without a scatter.
    position = ops.cast(ops.argsort(order, axis=1), "int32")
    rank = position - ops.sum(chosen * start[:, None, :], axis=-1)
    return Queues(order, load, start, rank)


def _serve(experts, weights, order, num_experts, capacity):
    """Assigns the slots of each expert in service order."""
    groups, num_tokens, num_choices = ops.shape(experts)
    total = num_tokens * num_choices
    flat = ops.reshape(experts, (groups, total))
    queues = queue_choices(flat, order, num_experts)

    index = ops.arange(capacity, dtype="int32")
    position = ops.minimum(queues.start[..., None] + index, total - 1)
    choice = ops.take_along_axis(
        queues.order,
        ops.reshape(position, (groups, num_experts * capacity)),
        axis=1,
    )
    choice = ops.reshape(choice, (groups, num_experts, capacity))
    choice = ops.where(index < queues.load[..., None], choice, total)

    served = ops.logical_and(queues.rank < capacity, flat < num_experts)
    slot = flat * capacity + queues.rank
    slot = ops.where(served, slot, num_experts * capacity)
    slot = ops.reshape(slot, (groups, num_tokens, num_choices))
    served = ops.reshape(served, (groups, num_tokens, num_choices))
    return SparsePlan(
        choice=choice,
        slot=slot,
        # The gates of a NaN token are NaN, and so must be its output, even if
        # no expert serves it. (XLA turns a product with `served` into 0.)
        weight=ops.where(served, weights, weights * 0.0),
        load=queues.load,
    )
