"""Model sizes: their defaults, and which are set."""

import dataclasses
import typing
from typing import TYPE_CHECKING
from typing import Any

from keras_vmoe.models import ConvNeXtMoE
from keras_vmoe.models import MoEConfig
from keras_vmoe.models import SwinMoE
from keras_vmoe.models import ViTMoE
from keras_vmoe.training import typed

# The defaults of sizes that no setting, preset or file provides.
VIT_SIZES = {
    "patch_size": 8,
    "hidden_dim": 64,
    "num_layers": 4,
    "num_heads": 4,
    "mlp_dim": 128,
    "pooling": "gap",
    "position_embedding": "learned",
    "representation_size": None,
    "num_registers": None,
    "qk_norm": False,
    "ensemble_size": None,
    "dropout": 0.0,
    "layer_scale_init_value": None,
    "activation": "gelu_tanh",
}
CONVNEXT_SIZES = {
    "depths": (2, 2, 2),
    "dims": (32, 64, 128),
    "patch_size": 2,
    "isotropic": False,
    "mlp_ratio": 4,
    "layer_scale_init_value": None,
    "activation": "gelu",
}
SWIN_SIZES = {
    "depths": (2, 2),
    "dims": (32, 64),
    "num_heads": (2, 4),
    "window_size": 4,
    "pretrained_window_sizes": None,
    "patch_size": 2,
    "mlp_ratio": 4,
    "layer_scale_init_value": None,
    "activation": "gelu",
}
SIZES = {"vit": VIT_SIZES, "convnext": CONVNEXT_SIZES, "swin": SWIN_SIZES}
MODELS = {"vit": ViTMoE, "convnext": ConvNeXtMoE, "swin": SwinMoE}
# The attributes of a `MoEConfig`; those that are not set are None.
if TYPE_CHECKING:

    class MoESettings:  # noqa: D101
        def __init__(self, **settings: Any) -> None: ...

        def __getattr__(self, name: str) -> Any: ...
else:
    MoESettings = dataclasses.make_dataclass(
        "MoESettings",
        [
            (name, kind | None if kind is not Any else Any, None)
            for name, kind in typing.get_type_hints(MoEConfig).items()
        ],
        namespace={"__doc__": MoEConfig.__doc__, "__module__": __name__},
        frozen=True,
    )


@dataclasses.dataclass(frozen=True)
class ConvNeXtConfig:
    """The dense part of a `ConvNeXtMoE`; attributes are its arguments.

    One that is None is as in `ModelConfig`.

    Attributes:
        depths: Blocks of each stage.
        dims: Features of each stage.
        patch_size: Side of a patch of the stem, in pixels.
        isotropic: Whether there is one stage, without downsampling.
        mlp_ratio: Hidden features of the MLPs, relative to the stage's.
        layer_scale_init_value: Initial value of the layer scale.
        activation: Of MLPs and experts.
    """

    depths: tuple[int, ...] | None = None
    dims: tuple[int, ...] | None = None
    patch_size: int | None = None
    isotropic: bool | None = None
    mlp_ratio: int | None = None
    layer_scale_init_value: float | None = None
    activation: str | None = None

    def __post_init__(self) -> None:
        typed.check_types(self, "convnext.")


@dataclasses.dataclass(frozen=True)
class SwinConfig:
    """The dense part of a `SwinMoE`; attributes are its arguments.

    One that is None is as in `ModelConfig`.

    Attributes:
        depths: Blocks of each stage.
        dims: Features of each stage.
        num_heads: Attention heads of each stage.
        window_size: Side of a window, in positions.
        pretrained_window_sizes: Sides that position biases were trained with.
        patch_size: Side of a patch of the stem, in pixels.
        mlp_ratio: Hidden features of the MLPs, relative to the stage's.
        layer_scale_init_value: Initial value of the layer scale.
        activation: Of MLPs and experts.
    """

    depths: tuple[int, ...] | None = None
    dims: tuple[int, ...] | None = None
    num_heads: tuple[int, ...] | None = None
    window_size: int | None = None
    pretrained_window_sizes: tuple[int, ...] | None = None
    patch_size: int | None = None
    mlp_ratio: int | None = None
    layer_scale_init_value: float | None = None
    activation: str | None = None

    def __post_init__(self) -> None:
        typed.check_types(self, "swin.")


def family_of(model_class):
    """Returns `"vit"`, `"convnext"` or `"swin"`."""
    return next(name for name, x in MODELS.items() if x is model_class)


def given(settings):
    """Returns the attributes of a dataclass that are not None."""
    names = [field.name for field in dataclasses.fields(settings)]
    values = {name: getattr(settings, name) for name in names}
    return {name: x for name, x in values.items() if x is not None}
