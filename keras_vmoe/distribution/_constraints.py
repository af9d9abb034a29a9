"""Layout constraints on the buffers of an MoE layer, under `ExpertParallel`.

With constraints on both sides of the exchange between groups and experts, XLA
compiles it to an all-to-all; with one alone, it would gather experts' weights.

Axes: G groups, E experts, C slots of a buffer, D features.
"""

import keras

from keras_vmoe.distribution.expert_parallel import DATA
from keras_vmoe.distribution.expert_parallel import EXPERT
from keras_vmoe.distribution.expert_parallel import REPLICA
from keras_vmoe.distribution.expert_parallel import ExpertParallel


def by_groups(buffers):
    """Keeps the buffers `(G, E, C, D)` of a group where its images are."""
    parallel = _expert_parallel()
    if parallel is None:
        return buffers
    groups = buffers.shape[0]
    if groups is None or groups % parallel.num_devices:
        raise ValueError(
            "Each device must get a whole number of groups of images. "
            f"Received: {groups} groups for {parallel.num_devices} devices. "
            "Choose a batch size that is a multiple of `images_per_group` "
            "times the number of devices, or a smaller `images_per_group`."
        )
    return _constrained(parallel, buffers, DATA)


def by_experts(buffers):
    """Moves the buffers `(E, G, C, D)` of an expert to its weights."""
    parallel = _expert_parallel()
    if parallel is None:
        return buffers
    return _constrained(parallel, buffers, EXPERT, REPLICA)


def check_buffers(name):
    """Raises under `ExpertParallel`, for a layer without buffers."""
    if _expert_parallel() is not None:
        raise ValueError(
            "Under `ExpertParallel` tokens travel in buffers of fixed "
            f"capacity. Received: dropless routing in {name!r}. Set a capacity "
            "factor, or use distribution.DataParallel."
        )


def _expert_parallel():
    distribution = keras.distribution.distribution()
    is_ours = isinstance(distribution, ExpertParallel)
    return distribution if is_ours else None


def _constrained(parallel, x, *axes):
    rest = [None] * (len(x.shape) - len(axes))
    return keras.distribution.distribute_tensor(
        x, parallel.layout(*axes, *rest)
    )
