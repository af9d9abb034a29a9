"""Exchanges an MoE layer's buffers between devices, for `ExpertParallel`.

With constraints on both sides of the exchange between groups and experts, XLA
compiles it to an all-to-all; with only one, it would gather experts' weights.
"""

import keras

from keras_vmoe.distribution.expert_parallel import DATA
from keras_vmoe.distribution.expert_parallel import EXPERT
from keras_vmoe.distribution.expert_parallel import REPLICA
from keras_vmoe.distribution.expert_parallel import ExpertParallel


def exchanged(bank, buffers):
    """Applies a bank to buffers that travel to its weights and back.

    Args:
        bank: Function from `(G, E, C, D)` buffers to the same shape.
        buffers: `(G, E, C, D)` tensor; each group is where its images are.

    Returns:
        `(G, E, C, D)` tensor, laid out like the buffers.
    """
    parallel = _expert_parallel()
    if parallel is None:
        return bank(buffers)
    groups = buffers.shape[0]
    if groups is None or groups % parallel.num_devices:
        raise ValueError(
            "Each device must get a whole number of groups of images. "
            f"Received: {groups} groups for {parallel.num_devices} devices. "
            "Choose a batch size that is a multiple of `images_per_group` "
            "times the number of devices, or a smaller `images_per_group`."
        )

    def constrain(x, *axes):
        rest = [None] * (len(x.shape) - len(axes))
        layout = parallel.layout(*axes, *rest)
        return keras.distribution.distribute_tensor(x, layout)

    x = constrain(constrain(buffers, DATA), REPLICA, EXPERT)
    return constrain(constrain(bank(x), REPLICA, EXPERT), DATA)


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
