"""Readers of other people's weights."""

from keras_vmoe.checkpoints.architecture import vmoe_config
from keras_vmoe.checkpoints.files import CheckpointError
from keras_vmoe.checkpoints.keras_applications import load_keras_applications
from keras_vmoe.checkpoints.orbax import read_orbax
from keras_vmoe.checkpoints.reading import read
from keras_vmoe.checkpoints.sharded import read_vmoe
from keras_vmoe.checkpoints.vit_npz import load_vit_npz
from keras_vmoe.checkpoints.vit_npz import read_vit_npz
from keras_vmoe.checkpoints.vmoe import load_vmoe

__all__ = [
    "CheckpointError",
    "load_keras_applications",
    "load_vit_npz",
    "load_vmoe",
    "read",
    "read_orbax",
    "read_vit_npz",
    "read_vmoe",
    "vmoe_config",
]
