"""The sizes of models: their defaults, and which are set."""

import dataclasses
import typing
from typing import Any

from keras_vmoe.models import ConvNeXtMoE
from keras_vmoe.models import MoEConfig
from keras_vmoe.models import SwinMoE
from keras_vmoe.models import ViTMoE

# The sizes of a model that are neither set nor those of a preset or a file.
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
# The attributes of a `MoEConfig`; None is what is not set.
MoESettings = dataclasses.make_dataclass(
    "MoESettings",
    [
        (name, kind | None if kind is not Any else Any, None)
        for name, kind in typing.get_type_hints(MoEConfig).items()
    ],
    namespace={"__doc__": MoEConfig.__doc__, "__module__": __name__},
    frozen=True,
)


def family_of(model_class):
    """`"vit"`, `"convnext"` or `"swin"`."""
    return next(name for name, x in MODELS.items() if x is model_class)


def given(settings):
    """The attributes of a dataclass that are not None."""
    names = [field.name for field in dataclasses.fields(settings)]
    values = {name: getattr(settings, name) for name in names}
    return {name: x for name, x in values.items() if x is not None}
