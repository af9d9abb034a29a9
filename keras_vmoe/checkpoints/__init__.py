"""Readers of other people's weights."""

from keras_vmoe.checkpoints.vmoe import load_vmoe

__all__ = ["load_vmoe"]
