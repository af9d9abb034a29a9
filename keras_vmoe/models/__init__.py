"""The models of the papers, as functional Keras models."""

from keras_vmoe.models.adapting import features
from keras_vmoe.models.adapting import with_head
from keras_vmoe.models.adapting import with_image_size
from keras_vmoe.models.convnext import ConvNeXtMoE
from keras_vmoe.models.costs import Cost
from keras_vmoe.models.costs import cost
from keras_vmoe.models.moe import MoEConfig
from keras_vmoe.models.presets import from_preset
from keras_vmoe.models.presets import presets
from keras_vmoe.models.routing_dial import set_routing
from keras_vmoe.models.saving import load
from keras_vmoe.models.saving import save
from keras_vmoe.models.swin import SwinMoE
from keras_vmoe.models.upcycling import upcycle
from keras_vmoe.models.vit import ViTMoE

__all__ = [
    "ConvNeXtMoE",
    "Cost",
    "MoEConfig",
    "SwinMoE",
    "ViTMoE",
    "cost",
    "features",
    "from_preset",
    "load",
    "presets",
    "save",
    "set_routing",
    "upcycle",
    "with_head",
    "with_image_size",
]
