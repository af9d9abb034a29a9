"""Expert banks whose kernels take a quarter or half of the memory."""

import keras
import numpy as np
from keras import ops

from keras_vmoe.layers.experts import MLPExperts


def quantized(kernel, kind):
    """A quantized kernel.

    Args:
        kernel: `(..., D, F)` float32 array.
        kind: `"int8"` or `"float16"`.

    Returns:
        The quantized kernel, and the scale `(..., 1, F)` to multiply it by;
        None for float16.
    """
    if kind == "float16":
        return kernel.astype("float16"), None
    small, factor = keras.quantizers.abs_max_quantize(
        kernel, axis=-2, to_numpy=True
    )
    return np.asarray(small), 1 / np.asarray(factor, "float32")


@keras.saving.register_keras_serializable("keras_vmoe")
class QuantizedMLPExperts(MLPExperts):
    """Experts with kernels of int8 or float16, for evaluation.

    An int8 kernel has one scale for each output feature of each expert, and is
    dequantized to the compute dtype when it is used: this saves memory, not
    time. Biases are not quantized.

    Args:
        kind: `"int8"` or `"float16"`.
        **kwargs: Arguments of `MLPExperts`.

    Call arguments:
        buffers: `(G, E, C, D)` float tensor, or the blocks of
            `routing.dropless_plan`.

    Returns:
        The outputs of the MLPs, of the type and shape of `buffers`.

    Example:

    >>> from keras_vmoe.layers import MLPExperts
    >>> experts = MLPExperts(num_experts=4, hidden_dim=32)
    >>> experts.build((None, 4, None, 8))
    >>> small = QuantizedMLPExperts.from_experts(experts, "int8")
    >>> small(keras.ops.ones((2, 4, 3, 8))).shape
    (2, 4, 3, 8)
    """

    def __init__(self, *args, kind="int8", **kwargs):
        super().__init__(*args, **kwargs)
        self.kind = kind
        self.kernels = {}

    @classmethod
    def from_experts(cls, experts, kind):
        """Quantized copies of experts.

        Args:
            experts: A built `MLPExperts`.
            kind: `"int8"` or `"float16"`.

        Returns:
            A `QuantizedMLPExperts`.
        """
        new = cls(**experts.get_config(), kind=kind)
        num_experts, features, _ = experts.hidden_kernel.shape
        new.build((None, num_experts, None, features))
        for name in ("hidden", "output"):
            bias = getattr(experts, f"{name}_bias")
            getattr(new, f"{name}_bias").assign(bias)
            kernel = ops.convert_to_numpy(getattr(experts, f"{name}_kernel"))
            small, scale = quantized(kernel, kind)
            new.kernels[name][0].assign(small)
            if scale is not None:
                new.kernels[name][1].assign(scale)
        return new

    def _add_layer(self, name, fan_in, fan_out, index):
        shape = (self.num_experts, fan_in, fan_out)
        values = self.add_weight(
            name=f"{name}_kernel",
            shape=shape,
            initializer="zeros",
            dtype=self.kind,
            trainable=False,
            autocast=False,
        )
        scale = self.add_weight(
            name=f"{name}_scale",
            shape=(self.num_experts, 1, fan_out),
            initializer="ones",
            trainable=False,
        )
        bias = self.add_weight(
            name=f"{name}_bias",
            shape=(self.num_experts, fan_out),
            initializer="zeros",
            trainable=False,
        )
        self.kernels[name] = (values, scale)
        setattr(self, f"{name}_bias", bias)

    @property
    def hidden_kernel(self):
        """`(E, D, F)` tensor in the compute dtype."""
        return self._kernel("hidden")

    @property
    def output_kernel(self):
        """`(E, F, D)` tensor in the compute dtype."""
        return self._kernel("output")

    def _kernel(self, name):
        values, scale = self.kernels[name]
        values = ops.cast(values, self.compute_dtype)
        if self.kind == "float16":
            return values
        return values * ops.cast(scale, self.compute_dtype)

    def get_config(self):
        return {**super().get_config(), "kind": self.kind}
