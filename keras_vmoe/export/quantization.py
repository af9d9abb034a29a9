"""Experts whose kernels take a quarter or half of the bytes."""

import keras
import numpy as np
from keras import ops

from keras_vmoe._checks import check_choice
from keras_vmoe.export.variants import moe_layers_of
from keras_vmoe.layers.experts import MLPExperts
from keras_vmoe.models.cloning import clone_around
from keras_vmoe.models.cloning import set_part
from keras_vmoe.models.cloning import share_parts

KINDS = ("int8", "float16")


def check_quantization(model, kind, kinds):
    """Raises unless the experts of a model can be stored so."""
    check_choice("quantize_experts", kind, (None, *kinds))
    experts = [layer.experts for layer in moe_layers_of(model)]
    all_known = experts and all(isinstance(x, MLPExperts) for x in experts)
    if kind is not None and not all_known:
        kinds = sorted({type(x).__name__ for x in experts}) or "a dense model"
        raise ValueError(
            "Only `MLPExperts` are quantized. Received: "
            f"quantize_experts={kind!r} with {kinds}. Leave it out."
        )


def with_quantized_experts(model, kind):
    """The model with quantized experts; all other weights are shared.

    Args:
        model: A model with MoE layers.
        kind: `"int8"` or `"float16"`.

    Returns:
        A model.
    """

    def change(layer):
        new = type(layer).from_config(layer.get_config())
        share_parts(new, layer)
        set_part(new, "router", layer.router)
        experts = QuantizedMLPExperts.from_experts(layer.experts, kind)
        set_part(new, "experts", experts)
        new.build(layer.get_build_config()["input_shape"])
        return new

    return clone_around(model, change)


def quantized(kernel, kind):
    """A kernel in fewer bytes.

    Args:
        kernel: `(..., D, F)` float32 array.
        kind: `"int8"` or `"float16"`.

    Returns:
        The small kernel, and the factor `(..., 1, F)` that turns it back; None
        for float16.
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
    turned back into numbers of the compute dtype when it is used: what is
    saved is memory, not time. Biases stay as they are.

    Args:
        kind: `"int8"` or `"float16"`.
        **kwargs: Arguments of `MLPExperts`.

    Call arguments:
        buffers: `(G, E, C, D)` float tensor, or `routing.Blocks`.

    Returns:
        What `buffers` are, after the MLPs.

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

    def _add_layer(self, name, fan_in, fan_out):
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
