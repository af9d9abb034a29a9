"""The dense MLP of a transformer block."""

from typing import Any

import keras

from keras_vmoe._checks import check_dropout
from keras_vmoe._checks import check_flags
from keras_vmoe._checks import check_sizes
from keras_vmoe._checks import plain
from keras_vmoe._typing import Activation
from keras_vmoe._typing import Config
from keras_vmoe._typing import Constraint
from keras_vmoe._typing import Initializer
from keras_vmoe._typing import Regularizer
from keras_vmoe._typing import Shape
from keras_vmoe._typing import Tensor
from keras_vmoe.layers.activations import get_activation
from keras_vmoe.layers.activations import serialize_activation
from keras_vmoe.layers.parts import KeepsParts
from keras_vmoe.layers.stochastic import SavesSeedState
from keras_vmoe.layers.stochastic import SeedGenerator
from keras_vmoe.layers.stochastic import drop
from keras_vmoe.layers.weights import BIAS_INITIALIZER
from keras_vmoe.layers.weights import get_options
from keras_vmoe.layers.weights import options_config
from keras_vmoe.layers.weights import set_options


class TwoLayers(SavesSeedState, KeepsParts, keras.layers.Layer):
    """The settings that `MLP` and `MLPExperts` share; see `MLP`."""

    def __init__(
        self,
        hidden_dim: int,
        activation: Activation = "gelu",
        dropout: float = 0.0,
        kernel_initializer: Initializer = "glorot_uniform",
        bias_initializer: Initializer | None = None,
        kernel_regularizer: Regularizer | None = None,
        bias_regularizer: Regularizer | None = None,
        kernel_constraint: Constraint | None = None,
        bias_constraint: Constraint | None = None,
        use_output_bias: bool = True,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_sizes(hidden_dim=hidden_dim)
        check_dropout(dropout=dropout)
        check_flags(use_output_bias=use_output_bias)
        self.use_output_bias = use_output_bias
        self.hidden_dim = int(hidden_dim)
        self.activation = get_activation(activation)
        self.dropout = dropout
        set_options(
            self,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer or BIAS_INITIALIZER,
            kernel_regularizer=kernel_regularizer,
            bias_regularizer=bias_regularizer,
            kernel_constraint=kernel_constraint,
            bias_constraint=bias_constraint,
        )
        self.seed = plain(seed)
        if dropout > 0:
            self.seed_generator = SeedGenerator(self.seed)

    def drop(self, x: Tensor, training: bool) -> Tensor:
        """Applies dropout without a layer: Keras only quantizes leaf layers."""
        rate = self.dropout if training else 0
        return drop(x, rate, self.seed_generator)

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "hidden_dim": self.hidden_dim,
            "activation": serialize_activation(self.activation),
            "dropout": self.dropout,
            **options_config(self, "kernel", "bias"),
            "use_output_bias": self.use_output_bias,
            "seed": self.seed,
        }


@keras.saving.register_keras_serializable("keras_vmoe")
class MLP(TwoLayers):
    """Two dense layers; the dense twin of one expert of `MoEMLP`.

    Args:
        hidden_dim: F, hidden features.
        activation: Activation between the layers. `"gelu"` is exact;
            `"gelu_tanh"` is V-MoE's.
        dropout: Dropout rate after each of the two layers, in `[0, 1]`.
        kernel_initializer: Initializer of both kernels.
        bias_initializer: Initializer of both biases; None means a normal
            distribution with a standard deviation of 1e-6, as in V-MoE.
        kernel_regularizer: Optional regularizer of the kernels.
        bias_regularizer: Optional regularizer of the biases.
        kernel_constraint: Optional constraint on the kernels.
        bias_constraint: Optional constraint on the biases.
        use_output_bias: Whether the second layer has a bias.
        seed: Optional integer seed of the dropout.

    Call arguments:
        inputs: `(..., D)` float tensor.
        training: Whether to apply dropout.

    Returns:
        Tensor of the shape of `inputs`.

    Raises:
        ValueError: If `hidden_dim` is below 1, `dropout` is not in `[0, 1]`, or
            Keras does not know an option.

    Example:

    >>> MLP(hidden_dim=32)(keras.ops.ones((2, 5, 8))).shape
    (2, 5, 8)
    """

    def build(self, input_shape: Shape) -> None:
        features = input_shape[-1]
        self.hidden_dense = self._dense("hidden", features, self.hidden_dim, 0)
        self.output_dense = self._dense(
            "output", self.hidden_dim, features, 1, self.use_output_bias
        )
        self.set_up_parts()

    def _dense(self, name, fan_in, fan_out, index, use_bias=True):
        options = {
            f"{prefix}_{kind}": value
            for prefix in ("kernel", "bias")
            for kind, value in get_options(self, prefix, index).items()
        }
        dense = keras.layers.Dense(
            fan_out,
            use_bias=use_bias,
            **options,
            dtype=self.dtype_policy,
            name=name,
        )
        dense.build((None, fan_in))
        return dense

    def call(self, inputs: Tensor, training: bool = False) -> Tensor:
        x = self.activation(self.hidden_dense(inputs))
        x = self.output_dense(self.drop(x, training))
        return self.drop(x, training)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape
