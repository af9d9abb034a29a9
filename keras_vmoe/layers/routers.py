"""Routers, from tokens to plans: gate, noise, selection, auxiliary losses."""

from collections.abc import Callable
from typing import Any
from typing import NoReturn
from typing import Self

import keras
from keras import ops

from keras_vmoe import routing
from keras_vmoe._checks import check_not_negative
from keras_vmoe._checks import is_integer
from keras_vmoe._checks import plain
from keras_vmoe._keras import all_layers
from keras_vmoe._typing import Config
from keras_vmoe._typing import Shape
from keras_vmoe._typing import Tensor
from keras_vmoe.layers.gates import get_gate
from keras_vmoe.layers.parts import KeepsParts
from keras_vmoe.layers.parts import hand_down
from keras_vmoe.layers.parts import thaw
from keras_vmoe.layers.precision import in_float32
from keras_vmoe.layers.statistics import RoutingStatistics
from keras_vmoe.layers.stochastic import SavesSeedState
from keras_vmoe.layers.stochastic import SeedGenerator
from keras_vmoe.layers.weights import mark
from keras_vmoe.routing._groups import check_selection
from keras_vmoe.routing._selection import softmax
from keras_vmoe.routing.plans import Plan

IMAGES_PER_GROUP = 8  # As in V-MoE.


