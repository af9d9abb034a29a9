"""Token choice in an efficient ensemble: members have their own experts."""

from typing import Any

import keras
from keras import ops

from keras_vmoe._checks import check_sizes
from keras_vmoe._checks import is_integer
from keras_vmoe._typing import Config
from keras_vmoe._typing import Tensor
from keras_vmoe.layers.top_k_router import TopKRouter
from keras_vmoe.layers.top_k_router import check_min_experts

NEVER = -1e9  # The logit of another member's expert: a gate of exactly 0.


@keras.saving.register_keras_serializable("keras_vmoe")
class EnsembleRouter(TopKRouter):
    """Top-K routing in which each member of an ensemble has its own experts.

    The E experts form M equal parts. Images come as M copies, one after the
    other; the tokens of copy m go to the experts of part m. Softmax, noise and
    losses are those of a router with E / M experts; the losses are averaged
    over the members. One layer thus holds M routers, each with a slice of the
    gate's weights.

    Args:
        num_experts: E, over all members.
        ensemble_size: M; must divide E.
        num_selected_experts: K, experts per token, at most E / M.
        **kwargs: Further arguments of `TopKRouter`. `noise_std` is in units of
            `M / E`.

    Call arguments:
        tokens: `(G, S, D)` float tensor, of whole images.
        images_per_group: Images per group, copies counted; a multiple of M.
        Others as in `TopKRouter`.

    Returns:
        A plan, as from `TopKRouter`.

    Raises:
        ValueError: As `TopKRouter`, or if M does not divide E, K is above
            E / M, or a group does not hold all copies of its images.

    Example:

    >>> router = EnsembleRouter(num_experts=4, ensemble_size=2)
    >>> tokens = keras.random.normal((1, 2 * 8, 3))  # An image of 8 tokens.
    >>> plan = router(tokens, images_per_group=2)
    >>> plan.dispatch(tokens).shape
    (1, 4, 8, 3)

    Reference:
        [Allingham et al., 2021](https://arxiv.org/abs/2110.03360), section 4.
    """

    def __init__(
        self,
        num_experts: int,
        ensemble_size: int,
        num_selected_experts: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_experts, num_selected_experts, **kwargs)
        check_sizes(ensemble_size=ensemble_size)
        self.ensemble_size = self.copies = int(ensemble_size)
        if self.num_experts % self.ensemble_size:
            raise ValueError(
                "All members must have equally many experts: `ensemble_size` "
                f"must divide `num_experts`. Received: ensemble_size="
                f"{ensemble_size}, num_experts={num_experts}."
            )
        if self.num_selected_experts > self.experts_per_member:
            raise ValueError(
                "A token only goes to experts of its own member. Received: "
                f"num_selected_experts={num_selected_experts} with "
                f"{self.experts_per_member} experts per member (num_experts="
                f"{num_experts}, ensemble_size={ensemble_size}). Select fewer "
                "experts or add some."
            )
        if self.min_experts is not None:
            check_min_experts(self.min_experts, self.experts_per_member)

    @property
    def experts_per_member(self) -> int:
        """E / M."""
        return self.num_experts // self.ensemble_size

    @property
    def noise(self) -> float:
        return self.noise_std / self.experts_per_member

    def restrict(
        self, logits: Tensor, images_per_group: int | Tensor
    ) -> Tensor:
        if is_integer(images_per_group) and images_per_group % self.copies:
            raise ValueError(
                "A group must hold all copies of its images, "
                f"{self.copies} of each. Received: images_per_group="
                f"{images_per_group}. Copy the images, as "
                "`layers.ensemble.RepeatImages` does."
            )
        num_tokens = ops.shape(logits)[1]
        image = ops.arange(num_tokens) // (num_tokens // images_per_group)
        member = ops.cast(image % self.copies, "int32")
        owner = ops.arange(self.num_experts, dtype="int32")
        owner = owner // self.experts_per_member
        own = member[:, None] == owner
        return ops.where(own, logits, ops.full_like(logits, NEVER))

    def auxiliary_losses(
        self, logits: Tensor, noisy_logits: Tensor, mask: Tensor | None
    ) -> list[Tensor]:
        size, members = self.experts_per_member, []
        for start in range(0, self.num_experts, size):
            part = slice(start, start + size)
            own = logits[..., start] > NEVER / 2
            own = own if mask is None else ops.logical_and(own, mask)
            members.append(
                super().auxiliary_losses(
                    logits[..., part], noisy_logits[..., part], own
                )
            )
        return [sum(x) / self.copies for x in zip(*members, strict=True)]

    def get_config(self) -> Config:
        return {**super().get_config(), "ensemble_size": self.ensemble_size}
