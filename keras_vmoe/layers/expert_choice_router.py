"""Expert choice: each expert picks its best tokens."""

from typing import Any

import keras
from keras import ops

from keras_vmoe import losses
from keras_vmoe import routing
from keras_vmoe._checks import check_not_negative
from keras_vmoe._typing import Config
from keras_vmoe._typing import Tensor
from keras_vmoe.layers.routers import Router
from keras_vmoe.layers.routers import slots_per_expert
from keras_vmoe.routing._groups import check_capacity_factor
from keras_vmoe.routing._selection import softmax
from keras_vmoe.routing.plans import Plan


@keras.saving.register_keras_serializable("keras_vmoe")
class ExpertChoiceRouter(Router):
    """Expert choice: each expert takes the C tokens with its largest gates.

    The gates are `softmax(logits + noise)` over the experts, in float32, with
    noise in training only. The load is even by construction; a token may go to
    several experts, or to none. The tokens of a group compete with each other:
    an image's result depends on the other images in its group.

    Args:
        num_experts: E, at least 1.
        capacity_factor: Experts per token on average. Expert choice cannot be
            dropless.
        noise_std: Standard deviation of the noise, in units of `1 / E`.
        gate: `"linear"`, `"cosine"` or `"l2"`, or a layer from `(G, S, D)`
            tokens to `(G, S, E)` logits.
        z_loss_weight: Weight of the router z-loss, which uses the logits
            without noise.
        seed: Optional integer seed of the noise.

    Call arguments:
        tokens: `(G, S, D)` float tensor.
        mask: Optional `(G, S)` bool tensor, False for tokens to leave out.
        group_size: Optional number of tokens in a full group, if `tokens` hold
            fewer; sets the capacity.
        images_per_group: Images that the tokens of a group belong to, for the
            statistics.
        training: Whether to add noise and auxiliary losses.

    Returns:
        A `routing.Plan` from `routing.expert_choice_plan`.

    Raises:
        ValueError: If the capacity factor is not positive, `noise_std` is
            negative, the gate is unknown, or a setting of another router is
            given.

    Example:

    >>> router = ExpertChoiceRouter(num_experts=4, capacity_factor=2.0)
    >>> tokens = keras.random.normal((1, 32, 8))
    >>> router(tokens).dispatch(tokens).shape
    (1, 4, 16, 8)

    Reference:
        [Zhou et al., 2022](https://arxiv.org/abs/2202.09368), section 3.2.
    """

    def __init__(
        self,
        num_experts: int,
        capacity_factor: float | None = None,
        noise_std: float = 1.0,
        gate: str | keras.layers.Layer = "linear",
        z_loss_weight: float = 0.0,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_experts, noise_std, gate, seed, **kwargs)
        if capacity_factor is None:
            capacity_factor = 1.0
        if capacity_factor == "dropless":
            raise ValueError(
                "Expert choice fills each expert to its capacity and cannot be "
                f"dropless. Received: {capacity_factor=!r}. "
                "Set a capacity factor such as 1.0, or use a TopKRouter."
            )
        check_capacity_factor(capacity_factor)
        check_not_negative(z_loss_weight=z_loss_weight)
        self.capacity_factor = float(capacity_factor)
        self.z_loss_weight = z_loss_weight

    def make_plan(
        self, logits: Tensor, mask: Tensor | None, group_size: int | Tensor
    ) -> Plan:
        capacity = slots_per_expert(
            group_size,
            ops.shape(logits)[1],
            self.num_experts,
            1,
            self.capacity_factor,
        )
        return routing.expert_choice_plan(softmax(logits), capacity, mask)

    def auxiliary_losses(
        self, logits: Tensor, noisy_logits: Tensor, mask: Tensor | None
    ) -> list[Tensor]:
        if not self.z_loss_weight:
            return []
        return [self.z_loss_weight * losses.router_z_loss(logits, mask)]

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "capacity_factor": self.capacity_factor,
            "z_loss_weight": self.z_loss_weight,
        }
