"""From one device to many, without a change to the model.

Layers call the constraints of this room on their buffers; outside of
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
