"""Soft MoE: experts work on mixtures of tokens."""

import keras
from keras import ops

from keras_vmoe import routing
from keras_vmoe.layers.gates import SoftGate
from keras_vmoe.layers.routers import Router
from keras_vmoe.layers.routers import check_settings


@keras.saving.register_keras_serializable("keras_vmoe")
class SoftRouter(Router):
    """Soft MoE: each expert has P slots, convex mixtures of an image's tokens.

    Nothing is dropped and the load needs no balancing. One image is one group:
    `MoEMLP` routes each image alone with this router.

    Args:
        num_experts: E, at least 1.
        num_slots: P, slots per expert. None means `round(N * capacity_factor /
            E)` for the N tokens of an image, which then must be known.
        capacity_factor: Slots relative to tokens, where `num_slots` is None.
        noise_std: Standard deviation of the logits' noise in training, in
            units of `1 / E`.
        seed: Optional integer seed of the noise.

    Call arguments:
        tokens: `(G, S, D)` float tensor; a group is one image.
        mask: Optional `(G, S)` bool tensor, False for tokens to leave out.
        training: Whether to add noise.

    Returns:
        A `routing.SoftPlan`.

    Raises:
        ValueError: If the number of slots comes out at 0 or is unknown,
            `noise_std` is negative, or a setting of another router is given.

    Example:

    >>> router = SoftRouter(num_experts=4, num_slots=2)
    >>> tokens = keras.random.normal((3, 32, 8))
    >>> router(tokens).dispatch(tokens).shape
    (3, 4, 2, 8)

    Reference:
        [Puigcerver et al., 2023](https://arxiv.org/abs/2308.00951), section 2.
    """

    images_per_group = 1

    def __init__(
        self,
        num_experts,
        num_slots=None,
        capacity_factor=1.0,
        noise_std=0.0,
        seed=None,
        **kwargs,
    ):
        check_settings(type(self).__name__, kwargs)
        if num_slots is not None and capacity_factor != 1.0:
            raise ValueError(
                "The number of slots is given or follows from the capacity "
                f"factor. Received: num_slots={num_slots} together with "
                f"capacity_factor={capacity_factor}. Leave one of them out."
            )
        gate = SoftGate(
            num_experts,
            num_slots,
            capacity_factor,
            dtype=kwargs.get("dtype"),
            name="gate",
        )
        super().__init__(num_experts, noise_std, gate, seed, **kwargs)
        self.num_slots = num_slots
        self.capacity_factor = capacity_factor

    def make_plan(self, logits, mask, group_size):
        return routing.soft_plan(logits, mask)

    def expert_gates(self, logits):
        groups, num_tokens, num_experts, num_slots = ops.shape(logits)
        size = num_experts * num_slots
        flat = ops.reshape(logits, (groups, num_tokens, size))
        gates = ops.reshape(ops.softmax(flat), ops.shape(logits))
        return ops.sum(gates, axis=-1)

    def get_config(self):
        config = {
            **super().get_config(),
            "num_slots": self.num_slots,
            "capacity_factor": self.capacity_factor,
        }
        del config["gate"]  # Follows from the slots.
        return config
