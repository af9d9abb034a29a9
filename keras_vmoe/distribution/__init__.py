"""From one device to many, without a change to the model.

Layers call the constraints of this room on their buffers; outside of
`ExpertParallel` they do nothing.
"""

from keras_vmoe.distribution.constraints import by_experts
from keras_vmoe.distribution.constraints import by_groups
from keras_vmoe.distribution.constraints import check_buffers
from keras_vmoe.distribution.data_parallel import DataParallel
from keras_vmoe.distribution.expert_parallel import ExpertParallel
from keras_vmoe.distribution.prediction import predict
from keras_vmoe.distribution.processes import check_agreement
from keras_vmoe.distribution.processes import gathered
from keras_vmoe.distribution.processes import initialize
from keras_vmoe.distribution.processes import is_first_process
from keras_vmoe.distribution.processes import num_processes
from keras_vmoe.distribution.processes import process_id
from keras_vmoe.distribution.processes import smallest
from keras_vmoe.distribution.processes import variables_of
from keras_vmoe.distribution.software import versions
from keras_vmoe.distribution.strategies import check_batch
from keras_vmoe.distribution.strategies import check_groups
from keras_vmoe.distribution.strategies import num_replicas
from keras_vmoe.distribution.strategies import of_sum
from keras_vmoe.distribution.strategies import replica_id
from keras_vmoe.distribution.strategies import resolve

__all__ = [
    "DataParallel",
    "ExpertParallel",
    "by_experts",
    "by_groups",
    "check_agreement",
    "check_batch",
    "check_buffers",
    "check_groups",
    "gathered",
    "initialize",
    "is_first_process",
    "num_processes",
    "num_replicas",
    "of_sum",
    "predict",
    "process_id",
    "replica_id",
    "resolve",
    "smallest",
    "variables_of",
    "versions",
]
