"""The norm that JAX trains with, against Keras's."""

import re

import keras
import numpy as np
import pytest
from keras import ops

from keras_vmoe.layers.normalization import LayerNormalization
from tests.models.definitions import images_of
from tests.models.definitions import tiny

# On the others it is Keras's.
pytestmark = pytest.mark.backends("jax")


def pair(dtype):
    """Our layer and Keras's, with the same weights."""
    generator = np.random.default_rng(1)
    norms = [
        LayerNormalization(dtype=dtype),
        keras.layers.LayerNormalization(epsilon=1e-6, dtype=dtype),
    ]
    values = generator.normal(size=(2, 8))
    for norm in norms:
        norm.build((None, 3, 8))
        norm.set_weights(values)
    return norms


@pytest.mark.parametrize(
    ("dtype", "rtol"), [("float32", 2e-5), ("mixed_bfloat16", 2e-2)]
)
def test_outputs_and_gradients_are_those_of_keras(dtype, rtol):
    import jax

    x = 3 + np.random.default_rng(0).normal(size=(2, 3, 8)).astype("float32")

    def total(values, x, norm):
        outputs, _ = norm.stateless_call(values, [], x)
        assert outputs.dtype == norm.compute_dtype
        return ops.sum(ops.cast(outputs, "float32") ** 3), outputs

    ours, theirs = (
        jax.value_and_grad(total, (0, 1), has_aux=True)(
            [v.value for v in norm.trainable_variables], x, norm
        )
        for norm in pair(dtype)
    )
    for one, other in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        assert one.dtype == other.dtype
        one, other = np.float32(one), np.float32(other)
        np.testing.assert_allclose(one, other, rtol, rtol * abs(other).max())


def test_derivatives_of_any_order_and_mode():
    import jax

    x = np.random.default_rng(0).normal(size=(1, 2, 8)).astype("float32")
    ours, theirs = (
        lambda x, norm=norm: ops.sum(ops.tanh(norm(x)) ** 3)
        for norm in pair("float32")
    )
    right = jax.hessian(theirs)(x)
    for transform in (jax.hessian, lambda f: jax.jacrev(jax.jacrev(f))):
        np.testing.assert_allclose(transform(ours)(x), right, atol=1e-4)


@pytest.mark.parametrize("moe", [None, {"layers": "every_2"}])
def test_fusions_of_a_training_step_do_not_grow_with_the_depth(moe):
    """Of XLA's compiler."""
    assert largest_fusion(2, moe) == largest_fusion(4, moe)


def test_fusions_with_keras_norm_do(monkeypatch):
    """Else our layer has done its work, and goes."""
    call = keras.layers.LayerNormalization.call
    monkeypatch.setattr(LayerNormalization, "call", call)
    assert largest_fusion(2) + 30 < largest_fusion(4)


def test_another_axis_is_refused():
    with pytest.raises(TypeError, match="axis"):
        LayerNormalization(axis=1)


def largest_fusion(num_layers, moe=None):
    model = tiny(num_layers=num_layers, moe=moe)
    return max(operands_of_fusions(model, images_of(2)))


def operands_of_fusions(model, images):
    """Of each fusion in the compiled gradient of a model."""
    import jax

    def loss(values, others):
        outputs, _ = model.stateless_call(values, others, images, training=True)
        return ops.mean(outputs**2)

    values = [v.value for v in model.trainable_variables]
    others = [v.value for v in model.non_trainable_variables]
    text = jax.jit(jax.grad(loss)).lower(values, others).compile().as_text()
    found = re.findall(r"^%?fused_computation\S* \((.*)\) ->", text, re.M)
    assert found
    return [operands.count(": ") for operands in found]
