"""Loading pretrained weights: V-MoE, ViT, ConvNeXt, Swin-MoE."""

from keras_vmoe.checkpoints.architecture import convnext_config
from keras_vmoe.checkpoints.architecture import swin_config
from keras_vmoe.checkpoints.architecture import vmoe_config
from keras_vmoe.checkpoints.files import CheckpointError
from keras_vmoe.checkpoints.keras_applications import load_keras_applications
from keras_vmoe.checkpoints.reading import load
from keras_vmoe.checkpoints.reading import read
from keras_vmoe.checkpoints.sharded import read_vmoe
from keras_vmoe.checkpoints.vmoe import load_vmoe
from keras_vmoe.layers.positions import resize_positions

__all__ = [
    "CheckpointError",
    "convnext_config",
    "load",
    "load_keras_applications",
    "load_vmoe",
    "read",
    "read_vmoe",
    "resize_positions",
    "swin_config",
    "vmoe_config",
]
