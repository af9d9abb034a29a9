"""What a router did in training: means over the steps since a reset."""

import keras
import numpy as np
from keras import ops


class RoutingStatistics:
    """Running means of a router's load, dropped share and auxiliary loss.

    One small variable, updated inside the compiled training step without any
    transfer to the host, and read between steps.

    Args:
        num_experts: E.
    """

    def __init__(self, num_experts):
        self.num_experts = num_experts
        # Steps, auxiliary loss, dropped share, load share of each expert. With
        # several replicas each keeps its own, read as their mean.
        self.state = keras.Variable(
            np.zeros(3 + num_experts, "float32"),
            trainable=False,
            dtype="float32",
            autocast=False,
            aggregation="mean",
            synchronization="on_read",
            name="routing_statistics",
        )

    def update(self, plan, loss):
        """Takes one step into the means.

        Args:
            plan: The routing plan of the step.
            loss: Scalar tensor, the router's weighted auxiliary loss.
        """
        new = ops.concatenate(
            [
                ops.stop_gradient(ops.reshape(loss, (1,))),
                ops.reshape(plan.dropped_share(), (1,)),
                plan.load_share(),
            ]
        )
        steps, mean = self.state[:1] + 1.0, self.state[1:]
        self.state.assign(ops.concatenate([steps, mean + (new - mean) / steps]))

    def reset(self):
        """Forgets all steps."""
        self.state.assign(np.zeros(3 + self.num_experts, "float32"))

    def result(self):
        """The means, on the host.

        Returns:
            A dict with `auxiliary_loss` and `dropped_share`, floats, and
            `load_share`, a numpy array `(E,)`; None if no step was taken.
        """
        state = ops.convert_to_numpy(self.state.value)
        if state[0] == 0:
            return None
        return {
            "auxiliary_loss": float(state[1]),
            "dropped_share": float(state[2]),
            "load_share": state[3:],
        }
