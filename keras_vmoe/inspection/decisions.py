"""Routing decisions of a layer for the tokens of a batch."""

import dataclasses
import math

import numpy as np
from keras import ops

from keras_vmoe import layers
from keras_vmoe.inspection.patches import top_experts
from keras_vmoe.routing._selection import select_experts
from keras_vmoe.routing.expert_choice import ExpertChoicePlan
from keras_vmoe.routing.soft import SoftPlan


@dataclasses.dataclass(frozen=True)
class Decisions:
    """The decisions for the tokens of a batch, image by image.

    Attributes:
        gates: `(B, N, E)` float32: the gate of each token for each expert; for
            Soft MoE the combine weights, summed over an expert's slots.
        top: `(B, N, K)` int: the experts of a token, the best first, whether
            or not they had capacity for it; -1 after the last one. With expert
            choice K is E, with Soft MoE 1.
        served: `(B, N)` bool: whether some expert serves the token.
        taken: `(B, N, E)` float32: how much of each token an expert takes. With
            expert choice the gates of its chosen tokens, with Soft MoE the
            dispatch weights, summed over its slots. None for token choice.
    """

    gates: np.ndarray
    top: np.ndarray
    served: np.ndarray
    taken: np.ndarray | None = None

    def cut(self, part):
        """The decisions for a slice of the images."""
        found = {k: x if x is None else x[part] for k, x in vars(self).items()}
        return Decisions(**found)


def decide(layer, tokens):
    """The `Decisions` of an MoE layer in evaluation.

    Args:
        layer: A `MoEMLP`.
        tokens: `(B, ..., D)` array, its input.
    """
    batch, num_tokens = len(tokens), math.prod(tokens.shape[1:-1])
    tokens = ops.convert_to_tensor(tokens)
    plan, router = layer.plan(tokens), layer.router

    def of_images(x):  # From groups (G, S, ...), possibly padded.
        x = _array(x)
        x = x.reshape(-1, *x.shape[2:])[: batch * num_tokens]
        return x.reshape(batch, num_tokens, *x.shape[1:])

    if isinstance(plan, SoftPlan):
        gates = of_images(plan.combine_weight).sum(axis=-1)
        top = gates.argmax(axis=-1)[..., None]
        taken = of_images(plan.dispatch_weight).sum(axis=-1)
        return Decisions(gates, top, np.ones(top.shape[:-1], bool), taken)
    images = ops.reshape(tokens, (batch, num_tokens, tokens.shape[-1]))
    logits = ops.cast(router.gate_layer(images), "float32")
    gates = router.expert_gates(logits)
    if isinstance(plan, ExpertChoicePlan):
        chosen = of_images(_chosen(plan))
        gates = _array(gates)
        order = np.where(chosen, gates, -1).argsort(axis=-1, kind="stable")
        order = order[..., ::-1]
        kept = np.take_along_axis(chosen, order, axis=-1)
        top, taken = np.where(kept, order, -1), np.where(chosen, gates, 0.0)
        return Decisions(gates, top, chosen.any(axis=-1), taken)
    served = of_images(top_experts(plan)) >= 0
    scores = router.scores(gates) if hasattr(router, "scores") else None
    top, _ = select_experts(gates, served.shape[-1], scores)
    return Decisions(_array(gates), _array(top), served.any(axis=-1))


def served_at(layer, tokens, capacity_factor, batch_priority):
    """Which tokens are served at another capacity, `(B, N)` bool.

    Args:
        layer: A `MoEMLP` with a `TopKRouter`.
        tokens: `(B, ..., D)` array, its input.
        capacity_factor, batch_priority: Settings of the router.
    """
    router = layer.router.sharing(
        capacity_factor=capacity_factor, batch_priority=batch_priority
    )
    return decide(layer.sharing(router=router), tokens).served


def has_priority(layer):
    """Whether tokens choose in a layer, and so can be dropped."""
    return isinstance(layer.router, layers.TopKRouter)


def _chosen(plan):
    """`(G, S, E)` bool: which experts chose each token."""
    token = _array(plan.token)
    groups, num_experts, _ = token.shape
    size = plan.mask.shape[1]
    found = np.zeros((groups, size + 1, num_experts), bool)
    found[
        np.arange(groups)[:, None, None],
        token,
        np.arange(num_experts)[None, :, None],
    ] = True
    return found[:, :size]


def _array(x):
    return ops.convert_to_numpy(x)
