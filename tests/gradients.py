"""Gradients of scalar functions, the same call on every backend."""

import functools

import keras
import numpy as np
from keras import ops

BACKEND = keras.backend.backend()


def value_and_gradients(function, *arrays, constants=()):
    """A function's value and its gradients, one for each of its arguments.

    Args:
        function: Takes as many tensors as there are arrays, then the
            constants, and returns a scalar; or a pair of a scalar and a tuple
            of further tensors.
        *arrays: Float arrays.
        constants: Arrays to pass on without a gradient.

    Returns:
        `(value, gradients)`, a float and a list of float32 numpy arrays. If
        the function returns a pair, so is the value: a float and a tuple of
        numpy arrays.
    """
    tensors = [ops.convert_to_tensor(array) for array in arrays]
    constants = [ops.convert_to_tensor(array) for array in constants]
    (value, more), gradients = _differentiate(function, tensors, constants)
    value = float(_numpy(value))
    if more is not None:
        value = value, tuple(map(_numpy, more))
    return value, [_numpy(gradient) for gradient in gradients]


def _differentiate(function, tensors, constants):
    if BACKEND == "jax":
        return _jax_gradient(function, len(tensors))(*tensors, *constants)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(tensors)
            value, more = _pair(function(*tensors, *constants))
        return (value, more), tape.gradient(
            value, tensors, unconnected_gradients="zero"
        )
    import torch

    tensors = [tensor.requires_grad_() for tensor in tensors]
    value, more = _pair(function(*tensors, *constants))
    return (value, more), torch.autograd.grad(
        value, tensors, allow_unused=True, materialize_grads=True
    )


@functools.lru_cache
def _jax_gradient(function, count):
    """The compiled gradient; JAX compiles op by op for seconds otherwise."""
    import jax

    def pair(*arguments):
        return _pair(function(*arguments))

    return jax.jit(jax.value_and_grad(pair, tuple(range(count)), has_aux=True))


def _pair(result):
    return result if isinstance(result, tuple) else (result, None)


def compiled(function, layer=None):
    """The function inside `jax.jit` or `tf.function`; as it is on PyTorch.

    Args:
        function: From tensors to tensors.
        layer: A layer whose state (seeds, statistics) the function changes;
            its losses may be read inside of the function.

    Returns:
        A function from arrays to tensors, compiled at its first call.
    """
    if BACKEND == "jax":
        function = _jax_step(function, layer.variables if layer else [])
    elif BACKEND == "tensorflow":
        import tensorflow as tf

        function = tf.function(function)

    def call(*arrays):
        return function(*map(ops.convert_to_tensor, arrays))

    return call


def _jax_step(function, variables):
    import jax

    @jax.jit
    def stateless(values, *tensors):
        pairs = list(zip(variables, values, strict=True))
        with keras.StatelessScope(pairs, collect_losses=True) as scope:
            result = function(*tensors)
        return result, [scope.get_current_value(v) for v in variables]

    def step(*tensors):
        result, values = stateless([v.value for v in variables], *tensors)
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
        return result

    return step


def weight_gradients(layer, loss):
    """Gradients of a loss with respect to a layer's trainable weights.

    Args:
        layer: A built layer or model.
        loss: Function without arguments that calls the layer and returns a
            scalar; it may add `sum(layer.losses)`.

    Returns:
        Dict from the weights' paths to float32 numpy arrays. A weight that the
        loss does not reach has a gradient of zeros.
    """
    weights = layer.trainable_weights
    if BACKEND == "jax":
        import jax

        def stateless(values):
            pairs = list(zip(weights, values, strict=True))
            with keras.StatelessScope(pairs, collect_losses=True):
                return loss()

        values = [weight.value for weight in weights]
        gradients = jax.jit(jax.grad(stateless))(values)
    elif BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            value = loss()
        gradients = tape.gradient(
            value,
            [weight.value for weight in weights],
            unconnected_gradients="zero",
        )
    else:
        import torch

        gradients = torch.autograd.grad(
            loss(),
            [weight.value for weight in weights],
            allow_unused=True,
            materialize_grads=True,
        )
    paths = [weight.path for weight in weights]
    return dict(zip(paths, map(_numpy, gradients), strict=True))


def _numpy(tensor):
    if BACKEND == "torch":
        tensor = tensor.detach()
    if keras.backend.is_float_dtype(
        keras.backend.standardize_dtype(tensor.dtype)
    ):
        tensor = ops.cast(tensor, "float32")
    return np.asarray(ops.convert_to_numpy(tensor))


def numeric_gradient(function, array, step=1e-5):
    """Central differences of a numpy function with a scalar value.

    Args:
        function: Takes a float64 array, returns a float.
        array: Where to differentiate.
        step: Half the distance of the two points.

    Returns:
        float64 array of the shape of `array`.
    """
    array = np.asarray(array, "float64")
    gradient = np.zeros_like(array)
    for index in np.ndindex(array.shape):
        nudge = np.zeros_like(array)
        nudge[index] = step
        rise = function(array + nudge) - function(array - nudge)
        gradient[index] = rise / (2 * step)
    return gradient
