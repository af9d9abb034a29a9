"""From one device to many, without a change to the model.

Layers call the constraints of this room on their buffers; outside of
`ExpertParallel` they do nothing.
"""

from keras_vmoe.distribution.constraints import by_experts
from keras_vmoe.distribution.constraints import by_groups
from keras_vmoe.distribution.constraints import check_buffers
from keras_vmoe.distribution.expert_parallel import ExpertParallel

__all__ = ["ExpertParallel", "by_experts", "by_groups", "check_buffers"]
