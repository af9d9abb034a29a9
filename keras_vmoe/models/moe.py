"""What a model needs to know to make its MoE layers."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import keras

from keras_vmoe import layers as moe_layers

ROUTERS = {"top_k": moe_layers.TopKRouter}


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """The `moe` argument of the models, checked.

    Users write a dict; `from_dict` checks its keys.

    Attributes:
        layers: Placement; see `models.moe_blocks`.
        num_experts: E.
        router: `"top_k"`, or a router whose copies, one per layer, are used as
            they are. With a router, the four fields of `ROUTER_FIELDS` must be
            set on the router instead.
        num_selected_experts: K.
        capacity_factor: Room of the experts relative to an even load.
        batch_priority: Whether confident tokens are served first.
        noise_std: Standard deviation of the logits' noise in training, in
            units of `1 / E`.
        images_per_group: Images that are routed together; None for all.
        hidden_dim: F of an expert; None means the model's `mlp_dim`.
    """

    layers: Any = "last_2"
    num_experts: int = 8
    router: Any = "top_k"
    num_selected_experts: int = 2
    capacity_factor: float = 1.05
    batch_priority: bool = False
    noise_std: float = 1.0
    images_per_group: int | None = 8
    hidden_dim: int | None = None

    @classmethod
    def from_dict(cls, moe):
        """Makes a config of a dict, another config, or a serialized one.

        Args:
            moe: Dict of this class's attributes, or a `MoEConfig`.

        Returns:
            A `MoEConfig`.

        Raises:
            ValueError: If a key is unknown, or if a router is given together
                with settings that it holds itself.
        """
        if isinstance(moe, cls):
            return moe
        if not isinstance(moe, Mapping):
            raise ValueError(
                "`moe` must be None or a dict such as "
                "dict(layers='last_2', num_experts=8). "
                f"Received: moe={moe!r}."
            )
        moe = dict(moe)
        known = [field.name for field in dataclasses.fields(cls)]
        for key in moe:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"`moe` takes the keys {known}. "
                    f"Received: {key}={moe[key]!r}.{hint}"
                )
        if isinstance(moe.get("router"), dict):
            router = keras.saving.deserialize_keras_object(moe["router"])
            moe["router"] = router
        if isinstance(moe.get("router"), keras.layers.Layer):
            cls._check_router(moe)
        return cls(**moe)

    @classmethod
    def _check_router(cls, moe):
        both = [key for key in ROUTER_FIELDS if key in moe]
        if both:
            raise ValueError(
                "A router object brings its own settings. "
                f"Received: router={moe['router'].name} together with "
                f"{', '.join(f'{key}={moe[key]!r}' for key in both)}. "
                "Set these on the router, or name the router by a string."
            )
        moe.setdefault("num_experts", moe["router"].num_experts)

    def to_dict(self):
        """A dict that `from_dict` and JSON take."""
        config = dataclasses.asdict(dataclasses.replace(self, router=None))
        config["router"] = self.router
        if isinstance(self.router, keras.layers.Layer):
            router = keras.saving.serialize_keras_object(self.router)
            config["router"] = router
            for key in ROUTER_FIELDS:
                del config[key]
        if not isinstance(self.layers, str):
            config["layers"] = list(self.layers)
        return config

    def make_router(self, block, dtype):
        """A new router for one layer.

        Args:
            block: Index of the layer's block. A router with a seed is copied
                with `seed + block`, so that no two layers draw the same noise.
            dtype: Dtype policy of the layer.

        Returns:
            A router.

        Raises:
            ValueError: If the router's name is unknown.
        """
        if isinstance(self.router, keras.layers.Layer):
            config = self.router.get_config()
            if config["seed"] is not None:
                config["seed"] += block
            return type(self.router).from_config(config)
        if self.router not in ROUTERS:
            raise ValueError(
                f"`router` must be one of {sorted(ROUTERS)} or a router "
                f"object. Received: router={self.router!r}. "
                "A router object is made by, say, layers.TopKRouter(8)."
            )
        settings = {key: getattr(self, key) for key in ROUTER_FIELDS}
        return ROUTERS[self.router](
            self.num_experts, dtype=dtype, name="router", **settings
        )


ROUTER_FIELDS = (
    "num_selected_experts",
    "capacity_factor",
    "batch_priority",
    "noise_std",
)
