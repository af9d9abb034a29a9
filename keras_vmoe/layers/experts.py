"""Experts: E networks of one shape, as stacked kernels."""

import keras
from keras import ops

from keras_vmoe._checks import check_sizes
from keras_vmoe.layers.block_linear import block_linear
from keras_vmoe.layers.mlp import TwoLayers
from keras_vmoe.layers.weights import for_each_expert
from keras_vmoe.layers.weights import get_options
from keras_vmoe.routing._blocks import Blocks


@keras.saving.register_keras_serializable("keras_vmoe")
class MLPExperts(TwoLayers):
    """E two-layer MLPs, each applied to its own buffer.

    Every expert is initialised, regularised and constrained as if it were
    alone: Keras would take the stacked kernel `(E, D, F)` for that of a
    convolution and make it √E too small.

    Args:
        num_experts: E.
        hidden_dim: F, hidden features of one expert.
        activation: Activation between the layers.
        dropout: Dropout rate after each of the two layers, in `[0, 1]`.
        **kwargs: Initializers, regularizers, constraints and `seed`, as of
            `MLP`; that of a kernel is called with the shape of one expert.

    Call arguments:
        buffers: `(G, E, C, D)` float tensor, or the blocks of
            `routing.dropless_plan`.
        training: Whether to apply dropout.

    Returns:
        What `buffers` are, after the MLPs.

    Raises:
        ValueError: If a size is below 1, or if the buffers are of another
            number of experts.

    Example:

    >>> experts = MLPExperts(num_experts=4, hidden_dim=32)
    >>> experts(keras.ops.ones((2, 4, 3, 8))).shape
    (2, 4, 3, 8)
    """

    takes_blocks = True  # Dropless buffers as well.

    def __init__(
        self, num_experts, hidden_dim, activation="gelu", dropout=0.0, **kwargs
    ):
        super().__init__(hidden_dim, activation, dropout, **kwargs)
        check_sizes(num_experts=num_experts)
        self.num_experts = int(num_experts)

    def build(self, input_shape):
        if len(input_shape) != 4 or input_shape[1] != self.num_experts:
            raise ValueError(
                "Experts take buffers of shape (groups, experts, capacity, "
                f"features) with {self.num_experts} experts. "
                f"Received: input_shape={tuple(input_shape)}. "
                "`plan.dispatch(tokens)` makes such buffers."
            )
        features = input_shape[-1]
        # The indices of an `MLP` are 0 and 1: it may be beside, with one seed.
        self._add_layer("hidden", features, self.hidden_dim, 2)
        self._add_layer("output", self.hidden_dim, features, 3)

    def _add_layer(self, name, fan_in, fan_out, index):
        kernel = self.add_weight(
            name=f"{name}_kernel",
            shape=(self.num_experts, fan_in, fan_out),
            **for_each_expert(**get_options(self, "kernel", index)),
        )
        bias = self.add_weight(
            name=f"{name}_bias",
            shape=(self.num_experts, fan_out),
            **for_each_expert(**get_options(self, "bias", index)),
        )
        setattr(self, f"{name}_kernel", kernel)
        setattr(self, f"{name}_bias", bias)

    def call(self, buffers, training=False):
        if isinstance(buffers, Blocks):
            rows, *blocks = buffers
            return buffers._replace(rows=self._mlps(rows, blocks, training))
        groups, _, capacity, features = ops.shape(buffers)
        # One batched matmul over E, whatever the number of groups.
        x = _swap_groups_and_experts(buffers)  # (E, G, C, D)
        shape = (self.num_experts, groups * capacity, features)
        x = self._mlps(ops.reshape(x, shape), (), training)
        x = ops.reshape(x, (self.num_experts, groups, capacity, features))
        return _swap_groups_and_experts(x)

    def _mlps(self, x, blocks, training):
        """One MLP for each block of rows; see `block_linear`."""
        x = block_linear(x, self.hidden_kernel, self.hidden_bias, *blocks)
        x = self.dropout_layer(self.activation(x), training=training)
        x = block_linear(x, self.output_kernel, self.output_bias, *blocks)
        return self.dropout_layer(x, training=training)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "num_experts": self.num_experts}


def _swap_groups_and_experts(x):
    """Swaps the first two axes; a reshape where one of them is 1."""
    first, second, *rest = ops.shape(x)
    if 1 in (x.shape[0], x.shape[1]):
        return ops.reshape(x, (second, first, *rest))
    return ops.transpose(x, (1, 0, 2, 3))
