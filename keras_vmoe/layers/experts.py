"""Experts: E networks of the same shape, as stacked kernels."""

import functools
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_vmoe._checks import check_sizes
from keras_vmoe._typing import Activation
from keras_vmoe._typing import Config
from keras_vmoe._typing import Shape
from keras_vmoe._typing import Tensor
from keras_vmoe.layers.block_linear import block_linear
from keras_vmoe.layers.block_linear import expert_linear
from keras_vmoe.layers.block_linear import fuses_by_expert
from keras_vmoe.layers.mlp import TwoLayers
from keras_vmoe.layers.weights import for_each_expert
from keras_vmoe.layers.weights import get_options
from keras_vmoe.layers.weights import mark
from keras_vmoe.layers.weights import part_of
from keras_vmoe.routing._blocks import Blocks


@keras.saving.register_keras_serializable("keras_vmoe")
class MLPExperts(TwoLayers):
    """E two-layer MLPs, each applied to its own buffer.

    Each expert is initialized, regularized and constrained as if it were alone:
    Keras would treat the stacked kernel `(E, D, F)` as a convolution and make
    it √E too small.

    `quantize("int8")`, called here or on the model, stores the kernels as int8,
    with a scale for each output feature of each expert. They are dequantized on
    use, which saves memory, not time; biases are unchanged. Other modes and
    LoRA are not supported.

    Args:
        num_experts: E.
        hidden_dim: F, hidden features of one expert.
        activation: Activation between the layers.
        dropout: Dropout rate after each of the two layers, in `[0, 1]`.
        **kwargs: Initializers, regularizers, constraints, `use_output_bias` and
            `seed`, as in `MLP`; a kernel initializer is called with the shape
            of one expert.

    Call arguments:
        buffers: `(G, E, C, D)` float tensor, or the blocks of
            `routing.dropless_plan`.
        training: Whether to apply dropout.

    Returns:
        The outputs of the MLPs, in the form of `buffers`.

    Raises:
        ValueError: If a size is below 1, or if the buffers have another number
            of experts.

    Example:

    >>> experts = MLPExperts(num_experts=4, hidden_dim=32)
    >>> experts(keras.ops.ones((2, 4, 3, 8))).shape
    (2, 4, 3, 8)
    """

    takes_blocks = True  # Dropless buffers as well.
    kernel_dtype = None  # The policy's.

    def __init__(
        self,
        num_experts: int,
        hidden_dim: int,
        activation: Activation = "gelu",
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(hidden_dim, activation, dropout, **kwargs)
        check_sizes(num_experts=num_experts)
        self.num_experts = int(num_experts)

    def build(self, input_shape: Shape) -> None:
        if len(input_shape) != 4 or input_shape[1] != self.num_experts:
            raise ValueError(
                "Experts take buffers of shape (groups, experts, capacity, "
                f"features) with {self.num_experts} experts. "
                f"Received: input_shape={tuple(input_shape)}. "
                "`plan.dispatch(tokens)` returns such buffers."
            )
        check_mode(self.quantization_mode)
        features = input_shape[-1]
        # An `MLP` with the same seed may be alongside: it has indices 0 and 1.
        self._add_layer("hidden", features, self.hidden_dim, 2)
        self._add_layer(
            "output", self.hidden_dim, features, 3, self.use_output_bias
        )

    def _add_layer(self, name, fan_in, fan_out, index, use_bias=True):
        shape = (self.num_experts, fan_in, fan_out)
        if self.quantization_mode is None:
            kernel = self.add_weight(
                name=f"{name}_kernel",
                shape=shape,
                dtype=self.kernel_dtype,
                **for_each_expert(**get_options(self, "kernel", index)),
            )
            setattr(self, f"{name}_kernel", kernel)
        else:
            self._add_int8(name, shape)
        bias = None
        if use_bias:
            bias = self.add_weight(
                name=f"{name}_bias",
                shape=(self.num_experts, fan_out),
                **for_each_expert(**get_options(self, "bias", index)),
            )
        setattr(self, f"{name}_bias", bias)

    def _add_int8(self, name, shape):
        """Adds an int8 kernel and the scale that divides it."""
        kernel = self.add_weight(
            name=f"{name}_kernel",
            shape=shape,
            initializer="zeros",
            dtype="int8",
            trainable=False,
        )
        scale = self.add_weight(
            name=f"{name}_kernel_scale",
            shape=(shape[0], shape[-1]),
            initializer="ones",
            trainable=False,
        )
        setattr(self, f"{name}_kernel", kernel)
        setattr(self, f"{name}_kernel_scale", scale)
        return kernel, scale

    def quantize(
        self,
        mode: str | None = None,
        type_check: bool = True,
        config: Any = None,
    ) -> None:
        """Stores the kernels as 8-bit integers with a scale per output.

        Args:
            mode: `"int8"`.
            type_check: Whether to reject subclasses.
            config: Optional Keras configuration with a `weight_quantizer`.

        Raises:
            NotImplementedError: For another mode, or a subclass.
        """
        check_mode(mode)
        if hasattr(self, "hidden_kernel_scale"):
            return  # Setting the policy below calls this again.
        if type_check and type(self) is not MLPExperts:
            raise NotImplementedError(
                "Only `MLPExperts` itself is quantized. Received: a "
                f"{type(self).__name__}. Pass type_check=False to its "
                "`quantize` if it uses its kernels as this class does."
            )
        for name in ("hidden", "output"):
            kernel = getattr(self, f"{name}_kernel")
            values = quantized(kernel, config and config.weight_quantizer)
            part, shape = part_of(kernel), kernel.shape
            delattr(self, f"{name}_kernel")
            variables = self._add_int8(name, shape)
            mark(variables, part)
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)
        # mypy cannot type Keras's property where a class also sets it.
        policy = self.dtype_policy  # type: ignore[has-type]
        self.dtype_policy = f"{mode}_from_{policy.name}"

    def call(
        self, buffers: Tensor | Blocks, training: bool = False
    ) -> Tensor | Blocks:
        if isinstance(buffers, Blocks):
            rows, *blocks = buffers
            return buffers._replace(rows=self._mlps(rows, blocks, training))
        groups, _, capacity, features = ops.shape(buffers)
        # One batched matmul over E, for any number of groups.
        x = _swap_groups_and_experts(buffers)  # (E, G, C, D)
        shape = (self.num_experts, groups * capacity, features)
        x = self._mlps(ops.reshape(x, shape), (), training)
        x = ops.reshape(x, (self.num_experts, groups, capacity, features))
        return _swap_groups_and_experts(x)

    def quantized_call(self, *args: Any, **kwargs: Any) -> Tensor | Blocks:
        return self.call(*args, **kwargs)

    def _mlps(self, x, blocks, training):
        """One MLP for each block of rows; see `block_linear`."""
        weights = []
        for name in ("hidden", "output"):
            bias = getattr(self, f"{name}_bias")
            weights += [
                self._kernel(name),
                None if bias is None else ops.convert_to_tensor(bias),
            ]
        if blocks or not fuses_by_expert(x):
            linear = functools.partial(block_linear, blocks=blocks)
            return self._mlp(linear, x, *weights, training)
        # The hidden features of all experts never form one tensor.
        parts = (
            [None] * self.num_experts
            if y is None
            else ops.unstack(y, self.num_experts)
            for y in (x, *weights)
        )
        each = zip(*parts, strict=True)
        return ops.stack([self._mlp(expert_linear, *y, training) for y in each])

    def _mlp(self, linear, x, kernel, bias, out_kernel, out_bias, training):
        x = self.drop(self.activation(linear(x, kernel, bias)), training)
        return self.drop(linear(x, out_kernel, out_bias), training)

    def _kernel(self, name):
        """`(E, fan in, fan out)` tensor in the compute dtype."""
        kernel = getattr(self, f"{name}_kernel")
        kernel = ops.cast(kernel, self.compute_dtype)
        if self.quantization_mode is None:
            return kernel
        scale = getattr(self, f"{name}_kernel_scale")
        return kernel / ops.cast(scale, self.compute_dtype)[:, None]

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    def get_config(self) -> Config:
        return {**super().get_config(), "num_experts": self.num_experts}


