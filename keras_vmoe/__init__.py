"""Sparse Mixture-of-Experts for vision, native to Keras 3."""

from keras_vmoe import _start  # noqa: F401  Before Keras.
from keras_vmoe import checkpoints
from keras_vmoe import data
from keras_vmoe import distribution
from keras_vmoe import evaluation
from keras_vmoe import export
from keras_vmoe import inspection
from keras_vmoe import layers
from keras_vmoe import losses
from keras_vmoe import models
from keras_vmoe import routing
from keras_vmoe import training
from keras_vmoe.version import __version__

__all__ = [
    "__version__",
    "checkpoints",
    "data",
    "distribution",
    "evaluation",
    "export",
    "inspection",
    "layers",
    "losses",
    "models",
    "routing",
    "training",
]
