"""Training on many devices, without changes to the model.

Layers apply this package's constraints to their buffers; without
`ExpertParallel` they do nothing.
"""

from keras_vmoe.distribution._processes import initialize
from keras_vmoe.distribution.data_parallel import DataParallel
from keras_vmoe.distribution.expert_parallel import ExpertParallel
from keras_vmoe.distribution.prediction import predict
from keras_vmoe.distribution.strategies import resolve

__all__ = [
    "DataParallel",
    "ExpertParallel",
    "initialize",
    "predict",
    "resolve",
]
