"""Token choice: TopKRouter, and its variant that balances without losses."""

from typing import Any
from typing import Literal
from typing import Self

import keras
from keras import ops

from keras_vmoe import losses
from keras_vmoe import routing
from keras_vmoe._checks import check_flags
from keras_vmoe._checks import check_not_negative
from keras_vmoe._checks import check_positive
from keras_vmoe._checks import plain
from keras_vmoe._typing import Config
from keras_vmoe._typing import Shape
from keras_vmoe._typing import Tensor
from keras_vmoe.layers.routers import Router
from keras_vmoe.layers.routers import slots_per_expert
from keras_vmoe.layers.routers import with_layers
from keras_vmoe.routing._groups import check_capacity_factor
from keras_vmoe.routing._groups import check_selection
from keras_vmoe.routing._selection import softmax
from keras_vmoe.routing.plans import Plan

CAPACITY_FACTOR = 1.05  # As in V-MoE.


@keras.saving.register_keras_serializable("keras_vmoe")
class TopKRouter(Router):
    """Token choice: each token goes to its K best experts, room permitting.

    The gates are `softmax(logits + noise)` in float32; the noise,
    `N(0, (noise_std / E)²)`, is added in training only. Combine weights are the
    selected gates, unchanged unless `renormalize`. A choice whose expert is
    full is dropped.

    Names in the paper: `num_selected_experts` is k, `capacity_factor` is C, and
    `images_per_group` of `MoEMLP` is the group size of the authors' code, which
    counts tokens.

    Args:
        num_experts: E, at least 1.
        num_selected_experts: K, between 1 and E.
        capacity_factor: Capacity of the experts relative to an even load, or
            `"dropless"`, which drops nothing at any load: see
            `routing.dropless_plan`. None means 1.05.
        batch_priority: Whether confident tokens are served first (BPR).
        renormalize: Whether to divide a token's combine weights by their sum,
            before any is dropped. With K = 1 they are then 1, and the gate
            learns from the auxiliary losses alone.
        noise_std: Standard deviation of the noise, in units of `1 / E`.
        gate: `"linear"`, `"cosine"` or `"l2"`, or a layer from `(G, S, D)`
            tokens to `(G, S, E)` logits; make it with `dtype="float32"`.
        importance_loss_weight: Weight of the importance loss, which uses the
            gates without noise.
        load_loss_weight: Weight of the load loss, which requires noise.
        gshard_loss_weight: Weight of GShard's loss, which uses the gates with
            noise.
        z_loss_weight: Weight of the router z-loss, which uses the logits
            without noise.
        local_entropy_loss_weight: Weight of LIMoE's local entropy loss, which
            uses the gates without noise.
        global_entropy_loss_weight: Weight of LIMoE's global entropy loss.
        min_experts: Soft minimum of experts in use for the global entropy loss,
            at most E; None means E.
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
        A `routing.Plan` from `routing.top_k_plan` or `dropless_plan`.

    Raises:
        ValueError: If K or `min_experts` is not between 1 and E, the capacity
            factor is not positive, `noise_std` or a loss weight is negative,
            the gate is unknown, or a dropless router has `batch_priority`.

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
        num_experts: int,
        num_selected_experts: int = 1,
        capacity_factor: float | Literal["dropless"] | None = None,
        batch_priority: bool = False,
        renormalize: bool = False,
        noise_std: float = 1.0,
        gate: str | keras.layers.Layer = "linear",
        importance_loss_weight: float = 0.005,
        load_loss_weight: float = 0.005,
        gshard_loss_weight: float = 0.0,
        z_loss_weight: float = 0.0,
        local_entropy_loss_weight: float = 0.0,
        global_entropy_loss_weight: float = 0.0,
        min_experts: float | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_experts, noise_std, gate, seed, **kwargs)
        check_selection(num_experts, num_selected_experts)
        check_not_negative(
            importance_loss_weight=importance_loss_weight,
            load_loss_weight=load_loss_weight,
            gshard_loss_weight=gshard_loss_weight,
            z_loss_weight=z_loss_weight,
            local_entropy_loss_weight=local_entropy_loss_weight,
            global_entropy_loss_weight=global_entropy_loss_weight,
        )
        if min_experts is not None:
            check_positive(min_experts=min_experts)
            check_min_experts(min_experts, num_experts)
        check_flags(batch_priority=batch_priority, renormalize=renormalize)
        if capacity_factor is None:
            capacity_factor = CAPACITY_FACTOR
        if capacity_factor == "dropless" and batch_priority:
            raise ValueError(
                "Without a capacity every token is served, and none needs "
                f"priority. Received: {capacity_factor=!r} and "
                "batch_priority=True. Set a capacity factor, or leave "
                "`batch_priority` out."
            )
        if capacity_factor != "dropless":
            check_capacity_factor(capacity_factor)
            capacity_factor = float(capacity_factor)
        self.num_selected_experts = int(num_selected_experts)
        self.capacity_factor = capacity_factor
        self.batch_priority = plain(batch_priority)
        self.renormalize = plain(renormalize)
        self.importance_loss_weight = importance_loss_weight
        self.load_loss_weight = load_loss_weight
        self.gshard_loss_weight = gshard_loss_weight
        self.z_loss_weight = z_loss_weight
        self.local_entropy_loss_weight = local_entropy_loss_weight
        self.global_entropy_loss_weight = global_entropy_loss_weight
        self.min_experts = min_experts

    @classmethod
    def from_config(cls, config: Config) -> Self:
        config = dict(config)
        if config.get("capacity_factor", "") is None:  # Of version 0.1.0.
            config["capacity_factor"] = "dropless"
        return super().from_config(config)

    def make_plan(
        self, logits: Tensor, mask: Tensor | None, group_size: int | Tensor
    ) -> Plan:
        gates = softmax(logits)
        if self.capacity_factor == "dropless":
            return routing.dropless_plan(
                gates,
                self.num_selected_experts,
                mask=mask,
                scores=self.scores(gates),
                renormalize=self.renormalize,
            )
        capacity = slots_per_expert(
            group_size,
            ops.shape(logits)[1],
            self.num_experts,
            self.num_selected_experts,
            self.capacity_factor,
        )
        return routing.top_k_plan(
            gates,
            self.num_selected_experts,
            capacity,
            batch_priority=self.batch_priority,
            mask=mask,
            scores=self.scores(gates),
            renormalize=self.renormalize,
        )

    def scores(self, gates: Tensor) -> Tensor | None:
        """Returns the selection scores; None selects by the gates."""
        return None

    def auxiliary_losses(
        self, logits: Tensor, noisy_logits: Tensor, mask: Tensor | None
    ) -> list[Tensor]:
        weighted = []
        if self.importance_loss_weight:
            loss = losses.importance_loss(softmax(logits), mask)
            weighted.append(self.importance_loss_weight * loss)
        if self.load_loss_weight and self.noise_std:
            loss = losses.load_loss(
                logits,
                noisy_logits,
                self.noise,
                self.num_selected_experts,
                mask,
            )
            weighted.append(self.load_loss_weight * loss)
        if self.gshard_loss_weight:
            loss = losses.gshard_loss(softmax(noisy_logits), mask)
            weighted.append(self.gshard_loss_weight * loss)
        if self.z_loss_weight:
            loss = losses.router_z_loss(logits, mask)
            weighted.append(self.z_loss_weight * loss)
        if self.local_entropy_loss_weight:
            loss = losses.local_entropy_loss(softmax(logits), mask)
            weighted.append(self.local_entropy_loss_weight * loss)
        if self.global_entropy_loss_weight:
            loss = losses.global_entropy_loss(
                softmax(logits), self.min_experts, mask
            )
            weighted.append(self.global_entropy_loss_weight * loss)
        return weighted

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "num_selected_experts": self.num_selected_experts,
            "capacity_factor": self.capacity_factor,
            "batch_priority": self.batch_priority,
            "renormalize": self.renormalize,
            "importance_loss_weight": self.importance_loss_weight,
            "load_loss_weight": self.load_loss_weight,
            "gshard_loss_weight": self.gshard_loss_weight,
            "z_loss_weight": self.z_loss_weight,
            "local_entropy_loss_weight": self.local_entropy_loss_weight,
            "global_entropy_loss_weight": self.global_entropy_loss_weight,
            "min_experts": self.min_experts,
        }


def check_min_experts(min_experts, num_experts):
    """Raises if `min_experts` exceeds the number of experts."""
    if min_experts > num_experts:
        raise ValueError(
            "`min_experts` must be at most the number of experts, in an "
            "ensemble at most each member's. Received: "
            f"min_experts={min_experts} of {num_experts}. Above that, the "
            "global entropy loss never reaches 0."
        )


@keras.saving.register_keras_serializable("keras_vmoe")
class BiasBalancedRouter(TopKRouter):
    """Top-K routing that balances the load by a bias, without auxiliary loss.

    Experts are selected by `gate + bias`; the combine weights stay the gates.
    After each training step, the bias rises by `update_rate` for every expert
    below the mean load and falls by as much for every expert above it. The bias
    is a weight without gradient, saved with the model.

    Gates are a softmax. The paper's experiments use a sigmoid, for which its
    `update_rate` was chosen.

    Args:
        num_experts: E, at least 1.
        update_rate: Change of a bias per step, in units of the gates.
        importance_loss_weight: As in `TopKRouter`, but 0 by default.
        load_loss_weight: As in `TopKRouter`, but 0 by default.
        balance: The layer that holds the bias; None makes one. Routers given
            the same layer share it.
        **kwargs: Further arguments of `TopKRouter`.

    Call arguments:
        tokens: `(G, S, D)` float tensor; others as in `TopKRouter`.

    Returns:
        A plan, as from `TopKRouter`.

    Raises:
        ValueError: As `TopKRouter`, or if `update_rate` is negative.

    Example:

    >>> router = BiasBalancedRouter(num_experts=4, num_selected_experts=2)
    >>> router(keras.random.normal((1, 32, 8))).load.shape
    (1, 4)

    Reference:
        [Wang et al., 2024](https://arxiv.org/abs/2408.15664), algorithm 1.
    """

    def __init__(
        self,
        num_experts: int,
        update_rate: float = 0.001,
        importance_loss_weight: float = 0.0,
        load_loss_weight: float = 0.0,
        balance: "BalanceBias | None" = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_experts,
            importance_loss_weight=importance_loss_weight,
            load_loss_weight=load_loss_weight,
            **kwargs,
        )
        check_not_negative(update_rate=update_rate)
        self.update_rate = update_rate
        self.balance = balance or BalanceBias(num_experts, name="balance")

    def build(self, input_shape: Shape) -> None:
        super().build(input_shape)
        if not self.balance.built:
            self.balance.build((self.num_experts,))

    @property
    def bias(self) -> keras.Variable:
        """The bias added to the gates before the selection, `(E,)`."""
        return self.balance.bias

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        self.balance.store_in(store)

    def load_own_variables(self, store: Any) -> None:
        store = {key: store[key] for key in store.keys()}
        self.balance.load_from(store)
        super().load_own_variables(store)

    def scores(self, gates: Tensor) -> Tensor | None:
        return gates + ops.convert_to_tensor(self.bias)

    def after_step(self, plan: Plan) -> None:
        if not (self.trainable and self.balance.trainable):
            return
        share = plan.load_share()
        missing = ops.mean(share) - share
        self.bias.assign_add(self.update_rate * ops.sign(missing))

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "update_rate": self.update_rate,
            "balance": self.balance,
        }

    @classmethod
    def from_config(cls, config: Config) -> Self:
        return super().from_config(with_layers(config, "balance"))


@keras.saving.register_keras_serializable("keras_vmoe")
class BalanceBias(keras.layers.Layer):
    """The bias of a `BiasBalancedRouter`, one number per expert.

    Files store it among the router's own variables, as in version 0.1.0.
    """

    def __init__(self, num_experts: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_experts = num_experts

    def build(self, input_shape: Shape) -> None:
        self.bias = self.add_weight(
            name="bias",
            shape=(self.num_experts,),
            initializer="zeros",
            trainable=False,
            dtype="float32",
            autocast=False,
            # Replicas move it by their own load; the mean is what counts.
            aggregation="mean",
        )

    def store_in(self, store: Any) -> None:
        """Writes the bias into the store of its router."""
        store["0"] = keras.ops.convert_to_numpy(self.bias)

    def load_from(self, store: Any) -> None:
        """Reads the bias from the store of its router and removes it."""
        self.bias.assign(store.pop("0"))

    def save_own_variables(self, store: Any) -> None:
        pass

    def load_own_variables(self, store: Any) -> None:
        pass

    def get_config(self) -> Config:
        return {**super().get_config(), "num_experts": self.num_experts}
