"""Training: typed configurations, callbacks and the loop around `fit`."""

from keras_vmoe.training import callbacks
from keras_vmoe.training import optimizers
from keras_vmoe.training import recipes
from keras_vmoe.training.config import CheckpointConfig
from keras_vmoe.training.config import DataConfig
from keras_vmoe.training.config import DevicesConfig
from keras_vmoe.training.config import ModelConfig
from keras_vmoe.training.config import OptimizerConfig
from keras_vmoe.training.config import TrainConfig
from keras_vmoe.training.description import describe
from keras_vmoe.training.initialization import restore
from keras_vmoe.training.loop import RunResult
from keras_vmoe.training.loop import train
from keras_vmoe.training.sizes import ConvNeXtConfig
from keras_vmoe.training.sizes import SwinConfig

__all__ = [
    "CheckpointConfig",
    "ConvNeXtConfig",
    "DataConfig",
    "DevicesConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunResult",
    "SwinConfig",
    "TrainConfig",
    "callbacks",
    "describe",
    "optimizers",
    "recipes",
    "restore",
    "train",
]
