"""Models of the papers, as functional Keras models."""

from keras_vmoe.models.moe import MoEConfig
from keras_vmoe.models.placement import moe_blocks
from keras_vmoe.models.vit import ViTMoE

__all__ = ["MoEConfig", "ViTMoE", "moe_blocks"]
