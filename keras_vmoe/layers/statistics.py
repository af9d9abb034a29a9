"""Routing statistics of training: means over the steps since a reset."""

import keras
import numpy as np
from keras import ops

from keras_vmoe import losses

SCALARS = (
    "auxiliary_loss",
    "dropped_share",
    "gate_entropy",
    "importance_cv2",
    "experts_per_image",
)


class RoutingStatistics:
    """Running means of a router's load, losses and gates in training.

    One small variable, updated inside the compiled training step without any
    transfer to the host, and read between steps.

    Args:
        num_experts: E.
    """

    def __init__(self, num_experts):
        self.num_experts = num_experts
        # Steps, the scalars, the load share of each expert. Each replica keeps
        # its own; reading gives their mean.
        self.state = keras.Variable(
            "zeros",
            shape=(1 + len(SCALARS) + num_experts,),
            trainable=False,
            dtype="float32",
            autocast=False,
            aggregation="mean",
            synchronization="on_read",
            name="routing_statistics",
        )

    def update(self, plan, loss, gates, mask, images_per_group):
        """Adds one step to the means.

        Args:
            plan: The routing plan of the step.
            loss: Scalar tensor, the router's weighted auxiliary loss.
            gates: `(G, S, E)` float32 tensor, without noise.
            mask: `(G, S)` bool tensor or None.
            images_per_group: Images that the tokens of a group belong to.
        """
        gates = ops.stop_gradient(gates)
        scalars = {
            "auxiliary_loss": ops.stop_gradient(loss),
            "dropped_share": plan.dropped_share(),
            "gate_entropy": gate_entropy(gates, mask),
            "importance_cv2": ops.mean(losses.importance_loss(gates, mask)),
            "experts_per_image": experts_per_image(
                plan, mask, images_per_group
            ),
        }
        scalars = ops.stack([scalars[name] for name in SCALARS])
        load = ops.stop_gradient(plan.load_share())
        new = ops.concatenate([scalars, load])
        steps, mean = self.state[:1] + 1.0, self.state[1:]
        self.state.assign(ops.concatenate([steps, mean + (new - mean) / steps]))

    def reset(self):
        """Forgets all steps."""
        self.state.assign(np.zeros(self.state.shape, "float32"))

    def result(self):
        """The means, on the host.

        Returns:
            A dict with the `SCALARS` as floats and `load_share`, an `(E,)`
            numpy array; None before the first step.
        """
        state = ops.convert_to_numpy(self.state.value)
        if state[0] == 0:
            return None
        scalars = map(float, state[1 : 1 + len(SCALARS)])
        return {
            **dict(zip(SCALARS, scalars, strict=True)),
            "load_share": state[1 + len(SCALARS) :],
        }


def gate_entropy(gates, mask=None):
    """Mean entropy of the tokens' gates, a scalar in nats, in `[0, log E]`.

    Args:
        gates: `(G, S, E)` float tensor, sum 1 over E.
        mask: Optional `(G, S)` bool tensor, False for tokens to ignore.
    """
    entropy = -ops.sum(gates * ops.log(ops.maximum(gates, 1e-30)), axis=-1)
    if mask is None:
        return ops.mean(entropy)
    entropy = ops.where(mask, entropy, ops.zeros_like(entropy))
    kept = ops.sum(ops.cast(mask, entropy.dtype))
    return ops.divide_no_nan(ops.sum(entropy), kept)


def experts_per_image(plan, mask, images_per_group):
    """Mean share of the experts that an image uses, a scalar in `[0, 1]`.

    Args:
        plan: A routing plan of `(G, S)` tokens.
        mask: `(G, S)` bool tensor or None.
        images_per_group: Images per group.
    """
    used = ops.cast(plan.experts_of_images(images_per_group), "float32")
    share = ops.mean(used, axis=-1)  # (G, images)
    if mask is None:
        return ops.mean(share)
    groups, num_tokens = ops.shape(mask)
    shape = (groups, images_per_group, num_tokens // images_per_group)
    exists = ops.any(ops.reshape(mask, shape), axis=-1)
    exists = ops.cast(exists, "float32")
    return ops.divide_no_nan(ops.sum(share * exists), ops.sum(exists))
