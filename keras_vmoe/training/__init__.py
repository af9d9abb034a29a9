"""Training: typed configurations, callbacks and the loop around `fit`."""

from keras_vmoe.training import callbacks
from keras_vmoe.training import optimizers
from keras_vmoe.training import recipes
from keras_vmoe.training.config import ConvNeXtConfig
from keras_vmoe.training.config import TrainConfig
from keras_vmoe.training.config import ViTConfig
from keras_vmoe.training.description import describe
from keras_vmoe.training.loop import RunResult
from keras_vmoe.training.loop import train

__all__ = [
    "ConvNeXtConfig",
    "RunResult",
    "TrainConfig",
    "ViTConfig",
    "callbacks",
    "describe",
    "optimizers",
    "recipes",
    "train",
]
