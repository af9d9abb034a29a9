"""The settings of a model's MoE layers."""

import dataclasses
from collections.abc import Mapping
from typing import Any
from typing import Literal
from typing import Self

import keras

from keras_vmoe import layers as moe_layers
from keras_vmoe._checks import check_keys
from keras_vmoe._checks import is_number
from keras_vmoe._checks import nearest
from keras_vmoe._checks import plain
from keras_vmoe.layers.moe import ROUTERS


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """The `moe` argument of the models, checked.

    Users write a dict; `from_dict` checks its keys. The settings from
    `num_selected_experts` on belong to the router. None means the router's
    default, except for K, whose default is the model's: 2 in a ViT and 1 in a
    ConvNeXt.

    Attributes:
        layers: Placement; see `models.placement`.
        num_experts: E.
        router: `"top_k"`, `"expert_choice"`, `"soft"` or `"bias_balanced"`, or
            an unbuilt router, which serves as a template: each layer of the
            model gets a new one with its settings. (Layers that are given a
            router directly use that router, and share it.)
        images_per_group: Images that are routed together, or `"batch"` for
            all; None means 8.
        hidden_dim: F of an expert; None means the dense MLP's.
        mlp_ratio: F / D of an expert, instead of `hidden_dim`.
        shared_hidden_dim: Hidden features of an expert that sees every token;
            None for no such expert. See `layers.SharedExpertMoEMLP`.
        dropout: Dropout rate inside the experts; None means the dense MLPs'.
        num_selected_experts: K of a top-K router.
        capacity_factor: Capacity of the experts relative to an even load, or
            `"dropless"`.
        batch_priority: Whether a top-K router serves confident tokens first.
        renormalize: Whether a top-K router divides the combine weights of a
            token by their sum.
        num_slots: Slots per expert of a soft router.
        update_rate: Change of a `bias_balanced` router's bias per step.
        noise_std: Standard deviation of the logits' noise in training, in
            units of `1 / E`.
        gate: `"linear"`, `"cosine"` or `"l2"`, or an unbuilt layer from tokens
            to logits, which serves as a template like a router.
        importance_loss_weight: Weight of the importance loss.
        load_loss_weight: Weight of the load loss.
        gshard_loss_weight: Weight of GShard's balance loss.
        z_loss_weight: Weight of the router z-loss.
        local_entropy_loss_weight: Weight of LIMoE's local entropy loss.
        global_entropy_loss_weight: Weight of LIMoE's global entropy loss.
        min_experts: Experts that the global entropy loss asks for.
    """

    layers: Any = "last_2"
    num_experts: int = 8
    router: Any = "top_k"
    images_per_group: int | Literal["batch"] | None = 8
    hidden_dim: int | None = None
    mlp_ratio: float | None = None
    shared_hidden_dim: int | None = None
    dropout: float | None = None
    num_selected_experts: int | None = None
    capacity_factor: float | Literal["dropless"] | None = None
    batch_priority: bool | None = None
    renormalize: bool | None = None
    num_slots: int | None = None
    update_rate: float | None = None
    noise_std: float | None = None
    gate: Any = None
    importance_loss_weight: float | None = None
    load_loss_weight: float | None = None
    gshard_loss_weight: float | None = None
    z_loss_weight: float | None = None
    local_entropy_loss_weight: float | None = None
    global_entropy_loss_weight: float | None = None
    min_experts: float | None = None

    def __post_init__(self) -> None:
        settings = self.router_settings()
        if None not in (self.hidden_dim, self.mlp_ratio):
            raise ValueError(
                "The hidden features of an expert are set or follow from "
                f"`mlp_ratio`. Received: hidden_dim={self.hidden_dim} together "
                f"with mlp_ratio={self.mlp_ratio}. Leave one of them out."
            )
        ratio = self.mlp_ratio
        if ratio is not None and (not is_number(ratio) or ratio <= 0):
            raise ValueError(
                "`mlp_ratio` must be a number above 0. "
                f"Received: mlp_ratio={ratio!r}. ConvNeXt has 4."
            )
        for name in PARTS:
            part = getattr(self, name)
            if isinstance(part, keras.layers.Layer) and part.built:
                raise ValueError(
                    f"A model makes a {name} for each of its MoE layers, with "
                    f"the settings of the given one. Received: {name}="
                    f"{part.name!r}, which has weights: they would not be "
                    f"used. Pass a new one, or `layers.MoEMLP(router=...)`."
                )
        if isinstance(self.router, keras.layers.Layer):
            if settings:
                both = [f"{key}={value!r}" for key, value in settings.items()]
                raise ValueError(
                    "A router object has its own settings. "
                    f"Received: router={self.router.name} together with "
                    f"{', '.join(both)}. Set these on the router, or name the "
                    "router by a string."
                )
        elif not isinstance(self.router, str) or self.router not in ROUTERS:
            raise ValueError(
                f"`router` must be one of {sorted(ROUTERS)} or a router "
                f"object. Received: router={self.router!r}."
                f"{nearest(self.router, ROUTERS)} "
                "Make a router object with, say, layers.TopKRouter(8)."
            )

    @classmethod
    def from_dict(cls, moe: "Mapping[str, Any] | MoEConfig") -> Self:
        """Makes a config from a dict, another config or a serialized one.

        Args:
            moe: Dict of this class's attributes, or a `MoEConfig`.

        Returns:
            A `MoEConfig`.

        Raises:
            ValueError: If a key or a router is unknown, or if a router is given
                together with settings that it holds itself.
        """
        if isinstance(moe, cls):
            return moe
        if not isinstance(moe, Mapping):
            raise ValueError(
                "`moe` must be a dict such as "
                "dict(layers='last_2', num_experts=8). "
                f"Received: moe={moe!r}."
            )
        moe = {name: plain(value) for name, value in moe.items()}
        known = [field.name for field in dataclasses.fields(cls)]
        check_keys("`moe`", moe, known)
        for name in PARTS:
            if isinstance(moe.get(name), dict):
                # A Keras layer may come with `class_name` and `config` alone.
                part = {"module": "keras.layers", **moe[name]}
                try:
                    moe[name] = keras.layers.deserialize(part)
                except (TypeError, ValueError) as error:
                    raise ValueError(
                        f"`{name}` must be a layer, or the dict that "
                        "`keras.layers.serialize` makes of one. Received: "
                        f"{name}={moe[name]!r}."
                    ) from error
        if isinstance(moe.get("router"), keras.layers.Layer):
            moe.setdefault("num_experts", moe["router"].num_experts)
        return cls(**moe)

    def to_dict(self) -> dict[str, Any]:
        """Returns a dict for `from_dict` and JSON."""
        config = {
            x.name: getattr(self, x.name) for x in dataclasses.fields(self)
        }
        for name in PARTS:
            if isinstance(config[name], keras.layers.Layer):
                part = keras.saving.serialize_keras_object(config[name])
                config[name] = part
        if not isinstance(self.layers, str):
            config["layers"] = list(self.layers)
        return config

    def router_settings(self) -> dict[str, Any]:
        """Returns the router's settings that differ from None."""
        settings = {key: getattr(self, key) for key in ROUTER_FIELDS}
        return {k: v for k, v in settings.items() if v is not None}

    def make_layer(
        self,
        block: int,
        features: int,
        hidden_dim: int,
        name: str,
        num_selected_experts: int,
        ensemble_size: int | None = None,
        **kwargs: Any,
    ) -> moe_layers.MoEMLP:
        """Makes a new MoE layer.

        Args:
            block: Index of the layer's block.
            features: D.
            hidden_dim: Hidden features of the MLP that the layer replaces.
            name: Name of the layer.
            num_selected_experts: K, if this config does not set it.
            ensemble_size: Members of an ensemble; None for no ensemble.
            **kwargs: `activation`, `dropout` and `dtype` of the layer.

        Returns:
            A `layers.MoEMLP`.
        """
        if self.hidden_dim is not None:
            hidden_dim = self.hidden_dim
        elif self.mlp_ratio is not None:
            hidden_dim = round(self.mlp_ratio * features)
        dtype = kwargs["dtype"]
        arguments = {
            "num_experts": self.num_experts,
            "hidden_dim": hidden_dim,
            "router": self.make_router(
                block, num_selected_experts, dtype, ensemble_size
            ),
            "images_per_group": self.images_per_group,
            "name": name,
            **kwargs,
        }
        if self.dropout is not None:
            arguments["dropout"] = self.dropout
        if self.shared_hidden_dim is None:
            return moe_layers.MoEMLP(**arguments)
        return moe_layers.SharedExpertMoEMLP(
            shared_hidden_dim=self.shared_hidden_dim, **arguments
        )

    def make_router(
        self,
        block: int,
        num_selected_experts: int,
        dtype: Any,
        ensemble_size: int | None = None,
    ) -> keras.layers.Layer:
        """Makes a new router for one layer.

        Args:
            block: Index of the layer's block. A router with a seed is copied
                with `seed + block`, so that no two layers draw the same noise.
            num_selected_experts: K, if this config does not set it.
            dtype: Dtype policy of the layer.
            ensemble_size: Members of an ensemble; None for no ensemble.

        Returns:
            A router.

        Raises:
            ValueError: If the router has no such setting.
        """
        if ensemble_size is not None and self.router != "top_k":
            raise ValueError(
                "The members of an ensemble are routed by a top-K router. "
                f"Received: ensemble_size={ensemble_size} with router="
                f"{self.router!r}. Leave one of them out."
            )
        if isinstance(self.router, keras.layers.Layer):
            config = self.router.get_config()
            if config["seed"] is not None:
                config["seed"] += block
            return type(self.router).from_config(config)
        router = ROUTERS[self.router]
        settings = self.router_settings()
        if ensemble_size is not None:
            router = moe_layers.EnsembleRouter
            settings["ensemble_size"] = ensemble_size
        if isinstance(self.gate, keras.layers.Layer):
            settings["gate"] = type(self.gate).from_config(
                self.gate.get_config()
            )
        if issubclass(router, moe_layers.TopKRouter):
            settings.setdefault("num_selected_experts", num_selected_experts)
        return router(self.num_experts, dtype=dtype, name="router", **settings)


PARTS = ("router", "gate")  # May be layers, as templates.
ROUTER_FIELDS = (
    "num_selected_experts",
    "capacity_factor",
    "batch_priority",
    "renormalize",
    "num_slots",
    "update_rate",
    "noise_std",
    "gate",
    "importance_loss_weight",
    "load_loss_weight",
    "gshard_loss_weight",
    "z_loss_weight",
    "local_entropy_loss_weight",
    "global_entropy_loss_weight",
    "min_experts",
)


def of_version_0_1(moe):
    """Converts the `moe` dict of version 0.1.0 to today's settings."""
    moe = dict(moe)
    factor = moe.get("capacity_factor", "auto")
    moe["capacity_factor"] = {"auto": None, None: "dropless"}.get(
        factor, factor
    )
    if moe.get("images_per_group", 8) is None:
        moe["images_per_group"] = "batch"
    return moe