class Router(SavesSeedState, KeepsParts, keras.layers.Layer):
    """Base of all routers: logits with noise, losses, statistics.

    A router maps tokens `(G, S, D)` to a `routing.Plan`. A subclass defines
    `make_plan` and lists its losses in `auxiliary_losses`.

    Args:
        num_experts: E.
        noise_std: Standard deviation of the logits' noise in training, in
            units of `1 / E`.
        gate: Name of a gate, or a layer from tokens to logits.
        seed: Optional integer seed of the noise.
    """

    # Images per group, if the router's mathematics fixes them.
    images_per_group: int | None = None
    # Consecutive copies of each image in a batch, as in an ensemble.
    copies = 1

    def __init__(
        self,
        num_experts: int,
        noise_std: float = 1.0,
        gate: str | keras.layers.Layer = "linear",
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        check_settings(type(self).__name__, kwargs)
        super().__init__(**kwargs)
        check_selection(num_experts, 1)
        check_not_negative(noise_std=noise_std)
        self.supports_masking = True
        self.num_experts = int(num_experts)
        self.noise_std = noise_std
        self.gate = gate
        self.seed = plain(seed)
        self.seed_generator = SeedGenerator(self.seed)
        self.gate_layer = get_gate(
            gate, num_experts, dtype=self.dtype_policy, name="gate"
        )
        self.statistics = RoutingStatistics(num_experts)
        self.features: int | None = None
        hand_down(self)

    @property
    def variables(self) -> list[keras.Variable]:
        # Carried through compiled steps like the state of a seed, but neither
        # a weight nor saved: it does not belong in a parameter count.
        return [*super().variables, self.statistics.state]

    def build(self, input_shape: Shape) -> None:
        if len(input_shape) != 3:
            raise ValueError(
                "A router takes tokens of shape (groups, tokens per group, "
                f"features). Received: input_shape={tuple(input_shape)}. "
                "`MoEMLP` splits a batch into groups."
            )
        self.features = input_shape[-1]
        # For any number of groups and tokens, except for a `SoftGate`. A call,
        # for gates without a `build` that create weights in `call`.
        shape = input_shape
        if self.images_per_group is None:
            shape = (None, None, self.features)
        tokens = keras.KerasTensor(shape, self.compute_dtype)
        logits = self.gate_layer(tokens)
        mark(self.gate_layer.variables, "gate")
        for layer in all_layers(self.gate_layer):
            layer.quantize = _keep_gate
        built_for = self.gate_layer.get_build_config() or {}
        features = (built_for.get("input_shape") or input_shape)[-1]
        if features != self.features:
            raise ValueError(
                "One gate serves routers of one feature width. Received: "
                f"gate={self.gate_layer.name!r}, built for {features} features,"
                f" in a router of {self.features}. Make a gate for this router."
            )
        shape = logits.shape
        if len(shape) < 3 or shape[2] != self.num_experts:
            raise ValueError(
                f"The gate must give one logit for each of {self.num_experts} "
                f"experts. Received: logits of shape {tuple(shape)}. "
                "Make a gate layer with one output per expert."
            )
        self.restore_parts()

    def check_features(self, features: int) -> None:
        """Raises if the router was built for another feature width."""
        if self.features != features:
            raise ValueError(
                "One router serves layers of one feature width. Received: "
                f"router={self.name!r}, built for {self.features} features, in "
                f"a layer of {features}. Make a router for this layer."
            )

    def sharing(self, **changes: Any) -> Self:
        """Returns a router with the same weights and `changes` of arguments."""
        new = share(self, gate=self.gate_layer, **changes)
        if not isinstance(self.gate, keras.layers.Layer):
            del new.gate  # PyTorch cannot replace a layer with a string.
            new.gate = self.gate  # Files store a named gate's layer elsewhere.
        return new

    @in_float32
    def call(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        group_size: int | Tensor | None = None,
        images_per_group: int | Tensor = 1,
        training: bool = False,
    ) -> Plan:
        # A custom gate may work in lower precision.
        logits = ops.cast(self.gate_layer(tokens), "float32")  # (G, S, E)
        logits = self.restrict(logits, images_per_group)
        noisy_logits = self._add_noise(logits) if training else logits
        if group_size is None:
            group_size = ops.shape(tokens)[1]
        plan = self.make_plan(noisy_logits, mask, group_size)
        if training:
            weighted = self.auxiliary_losses(logits, noisy_logits, mask)
            loss = _mean(sum(weighted)) if weighted else ops.zeros(())
            if weighted and self.trainable:
                self.add_loss(loss)
            gates = self.expert_gates(logits)
            self.statistics.update(plan, loss, gates, mask, images_per_group)
            self.after_step(plan)
        return plan

    def restrict(
        self, logits: Tensor, images_per_group: int | Tensor
    ) -> Tensor:
        """Restricts the logits to a token's allowed experts; here, to all."""
        return logits

    @property
    def noise(self) -> float:
        """Standard deviation of the noise in the logits."""
        return self.noise_std / self.num_experts

    def make_plan(
        self, logits: Tensor, mask: Tensor | None, group_size: int | Tensor
    ) -> Plan:
        """Turns logits into a routing plan.

        Args:
            logits: `(G, S, E)` float32 tensor, with noise in training.
            mask: `(G, S)` bool tensor or None.
            group_size: Tokens in a full group; sets the capacity.

        Returns:
            A `routing.Plan`.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define `make_plan`."
        )

    def auxiliary_losses(
        self, logits: Tensor, noisy_logits: Tensor, mask: Tensor | None
    ) -> list[Tensor]:
        """Returns the weighted auxiliary losses, a list of `(G,)` tensors."""
        return []

    def expert_gates(self, logits: Tensor) -> Tensor:
        """Returns the tokens' gates, `(G, S, E)`, which sum to 1 over E."""
        return softmax(logits)

    def after_step(self, plan: Plan) -> None:
        """Updates the router from a training step's plan; does nothing here."""

    def rematerialized_call(
        self, layer_call: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Callable[..., Any]:
        # `keras.RematScope` rematerializes the layer around. A router alone
        # cannot be rematerialized, because a plan is not a tensor.
        return layer_call

    def compute_mask(self, inputs: Any, previous_mask: Tensor | None) -> None:
        return None  # Used up: the plan gives masked tokens no slot.

    def _add_noise(self, logits):
        if not self.noise_std:
            return logits
        noise = keras.random.normal(
            ops.shape(logits), dtype="float32", seed=self.seed_generator
        )
        return logits + self.noise * noise

    def compute_output_spec(
        self, tokens: Tensor, *args: Any, **kwargs: Any
    ) -> NoReturn:
        raise ValueError(
            f"A {type(self).__name__} returns a routing plan, not a tensor, "
            "and cannot stand alone in a functional model. Received: "
            f"tokens={tokens}. Pass it to `layers.MoEMLP(router=...)`."
        )

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "noise_std": self.noise_std,
            "gate": self.gate,  # An object: Keras recognizes a shared one.
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config: Config) -> Self:
        return super().from_config(with_layers(config, "gate"))


def share(layer, **changes):
    """Returns a new layer with the same settings and the same sublayers.

    Args:
        layer: A layer whose constructor takes its sublayers.
        **changes: Constructor arguments that differ.
    """
    config = layer.get_config()
    found = config.pop("parts", {})
    parts = {name: getattr(layer, name, None) for name in config}
    parts = {
        name: part
        for name, part in parts.items()
        if isinstance(part, keras.layers.Layer)
    }
    new = type(layer)(**{**config, **parts, **changes})
    thaw(new, found)  # The constructor of a frozen layer froze all parts.
    if layer.built:
        new.build(layer.get_build_config()["input_shape"])
        replaced = [parts[name] for name in parts.keys() & changes.keys()]
        _check_all_shared(layer, [new, *replaced])
    return new


def _check_all_shared(layer, holders):
    """Raises if some weight of a layer is not held by any of the holders."""
    held = {id(weight) for other in holders for weight in other.weights}
    alone = [w.path for w in layer.weights if id(w) not in held]
    if alone:
        raise ValueError(
            "A new layer only shares weights of sublayers that its constructor "
            f"takes. Received: {layer.name!r}, a "
            f"{type(layer).__name__} with the weights {alone} elsewhere. Hold "
            "them in such a sublayer, as a router holds its gate."
        )


def with_layers(config, *names):
    """Returns a config with new layers for these names, shared with none."""
    made = {}
    for name in names:
        part = config.get(name)
        if isinstance(part, keras.layers.Layer):
            made[name] = type(part).from_config(part.get_config())
        elif isinstance(part, dict):
            made[name] = keras.saving.deserialize_keras_object(part)
    return {**config, **made}


def _keep_gate(*args, **kwargs):
    """Replaces the `quantize` of a gate."""
    # On a NotImplementedError `Model.quantize` would warn for each gate.
    raise AttributeError(
        "Gates are not quantized: they decide which expert a token goes to."
    )


def _mean(values):
    """Mean of a `(G,)` tensor; 0 for an empty batch."""
    count = ops.cast(ops.size(values), values.dtype)
    return ops.sum(values) / ops.maximum(count, 1.0)


def slots_per_expert(
    group_size, num_tokens, num_experts, num_selected, capacity_factor
):
    """Returns C for a full group, but at most the number of tokens."""
    capacity = routing.capacity(
        group_size, num_experts, num_selected, capacity_factor
    )
    if isinstance(capacity, int) and isinstance(num_tokens, int):
        return min(capacity, num_tokens)
    return capacity


# The router that each setting belongs to, for error messages.
OWNERS = {
    "batch_priority": "TopKRouter",
    "gate": "TopKRouter or an ExpertChoiceRouter",
    "ensemble_size": "EnsembleRouter",
    "global_entropy_loss_weight": "TopKRouter",
    "gshard_loss_weight": "TopKRouter",
    "importance_loss_weight": "TopKRouter",
    "load_loss_weight": "TopKRouter",
    "local_entropy_loss_weight": "TopKRouter",
    "min_experts": "TopKRouter",
    "num_selected_experts": "TopKRouter",
    "num_slots": "SoftRouter",
    "renormalize": "TopKRouter",
    "update_rate": "BiasBalancedRouter",
    "z_loss_weight": "TopKRouter or an ExpertChoiceRouter",
}


def check_settings(router, kwargs):
    """Raises if a setting of another router was given."""
    for name in kwargs:
        if name in OWNERS:
            raise ValueError(
                f"{router} has no `{name}`. "
                f"Received: {name}={kwargs[name]!r}. "
                f"Leave it out, or use a {OWNERS[name]}."
            )


def group_of(router, images_per_group):
    """Images per group, or "batch"; some routers fix it."""
    if images_per_group is None:
        images_per_group = IMAGES_PER_GROUP
    if images_per_group != "batch":
        if not is_integer(images_per_group) or images_per_group < 1:
            raise ValueError(
                "`images_per_group` must be an integer of at least 1, or "
                f"'batch' for one group per batch. Received: "
                f"{images_per_group=!r}. V-MoE uses 8."
            )
        images_per_group = int(images_per_group)
    fixed = router.images_per_group
    if fixed is None:
        return images_per_group
    if images_per_group not in (fixed, IMAGES_PER_GROUP):
        raise ValueError(
            f"A {type(router).__name__} routes each image alone. Received: "
            f"images_per_group={images_per_group!r}. Leave it out."
        )
    return fixed
