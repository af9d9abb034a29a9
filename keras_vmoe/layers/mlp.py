"""The dense MLP of a transformer block."""

import keras

from keras_vmoe._checks import check_sizes
from keras_vmoe.layers.activations import get_activation
from keras_vmoe.layers.activations import serialize_activation
from keras_vmoe.layers.stochastic import SeededDropout


@keras.saving.register_keras_serializable("keras_vmoe")
class MLP(keras.layers.Layer):
    """Two dense layers; the dense twin of one expert of `MoEMLP`.

    Args:
        hidden_dim: F, hidden features.
        activation: Activation between the layers. `"gelu"` is the exact one;
            `"gelu_tanh"` is that of V-MoE.
        dropout: Dropout rate behind each of the two layers, in `[0, 1]`.

    Call arguments:
        inputs: `(..., D)` float tensor.
        training: Whether to apply dropout.

    Returns:
        Tensor of the shape of `inputs`.

    Example:

    >>> MLP(hidden_dim=32)(keras.ops.ones((2, 5, 8))).shape
    (2, 5, 8)
    """

    def __init__(self, hidden_dim, activation="gelu", dropout=0.0, **kwargs):
        super().__init__(**kwargs)
        check_sizes(hidden_dim=hidden_dim)
        self.hidden_dim = int(hidden_dim)
        self.activation = get_activation(activation)
        self.dropout = dropout
        self.hidden_dense = self._dense(self.hidden_dim, "hidden")
        self.dropout_layer = SeededDropout(
            dropout, dtype=self.dtype_policy, name="dropout"
        )

    def _dense(self, units, name):
        return keras.layers.Dense(
            units,
            kernel_initializer="glorot_uniform",
            bias_initializer=keras.initializers.RandomNormal(stddev=1e-6),
            dtype=self.dtype_policy,
            name=name,
        )

    def build(self, input_shape):
        self.hidden_dense.build(input_shape)
        self.output_dense = self._dense(input_shape[-1], "output")
        self.output_dense.build((*input_shape[:-1], self.hidden_dim))

    def call(self, inputs, training=False):
        x = self.activation(self.hidden_dense(inputs))
        x = self.output_dense(self.dropout_layer(x, training=training))
        return self.dropout_layer(x, training=training)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {
            **super().get_config(),
            "hidden_dim": self.hidden_dim,
            "activation": serialize_activation(self.activation),
            "dropout": self.dropout,
        }
