"""Models for servers and devices: SavedModel, ONNX, LiteRT."""

from keras_vmoe.export.conversion import litert
from keras_vmoe.export.conversion import onnx
from keras_vmoe.export.saved_model import saved_model
from keras_vmoe.export.settings import Signature

__all__ = [
    "Signature",
    "litert",
    "onnx",
    "saved_model",
]
