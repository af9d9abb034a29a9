"""Models of the papers, as functional Keras models."""

from keras_vmoe.models.moe import MoEConfig
from keras_vmoe.models.placement import moe_blocks
from keras_vmoe.models.routing_dial import set_routing
from keras_vmoe.models.saving import load
from keras_vmoe.models.saving import save
from keras_vmoe.models.vit import ViTMoE

__all__ = ["MoEConfig", "ViTMoE", "load", "moe_blocks", "save", "set_routing"]
