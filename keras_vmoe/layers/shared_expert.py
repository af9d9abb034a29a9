"""The MoE layer with an additional expert that sees every token."""

from typing import Any
from typing import Self
from typing import cast

import keras
from keras import ops

from keras_vmoe._checks import check_sizes
from keras_vmoe._typing import Config
from keras_vmoe._typing import Shape
from keras_vmoe._typing import Tensor
from keras_vmoe.layers.bank import BANK
from keras_vmoe.layers.mlp import MLP
from keras_vmoe.layers.moe import MoEMLP
from keras_vmoe.layers.parts import hand_down
from keras_vmoe.layers.routers import with_layers


@keras.saving.register_keras_serializable("keras_vmoe")
class SharedExpertMoEMLP(MoEMLP):
    """A mixture of MLPs, plus one MLP that sees every token.

    The shared expert's output is added to the mixture's, with weight 1, masked
    tokens included. It learns what all tokens need, and the others can
    specialize. A dropped token still passes through it.

    Args:
        num_experts: E, without the shared expert.
        hidden_dim: F, hidden features of one routed expert.
        shared_hidden_dim: Hidden features of the shared expert, unless
            `shared_expert` is given.
        shared_expert: An `MLP` to use as the shared expert; None makes one
            with the settings of the default bank.
        **kwargs: Further arguments of `MoEMLP`.

    Call arguments:
        inputs: `(B, ..., D)` float tensor; others as in `MoEMLP`.

    Returns:
        Tensor of the shape of `inputs`.

    Raises:
        ValueError: As `MoEMLP`, or if `shared_hidden_dim` contradicts the
            shared expert.

    Example:

    >>> layer = SharedExpertMoEMLP(
    ...     num_experts=4, hidden_dim=32, shared_hidden_dim=16)
    >>> layer(keras.random.normal((2, 7, 7, 16))).shape
    (2, 7, 7, 16)

    Reference:
        [Dai et al., 2024](https://arxiv.org/abs/2401.06066) (DeepSeekMoE),
        section 3.2; for vision
        [Han et al., 2024](https://arxiv.org/abs/2410.15732) (ViMoE).
    """

    def __init__(
        self,
        num_experts: int,
        hidden_dim: int | None = None,
        shared_hidden_dim: int | None = None,
        shared_expert: MLP | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_experts, hidden_dim, **kwargs)
        if shared_expert is None:
            check_sizes(shared_hidden_dim=shared_hidden_dim)
            settings = {name: kwargs[name] for name in BANK & kwargs.keys()}
            shared_expert = MLP(
                cast("int", shared_hidden_dim),  # Checked.
                **settings,
                dtype=self.dtype_policy,
                name="shared_expert",
            )
        if shared_hidden_dim not in (None, shared_expert.hidden_dim):
            raise ValueError(
                "A shared expert has its own `hidden_dim`. Received: "
                f"shared_hidden_dim={shared_hidden_dim} together with a "
                f"shared_expert of {shared_expert.hidden_dim}. Leave it out."
            )
        self.shared_hidden_dim = shared_expert.hidden_dim
        self.shared_expert = shared_expert
        hand_down(self)

    def build(self, input_shape: Shape) -> None:
        # First: the end of `build` freezes its frozen parts again.
        if not self.shared_expert.built:
            self.shared_expert.build(input_shape)
        super().build(input_shape)

    def call(
        self, inputs: Tensor, mask: Tensor | None = None, training: bool = False
    ) -> Tensor:
        outputs = super().call(inputs, mask=mask, training=training)
        shared = self.shared_expert(inputs, training=training)
        return outputs + ops.cast(shared, outputs.dtype)

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "shared_hidden_dim": self.shared_hidden_dim,
            "shared_expert": self.shared_expert,
        }

    @classmethod
    def from_config(cls, config: Config) -> Self:
        return super().from_config(with_layers(config, "shared_expert"))
