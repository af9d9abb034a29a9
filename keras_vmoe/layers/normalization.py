"""Layer normalization, for every model family."""

import functools
from typing import Any

import keras
from keras import ops

from keras_vmoe._typing import Config
from keras_vmoe._typing import Tensor

FIXED = {"axis": -1, "rms_scaling": False}


@keras.saving.register_keras_serializable("keras_vmoe")
class LayerNormalization(keras.layers.LayerNormalization):
    """Keras's layer over the features, with a custom derivative on JAX.

    XLA's CPU compiler fuses the gradient that JAX derives with the gradients of
    all blocks above and recomputes them in every block: the time of a step
    grows with the square of the depth. See docs/layer_normalization.md.

    Args:
        epsilon: Added to the variance.
        **kwargs: As in `keras.layers.LayerNormalization`, except `axis`, which
            is the last one, and `rms_scaling`.

    Reference:
        [Ba et al., 2016](https://arxiv.org/abs/1607.06450).
    """

    def __init__(self, epsilon: float = 1e-6, **kwargs: Any) -> None:
        super().__init__(epsilon=epsilon, **FIXED, **kwargs)

    def call(self, inputs: Tensor) -> Tensor:
        if keras.backend.backend() != "jax":
            return super().call(inputs)
        dtype = keras.backend.result_type(inputs.dtype, "float32")
        x = _normalize()(ops.cast(inputs, dtype), self.epsilon)
        if self.scale:
            x = x * ops.cast(self.gamma, dtype)
        if self.center:
            x = x + ops.cast(self.beta, dtype)
        return ops.cast(x, self.compute_dtype)

    def get_config(self) -> Config:
        config = super().get_config()
        return {k: v for k, v in config.items() if k not in FIXED}


@functools.cache
def _normalize():
    import jax

    def standardize(x, epsilon):
        x = x - ops.mean(x, axis=-1, keepdims=True)
        variance = ops.mean(ops.square(x), axis=-1, keepdims=True)
        rstd = ops.rsqrt(variance + epsilon)
        return x * rstd, rstd

    @functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
    def normalize(x, epsilon):
        return standardize(x, epsilon)[0]

    @normalize.defjvp
    def derivative(epsilon, primals, tangents):
        # Symmetric: reverse mode, its transpose, is the same formula.
        # Scaled first: scaled last, XLA fuses the transpose across blocks.
        y, rstd = standardize(*primals, epsilon)
        t = rstd * tangents[0]
        along = y * ops.mean(y * t, axis=-1, keepdims=True)
        return y, t - ops.mean(t, axis=-1, keepdims=True) - along

    return normalize