def quantized(kernel, quantizer=None):
    """Quantizes the kernel of each expert as if it were alone.

    Args:
        kernel: `(E, D, F)` float tensor.
        quantizer: A quantizer of `(D, F)` kernels, as for a `Dense` layer;
            None means `keras.quantizers.AbsMaxQuantizer(axis=0)`.

    Returns:
        `(E, D, F)` int8 and `(E, F)` float numpy arrays: the kernels, and the
        scales that divide them.
    """
    quantizer = quantizer or keras.quantizers.AbsMaxQuantizer(axis=0)
    kernel = ops.convert_to_numpy(kernel)
    pairs = [quantizer(x, to_numpy=True) for x in kernel]
    values, scales = (
        np.stack([ops.convert_to_numpy(x) for x in parts])
        for parts in zip(*pairs, strict=True)
    )
    return values, np.squeeze(scales, axis=1)


def check_mode(mode):
    """Raises for a quantization mode that a bank does not support."""
    if mode not in (None, "int8"):
        # On this error `Model.quantize` skips the layer, with a warning.
        raise NotImplementedError(
            "The experts' kernels can be quantized to 'int8' only. Received: "
            f"mode={mode!r}. They stay unchanged."
        )


def _swap_groups_and_experts(x):
    """Swaps the first two axes; by a reshape if one of them has size 1."""
    first, second, *rest = ops.shape(x)
    if 1 in (x.shape[0], x.shape[1]):
        return ops.reshape(x, (second, first, *rest))
    return ops.transpose(x, (1, 0, 2, 3))
