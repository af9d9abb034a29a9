"""Models for servers and devices: SavedModel, ONNX, LiteRT."""

from keras_vmoe.export.check import Check
from keras_vmoe.export.check import check
from keras_vmoe.export.check import report
from keras_vmoe.export.litert import litert
from keras_vmoe.export.onnx import onnx
from keras_vmoe.export.saved_model import saved_model
from keras_vmoe.export.settings import Preprocessing
from keras_vmoe.export.settings import Signature

__all__ = [
    "Check",
    "Preprocessing",
    "Signature",
    "check",
    "litert",
    "onnx",
    "report",
    "saved_model",
]
