"""Routers: gate, noise, selection, auxiliary losses: from tokens to plans."""

import math
import numbers

import keras
from keras import ops

from keras_vmoe import losses
from keras_vmoe import routing
from keras_vmoe.layers.gates import get_gate
from keras_vmoe.layers.statistics import RoutingStatistics
from keras_vmoe.layers.stochastic import SavesSeedState
from keras_vmoe.routing.groups import check_capacity_factor
from keras_vmoe.routing.groups import check_selection


class Router(SavesSeedState, keras.layers.Layer):
    """What all routers share: logits with noise, losses, statistics.

    A subclass defines `make_plan` and lists its losses in `auxiliary_losses`.

    Args:
        num_experts: E.
        noise_std: Standard deviation of the logits' noise in training, in
            units of `1 / E`.
        gate: Name of a gate, or a layer from tokens to logits.
        seed: Optional integer seed of the noise.
    """

    def __init__(
        self, num_experts, noise_std=1.0, gate="linear", seed=None, **kwargs
    ):
        super().__init__(**kwargs)
        check_selection(num_experts, 1)
        _check_not_negative("noise_std", noise_std)
        self.supports_masking = True
        # Under `keras.RematScope` the layer around is rematerialised; a router
        # of its own could not be, because a plan is not a tensor.
        self._remat_mode = None
        self.num_experts = int(num_experts)
        self.noise_std = noise_std
        self.gate = gate
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.gate_layer = get_gate(
            gate, num_experts, dtype=self.dtype_policy, name="gate"
        )
        self.statistics = RoutingStatistics(num_experts)
        self.owned = False  # Set by the MoE layer that takes the router.

    @property
    def variables(self):
        # Carried through compiled steps like the state of a seed, but neither
        # a weight nor saved: a paper's parameter count has no place for it.
        return [*super().variables, self.statistics.state]

    def build(self, input_shape):
        if len(input_shape) != 3:
            raise ValueError(
                "A router takes tokens of shape (groups, tokens per group, "
                f"features). Received: input_shape={tuple(input_shape)}. "
                "`routing.group_tokens` makes groups of a batch."
            )
        if not self.gate_layer.built:
            self.gate_layer.build(input_shape)

    def call(self, tokens, mask=None, group_size=None, training=False):
        logits = self.gate_layer(tokens)  # (G, S, E)
        if logits.shape[-1] != self.num_experts:
            raise ValueError(
                f"The gate must give one logit for each of {self.num_experts} "
                f"experts. Received: logits of shape {tuple(logits.shape)}. "
                "Make a gate layer with as many outputs as experts."
            )
        noisy_logits = self._add_noise(logits) if training else logits
        if group_size is None:
            group_size = ops.shape(tokens)[1]
        plan = self.make_plan(noisy_logits, mask, group_size)
        if training:
            self._report(plan, logits, noisy_logits, mask)
        return plan

    def make_plan(self, logits, mask, group_size):
        """Turns logits into a routing plan.

        Args:
            logits: `(G, S, E)` float32 tensor, with noise in training.
            mask: `(G, S)` bool tensor or None.
            group_size: Tokens of a full group; sets the capacity.

        Returns:
            A plan with `dispatch`, `combine`, `load_share`, `dropped_share`.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define `make_plan`."
        )

    def auxiliary_losses(self, logits, noisy_logits, mask):
        """The weighted auxiliary losses, a list of `(G,)` tensors."""
        return []

    def compute_mask(self, inputs, previous_mask):
        return None  # Used up: the plan gives masked tokens no place.

    def _add_noise(self, logits):
        if not self.noise_std:
            return logits
        noise = keras.random.normal(
            ops.shape(logits), dtype="float32", seed=self.seed_generator
        )
        return logits + self.noise_std / self.num_experts * noise

    def _report(self, plan, logits, noisy_logits, mask):
        weighted = self.auxiliary_losses(logits, noisy_logits, mask)
        loss = _mean(sum(weighted)) if weighted else ops.zeros(())
        if weighted:
            self.add_loss(loss)
        self.statistics.update(plan, loss)

    def compute_output_spec(self, tokens, *args, **kwargs):
        raise ValueError(
            f"A {type(self).__name__} returns a routing plan, not a tensor, "
            "and cannot stand alone in a functional model. Received: "
            f"tokens={tokens}. Pass it to `layers.MoEMLP(router=...)`."
        )

    def get_config(self):
        gate = self.gate
        if isinstance(gate, keras.layers.Layer):
            gate = keras.saving.serialize_keras_object(gate)
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "noise_std": self.noise_std,
            "gate": gate,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config):
        if isinstance(config.get("gate"), dict):
            gate = keras.saving.deserialize_keras_object(config["gate"])
            config = {**config, "gate": gate}
        return cls(**config)


@keras.saving.register_keras_serializable("keras_vmoe")
class TopKRouter(Router):
    """Token choice: every token goes to its K best experts, room permitting.

    The gates are `softmax(logits + noise)` in float32; noise
    `N(0, (noise_std / E)²)` is there in training only. Combine weights are the
    selected gates, not renormalised. What finds its expert full is dropped.

    Names against the paper: `num_selected_experts` is k, `capacity_factor` is
    C, and `images_per_group` of `MoEMLP` is what its program calls the group
    size, there in tokens.

    Args:
        num_experts: E, at least 1.
        num_selected_experts: K, between 1 and E.
        capacity_factor: Room of the experts relative to an even load.
        batch_priority: Whether confident tokens are served first (BPR).
        noise_std: Standard deviation of the noise, in units of `1 / E`.
        gate: `"linear"`, or a layer from `(G, S, D)` tokens to `(G, S, E)`
            logits.
        importance_loss_weight: Weight of the importance loss, of the gates
            without noise.
        load_loss_weight: Weight of the load loss, which there is only with
            noise.
        gshard_loss_weight: Weight of GShard's loss, of the gates with noise.
        z_loss_weight: Weight of the router z-loss, of the logits without
            noise.
        seed: Optional integer seed of the noise.

    Call arguments:
        tokens: `(G, S, D)` float tensor.
        mask: Optional `(G, S)` bool tensor, False for tokens to leave out.
        group_size: Optional number of tokens of a full group, if `tokens` hold
            fewer; the capacity is that of a full group.
        training: Whether to add noise and auxiliary losses.

    Returns:
        A `routing.SparsePlan`.

    Raises:
        ValueError: If K is not between 1 and E, or the capacity factor is not
            positive, or `noise_std` is negative, or the gate is unknown.

    Example:

    >>> router = TopKRouter(num_experts=4, num_selected_experts=2)
    >>> tokens = keras.random.normal((1, 32, 8))
    >>> plan = router(tokens)
    >>> plan.dispatch(tokens).shape
    (1, 4, 20, 8)

    Reference:
        [Riquelme et al., 2021](https://arxiv.org/abs/2106.05974), section 2.2.
    """

    def __init__(
        self,
        num_experts,
        num_selected_experts=1,
        capacity_factor=1.05,
        batch_priority=False,
        noise_std=1.0,
        gate="linear",
        importance_loss_weight=0.005,
        load_loss_weight=0.005,
        gshard_loss_weight=0.0,
        z_loss_weight=0.0,
        seed=None,
        **kwargs,
    ):
        super().__init__(num_experts, noise_std, gate, seed, **kwargs)
        check_selection(num_experts, num_selected_experts)
        check_capacity_factor(capacity_factor)
        for name, weight in (
            ("importance_loss_weight", importance_loss_weight),
            ("load_loss_weight", load_loss_weight),
            ("gshard_loss_weight", gshard_loss_weight),
            ("z_loss_weight", z_loss_weight),
        ):
            _check_not_negative(name, weight)
        self.num_selected_experts = int(num_selected_experts)
        self.capacity_factor = float(capacity_factor)
        self.batch_priority = batch_priority
        self.importance_loss_weight = importance_loss_weight
        self.load_loss_weight = load_loss_weight
        self.gshard_loss_weight = gshard_loss_weight
        self.z_loss_weight = z_loss_weight

    def make_plan(self, logits, mask, group_size):
        capacity = routing.capacity(
            group_size,
            self.num_experts,
            self.num_selected_experts,
            self.capacity_factor,
        )
        num_tokens = ops.shape(logits)[1]
        if isinstance(capacity, int) and isinstance(num_tokens, int):
            capacity = min(capacity, num_tokens)
        return routing.top_k_plan(
            ops.softmax(logits),
            self.num_selected_experts,
            capacity,
            batch_priority=self.batch_priority,
            mask=mask,
        )

    def auxiliary_losses(self, logits, noisy_logits, mask):
        weighted = []
        if self.importance_loss_weight:
            loss = losses.importance_loss(ops.softmax(logits), mask)
            weighted.append(self.importance_loss_weight * loss)
        if self.load_loss_weight and self.noise_std:
            loss = losses.load_loss(
                logits,
                noisy_logits,
                self.noise_std / self.num_experts,
                self.num_selected_experts,
                mask,
            )
            weighted.append(self.load_loss_weight * loss)
        if self.gshard_loss_weight:
            loss = losses.gshard_loss(ops.softmax(noisy_logits), mask)
            weighted.append(self.gshard_loss_weight * loss)
        if self.z_loss_weight:
            loss = losses.router_z_loss(logits, mask)
            weighted.append(self.z_loss_weight * loss)
        return weighted

    def get_config(self):
        return {
            **super().get_config(),
            "num_selected_experts": self.num_selected_experts,
            "capacity_factor": self.capacity_factor,
            "batch_priority": self.batch_priority,
            "importance_loss_weight": self.importance_loss_weight,
            "load_loss_weight": self.load_loss_weight,
            "gshard_loss_weight": self.gshard_loss_weight,
            "z_loss_weight": self.z_loss_weight,
        }


def _mean(values):
    """Mean of a `(G,)` tensor; 0 for an empty batch."""
    count = ops.cast(ops.size(values), values.dtype)
    return ops.sum(values) / ops.maximum(count, 1.0)


def _check_not_negative(name, value):
    """Raises unless a setting is a finite number of at least 0."""
    if not isinstance(value, numbers.Real) or not 0 <= value < math.inf:
        raise ValueError(
            f"`{name}` must be a finite number and not negative. "
            f"Received: {name}={value!r}. 0 turns it off."
        )
