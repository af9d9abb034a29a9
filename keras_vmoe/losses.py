"""Auxiliary losses of routers, as pure functions of gates and logits.

Each returns one value per group, `(G, ...) -> (G,)`. The router averages over
the groups, weights the losses and adds them to the training loss. Letters are
explained in `keras_vmoe.routing`. Masked tokens are ignored; a group with only
masked tokens has a loss of 0. A mask must have the shape `(G, S)`.
"""

import math

from keras import ops

from keras_vmoe._checks import check_mask
from keras_vmoe._checks import check_positive
from keras_vmoe._typing import Tensor

__all__ = [
    "global_entropy_loss",
    "gshard_loss",
    "importance_loss",
    "load_loss",
    "local_entropy_loss",
    "router_z_loss",
]


def importance_loss(gates: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared coefficient of variation of the experts' summed gates.

    `(std(I) / mean(I))²` with `I_e = sum_s gates[s, e]`. V-MoE and `TopKRouter`
    apply it to the gates without noise.

    Args:
        gates: `(G, S, E)` float tensor.
        mask: Optional `(G, S)` bool tensor, False for tokens to ignore.

    Returns:
        `(G,)` float tensor; 0 when the load is even.

    Example:

    >>> gates = keras.ops.convert_to_tensor([[[0.75, 0.25], [0.75, 0.25]]])
    >>> float(importance_loss(gates)[0])
    0.25

    Reference:
        [Riquelme et al., 2021](https://arxiv.org/abs/2106.05974), appendix A.
    """
    return _squared_variation(_sum_tokens(gates, mask))


def load_loss(
    logits: Tensor,
    noisy_logits: Tensor,
    noise_std: float,
    num_selected_experts: int,
    mask: Tensor | None = None,
) -> Tensor:
    """Squared coefficient of variation of the experts' expected load.

    The load of an expert is the sum, over the tokens, of the probability that
    it would be among the top K if its noise were drawn again:
    `1 - Φ((threshold - logit) / σ)`, where the threshold is the token's K-th
    largest noisy logit.

    Args:
        logits: `(G, S, E)` float tensor, without noise.
        noisy_logits: `(G, S, E)` float tensor, with the noise that was drawn.
        noise_std: σ, the standard deviation of the noise in the logits, above
            0. For a router with `noise_std=1.0` it is `1.0 / E`.
        num_selected_experts: K.
        mask: Optional `(G, S)` bool tensor, False for tokens to ignore.

    Returns:
        `(G,)` float tensor; 0 when the expected load is even.

    Raises:
        ValueError: If `noise_std` is not positive.

    Example:

    >>> logits = keras.ops.convert_to_tensor([[[1.0, 1.0], [2.0, 2.0]]])
    >>> float(load_loss(logits, logits, 0.5, num_selected_experts=1)[0])
    0.0

    Reference:
        [Riquelme et al., 2021](https://arxiv.org/abs/2106.05974), appendix A.
        The threshold is a logit, as in the paper; some libraries compare it
        with probabilities.
    """
    if not noise_std > 0:  # Catches NaN.
        raise ValueError(
            "The load loss needs noise: without it the probability of being "
            "selected is 0 or 1 and has no gradient. "
            f"Received: noise_std={noise_std}. "
            "Use a positive `noise_std`, or set the loss's weight to 0."
        )
    threshold = _kth_largest(noisy_logits, num_selected_experts)
    distance = (threshold - logits) / noise_std
    probability = 0.5 * (1.0 - ops.erf(distance / math.sqrt(2.0)))
    return _squared_variation(_sum_tokens(probability, mask))


def gshard_loss(gates: Tensor, mask: Tensor | None = None) -> Tensor:
    """GShard's balance loss, `E² · mean_e(top-1 share · mean gate)`.

    The share of tokens whose best expert is e has no gradient; the mean gate
    does. The loss is 1 when both are even. The factor `E²` follows the authors'
    code; the paper omits it.

    Args:
        gates: `(G, S, E)` float tensor, with noise if the router adds any.
        mask: Optional `(G, S)` bool tensor, False for tokens to ignore.

    Returns:
        `(G,)` float tensor.

    Example:

    >>> gates = keras.ops.convert_to_tensor([[[0.75, 0.25], [0.25, 0.75]]])
    >>> float(gshard_loss(gates)[0])
    1.0

    Reference:
        [Lepikhin et al., 2020](https://arxiv.org/abs/2006.16668), algorithm 1,
        lines 3 and 11 to 13.
    """
    num_experts = gates.shape[-1]
    best = ops.expand_dims(ops.argmax(gates, axis=-1), -1)
    best = best == ops.arange(num_experts, dtype=best.dtype)
    share = _mean_tokens(ops.cast(best, gates.dtype), mask)
    mean_gate = _mean_tokens(gates, mask)
    return num_experts**2 * ops.mean(share * mean_gate, axis=-1)


def router_z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared `logsumexp` of the logits, which keeps them small.

    Args:
        logits: `(G, S, E)` float tensor, without noise.
        mask: Optional `(G, S)` bool tensor, False for tokens to ignore.

    Returns:
        `(G,)` float tensor.

    Example:

    >>> round(float(router_z_loss(keras.ops.zeros((1, 3, 2)))[0]), 4)
    0.4805

    Reference:
        [Zoph et al., 2022](https://arxiv.org/abs/2202.08906) (ST-MoE),
        equation 5.
    """
    size = ops.square(ops.logsumexp(logits, axis=-1))
    return ops.squeeze(_mean_tokens(size[..., None], mask), axis=-1)


def local_entropy_loss(gates: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean entropy of a token's gates: low where the router is sure.

    Args:
        gates: `(G, S, E)` float tensor, sum 1 over E.
        mask: Optional `(G, S)` bool tensor, False for tokens to ignore.

    Returns:
        `(G,)` float tensor, in nats, from 0 to `log(E)`.

    Example:

    >>> gates = keras.ops.convert_to_tensor([[[0.5, 0.5], [1.0, 0.0]]])
    >>> round(float(local_entropy_loss(gates)[0]), 4)
    0.3466

    Reference:
        [Mustafa et al., 2022](https://arxiv.org/abs/2206.02770) (LIMoE),
        section 2.2. Only the loss: the paper trains on images and text, with
        one loss per modality, which this package does not support.
    """
    entropy = _entropy(ops.convert_to_tensor(gates))[..., None]
    return ops.squeeze(_mean_tokens(entropy, mask), axis=-1)


def global_entropy_loss(
    gates: Tensor, min_experts: float | None = None, mask: Tensor | None = None
) -> Tensor:
    """Entropy missing from the mean gates: low where many experts are used.

    `max(0, log(min_experts) - H(mean gates))`: 0 if the mean gates are spread
    at least as evenly as over `min_experts` experts.

    Args:
        gates: `(G, S, E)` float tensor, sum 1 over E.
        min_experts: Soft minimum of experts in use, above 0; None means E, for
            which the loss is 0 only if all are used equally.
        mask: Optional `(G, S)` bool tensor, False for tokens to ignore.

    Returns:
        `(G,)` float tensor, in nats.

    Raises:
        ValueError: If `min_experts` is not positive.

    Example:

    >>> gates = keras.ops.convert_to_tensor([[[1.0, 0.0], [1.0, 0.0]]])
    >>> round(float(global_entropy_loss(gates, min_experts=2)[0]), 4)
    0.6931

    Reference:
        [Mustafa et al., 2022](https://arxiv.org/abs/2206.02770) (LIMoE),
        section 2.2 and its threshold. Only the loss; see `local_entropy_loss`.
    """
    gates = ops.convert_to_tensor(gates)
    min_experts = gates.shape[-1] if min_experts is None else min_experts
    check_positive(min_experts=min_experts)
    entropy = _entropy(_mean_tokens(gates, mask))
    lacking = ops.maximum(math.log(min_experts) - entropy, 0.0)
    if mask is None:
        return lacking
    some = ops.any(ops.cast(mask, "bool"), axis=1)
    return ops.where(some, lacking, ops.zeros_like(lacking))


def _entropy(gates):
    """Entropy over the last axis; a 0 adds nothing, even to the gradient."""
    safe = ops.where(gates > 0, gates, ops.ones_like(gates))
    return -ops.sum(gates * ops.log(safe), axis=-1)


def _kth_largest(values, k):
    """The K-th largest value of the last axis, ties counted, `(..., 1)`.

    Found by repeated maxima: several times as fast as a sort for small K. The
    gradient goes to that value; ties share it.
    """
    fixed = ops.stop_gradient(values)
    kth = ops.max(fixed, axis=-1, keepdims=True)
    for _ in range(k - 1):
        lower = ops.where(fixed < kth, fixed, -float("inf"))
        lower = ops.max(lower, axis=-1, keepdims=True)
        reached = ops.cast(fixed >= kth, "int32")
        count = ops.sum(reached, axis=-1, keepdims=True)
        kth = ops.where(count < k, lower, kth)
    # A compiler may compute the values twice and round them differently. Then
    # none may be equal, which must not divide by 0.
    found = fixed == kth
    moved = ops.where(found, values - fixed, ops.zeros_like(values))
    count = ops.sum(ops.cast(found, values.dtype), axis=-1, keepdims=True)
    moved = ops.sum(moved, axis=-1, keepdims=True) / ops.maximum(count, 1.0)
    return kth + moved


def _sum_tokens(values, mask):
    """`(G, S, E)` summed over the unmasked tokens, `(G, E)`."""
    check_mask(mask, values.shape[:2])
    if mask is not None:
        values = ops.where(mask[..., None], values, ops.zeros_like(values))
    return ops.sum(values, axis=1)


def _mean_tokens(values, mask):
    """`(G, S, E)` averaged over the unmasked tokens, `(G, E)`; 0 for none."""
    if mask is None:
        return ops.mean(values, axis=1)
    total = _sum_tokens(values, mask)
    count = ops.sum(ops.cast(mask, values.dtype), axis=1)
    return total / ops.maximum(count, 1.0)[:, None]


def _squared_variation(values):
    """`(std / mean)²` over the last axis; 0, with gradient 0, for all zeros."""
    mean = ops.mean(values, axis=-1)
    square = ops.square(mean)
    safe = ops.where(square > 0, square, ops.ones_like(square))
    variance = ops.var(values, axis=-1)
    return ops.where(square > 0, variance / safe, ops.zeros_like(variance))
