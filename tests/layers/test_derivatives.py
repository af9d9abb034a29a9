"""Derivatives of derivatives, as gradient penalties need them."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_vmoe import layers

BACKEND = keras.backend.backend()
ROUTERS = {
    "top_k": lambda: layers.TopKRouter(4, 2, capacity_factor=0.75),
    "dropless": lambda: layers.TopKRouter(4, 2, capacity_factor="dropless"),
    "expert_choice": lambda: layers.ExpertChoiceRouter(4, 2.0),
    "soft": lambda: layers.SoftRouter(4, num_slots=2),
}


def penalty_of(layer, x):
    """The squared norm of a gradient, and its own by a kernel.

    The gradient is that of the inputs and of the experts' other kernel.

    Returns:
        Function without arguments, which gives both for the layer's weights.
    """
    kernel, other = layer.experts.hidden_kernel, layer.experts.output_kernel
    if BACKEND == "jax":
        import jax

        ours = [id(v) for v in layer.trainable_variables]
        index, second = ours.index(id(kernel)), ours.index(id(other))

        def penalty(values, others):
            def total(x, values):
                return (layer.stateless_call(values, others, x)[0] ** 2).sum()

            by_x, by_values = jax.grad(total, (0, 1))(x, values)
            return (by_x**2).sum() + (by_values[second] ** 2).sum()

        compiled = jax.jit(jax.value_and_grad(penalty))

        def in_jax():
            values = [v.value for v in layer.trainable_variables]
            others = [v.value for v in layer.non_trainable_variables]
            value, gradients = compiled(values, others)
            return float(value), np.asarray(gradients[index])

        return in_jax

    def in_tensorflow():
        import tensorflow as tf

        inputs = tf.constant(x)
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                inner.watch(inputs)
                total = tf.reduce_sum(layer(inputs) ** 2)
            found = inner.gradient(total, (inputs, other.value))
            found = map(tf.convert_to_tensor, found)
            value = sum(tf.reduce_sum(each**2) for each in found)
        gradient = outer.gradient(value, kernel.value)
        return float(value), tf.convert_to_tensor(gradient).numpy()

    def in_torch():
        import torch

        inputs = torch.tensor(x, requires_grad=True)
        total = (layer(inputs) ** 2).sum()
        found = torch.autograd.grad(
            total, (inputs, other.value), create_graph=True
        )
        value = sum((each**2).sum() for each in found)
        (gradient,) = torch.autograd.grad(value, kernel.value)
        return float(value.detach()), gradient.numpy()

    return in_tensorflow if BACKEND == "tensorflow" else in_torch


@pytest.mark.parametrize("name", ROUTERS)
def test_second_derivatives(name):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(2, 6, 5)).astype("float32")
    layer = layers.MoEMLP(4, 8, ROUTERS[name](), images_per_group=1)
    layer.build(x.shape)
    penalty = penalty_of(layer, x)
    _, found = penalty()
    kernel = layer.experts.hidden_kernel
    start = ops.convert_to_numpy(kernel).copy()
    direction = generator.normal(size=start.shape).astype("float32")
    direction /= np.linalg.norm(direction)
    ends = []
    for sign in (1, -1):
        kernel.assign(start + sign * 3e-3 * direction)
        ends.append(penalty()[0])
    right = (ends[0] - ends[1]) / 6e-3
    assert (found * direction).sum() == pytest.approx(right, 0.01, 1e-3)


@pytest.mark.backends("torch")
@pytest.mark.parametrize("name", ROUTERS)
def test_transforms_of_torch_func(name):
    import torch

    layer = layers.MoEMLP(4, 8, ROUTERS[name](), images_per_group=1)
    x = torch.randn(3, 6, 8)
    layer(x)
    weights = [v.value for v in layer.trainable_variables]
    others = [v.value for v in layer.non_trainable_variables]

    def loss(weights):
        return layer.stateless_call(weights, others, x)[0].square().sum()

    found = torch.func.grad(loss)(weights)
    right = torch.autograd.grad(loss(weights), weights)
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other)
    alone = torch.func.vmap(lambda image: layer(image[None])[0])(x)
    torch.testing.assert_close(alone, layer(x))


@pytest.mark.backends("torch")
def test_forward_mode():
    import torch

    layer = layers.MoEMLP(4, 8, ROUTERS["top_k"](), images_per_group=1)
    x, tangent = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    layer(x)
    _, forward = torch.func.jvp(layer, (x,), (tangent,))
    _, pull = torch.func.vjp(layer, x)
    other = torch.randn_like(forward)
    product = (pull(other)[0] * tangent).sum()
    torch.testing.assert_close((forward * other).sum(), product)


@pytest.mark.backends("jax")
def test_forward_mode_is_refused_where_it_would_need_a_scatter():
    import jax

    x = np.zeros((2, 6, 8), "float32")
    for name in ("top_k", "dropless"):
        layer = layers.MoEMLP(4, 8, ROUTERS[name](), images_per_group=1)
        layer(x)
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jvp(layer, (x,), (x,))


@pytest.mark.backends("jax")
def test_hessian_by_reverse_over_reverse():
    """What the documentation says to use in the place of `jax.hessian`."""
    import jax

    # All experts: no step moves a token from one to another.
    layer = layers.MoEMLP(4, 8, layers.TopKRouter(4, 4), images_per_group=1)
    x = np.random.default_rng(0).normal(size=(1, 3, 2)).astype("float32")
    layer(x)

    def total(x):
        return ops.sum(layer(x) ** 2)

    found = jax.jit(jax.jacrev(jax.jacrev(total)))(x).reshape(6, 6)
    moved = jax.jit(jax.grad(total))
    step = 1e-2 * np.eye(6, dtype="float32").reshape(6, 1, 3, 2)
    right = [(moved(x + d) - moved(x - d)).ravel() / 2e-2 for d in step]
    np.testing.assert_allclose(found, right, rtol=0.05, atol=0.01)
