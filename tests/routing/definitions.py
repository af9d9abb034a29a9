"""Slow definitions of routing, for one to check by eye.

One group, one choice, one token at a time; who is served where is written into
one-hot tensors of shape `(G, S, E, C)`, the letters of `keras_vmoe.routing`.
"""

import math
from fractions import Fraction

import numpy as np
from keras import ops


def capacity_slowly(num_tokens, num_experts, num_selected_experts, factor):
    """Places of an expert, rounded up to whole fours, at most S."""
    exact = Fraction(str(factor)) * num_tokens * num_selected_experts
    slots = math.ceil(exact / num_experts)
    while slots % 4:
        slots += 1
    return min(slots, num_tokens)


def top_k_slowly(
    gates,
    num_selected_experts,
    capacity,
    batch_priority=False,
    mask=None,
    scores=None,
):
    """Who is served where. Experts are selected by the scores, if any.

    Returns:
        `dispatch` `(G, S, E, C)` of zeros and ones, `combine` `(G, S, E, C)`
        with the gates in the place of the ones, and `load` `(G, E)`, how many
        choices fell on each expert.
    """
    groups, num_tokens, num_experts = gates.shape
    dispatch = np.zeros((groups, num_tokens, num_experts, capacity))
    combine = np.zeros_like(dispatch)
    load = np.zeros((groups, num_experts), "int32")
    scores = gates if scores is None else scores
    for g in range(groups):
        # `sorted` is stable: equal tokens and equal experts keep their order.
        order = list(range(num_tokens))
        if batch_priority:
            first = scores[g].argmax(axis=-1)
            order = sorted(order, key=lambda s: -gates[g, s, first[s]])
        taken = [0] * num_experts
        for k in range(num_selected_experts):
            for s in order:
                if mask is not None and not mask[g, s]:
                    continue
                best = sorted(
                    range(num_experts), key=lambda e: -scores[g, s, e]
                )
                e = best[k]
                load[g, e] += 1
                if taken[e] < capacity:
                    dispatch[g, s, e, taken[e]] = 1.0
                    combine[g, s, e, taken[e]] = gates[g, s, e]
                    taken[e] += 1
    return dispatch, combine, load


def expert_choice_slowly(gates, capacity, mask=None):
    """Which tokens each expert takes.

    Returns:
        `dispatch` and `combine`, as of `top_k_slowly`.
    """
    groups, num_tokens, num_experts = gates.shape
    dispatch = np.zeros((groups, num_tokens, num_experts, capacity))
    combine = np.zeros_like(dispatch)
    for g, e in np.ndindex(groups, num_experts):
        tokens = range(num_tokens)
        if mask is not None:
            tokens = [s for s in tokens if mask[g, s]]
        best = sorted(tokens, key=lambda s: -gates[g, s, e])
        for c, s in enumerate(best[:capacity]):
            dispatch[g, s, e, c] = 1.0
            combine[g, s, e, c] = gates[g, s, e]
    return dispatch, combine


def soft_slowly(logits, mask=None):
    """The two softmaxes of Soft MoE, of `(G, S, E, P)` logits.

    Returns:
        `dispatch`, a softmax over the tokens, and `combine`, one over all
        slots; 0 for masked tokens.
    """
    dispatch, combine = np.zeros(logits.shape), np.zeros(logits.shape)
    kept = np.ones(logits.shape[:2], bool) if mask is None else mask
    for g, s in zip(*np.nonzero(kept), strict=True):
        rest = logits[g, kept[g]].astype("float64")
        dispatch[g, s] = 1 / np.exp(rest - logits[g, s]).sum(axis=0)
        combine[g, s] = np.exp(logits[g, s] - logits[g, s].max())
        combine[g, s] /= combine[g, s].sum()
    return dispatch, combine


def experts_of_images_slowly(dispatch, num_images):
    """Which experts serve each image, `(G, num_images, E)`."""
    groups, num_tokens, num_experts, _ = dispatch.shape
    used = np.zeros((groups, num_images, num_experts), bool)
    for g, s, e, _ in zip(*np.nonzero(dispatch), strict=True):
        used[g, s * num_images // num_tokens, e] = True
    return used


def one_hot_dispatch(plan):
    """The `(G, S, E, C)` dispatch that a plan stands for, seen from buffers."""
    choice = ops.convert_to_numpy(plan.choice)
    groups, num_experts, capacity = choice.shape
    num_tokens, num_choices = plan.slot.shape[1:]
    dispatch = np.zeros((groups, num_tokens, num_experts, capacity))
    for g, e, c in np.ndindex(choice.shape):
        if choice[g, e, c] < num_tokens * num_choices:
            dispatch[g, choice[g, e, c] // num_choices, e, c] = 1.0
    return dispatch


def one_hot_combine(plan):
    """The `(G, S, E, C)` combine weights of a plan, seen from its tokens."""
    slot = ops.convert_to_numpy(plan.slot)
    weight = ops.convert_to_numpy(ops.cast(plan.weight, "float32"))
    _, num_experts, capacity = plan.choice.shape
    groups, num_tokens, _ = slot.shape
    combine = np.zeros((groups, num_tokens, num_experts, capacity))
    for g, s, k in np.ndindex(slot.shape):
        if slot[g, s, k] < num_experts * capacity:
            e, c = divmod(int(slot[g, s, k]), capacity)
            combine[g, s, e, c] = weight[g, s, k]
        else:
            assert weight[g, s, k] == 0, "a dropped choice has weight 0"
    return combine


# The auxiliary losses of one group: `(S, E)` of the tokens that count, to a
# float.


def importance_slowly(gates):
    importance = [sum(column) for column in gates.T]
    return (np.std(importance) / np.mean(importance)) ** 2


def load_slowly(logits, noisy_logits, noise_std, num_selected_experts):
    num_tokens, num_experts = logits.shape
    load = np.zeros(num_experts)
    for s in range(num_tokens):
        threshold = sorted(noisy_logits[s], reverse=True)
        threshold = threshold[num_selected_experts - 1]
        for e in range(num_experts):
            distance = (threshold - logits[s, e]) / noise_std
            phi = 0.5 * (1 + math.erf(distance / math.sqrt(2)))
            load[e] += (1 - phi) / num_tokens
    return (np.std(load) / np.mean(load)) ** 2


def gshard_slowly(gates):
    num_tokens, num_experts = gates.shape
    total = 0.0
    for e in range(num_experts):
        # The first of equal gates is the best one.
        first = sum(int(np.argmax(gates[s]) == e) for s in range(num_tokens))
        total += first / num_tokens * gates[:, e].mean()
    return num_experts**2 * total / num_experts


def z_slowly(logits):
    return np.mean([math.log(sum(np.exp(row))) ** 2 for row in logits])


def entropy_slowly(shares):
    return -sum(p * math.log(p) for p in shares if p > 0)


def local_entropy_slowly(gates):
    return np.mean([entropy_slowly(row) for row in gates])


def global_entropy_slowly(gates, min_experts):
    return max(0, math.log(min_experts) - entropy_slowly(gates.mean(axis=0)))
