"""Initializers, regularizers and constraints, per expert."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_vmoe import layers
from keras_vmoe.layers.weights import for_each_expert

E, D, F = 16, 24, 48


def kernels(initializer, bias_initializer=None):
    """The hidden kernels `(E, D, F)` and biases of a new bank."""
    bank = layers.MLPExperts(
        E,
        F,
        kernel_initializer=initializer,
        bias_initializer=bias_initializer,
    )
    bank.build((None, E, None, D))
    kernel, bias = bank.hidden_kernel, bank.hidden_bias
    return ops.convert_to_numpy(kernel), ops.convert_to_numpy(bias)


@pytest.mark.parametrize(
    ("initializer", "expected"),
    [
        ("glorot_uniform", (2 / (D + F)) ** 0.5),
        ("he_normal", (2 / D) ** 0.5),
        ("lecun_uniform", (1 / D) ** 0.5),
        (keras.initializers.RandomNormal(stddev=0.3, seed=1), 0.3),
    ],
)
def test_an_expert_is_initialised_as_if_it_were_alone(initializer, expected):
    kernel, _ = kernels(initializer)
    np.testing.assert_allclose(kernel.std(), expected, rtol=0.03)
    assert len(np.unique(kernel[:, 0, 0])) == E


@pytest.mark.parametrize("seed", [None, 5])
def test_initializers_of_matrices(seed):
    kernel, _ = kernels(keras.initializers.Orthogonal(seed=seed))
    for matrix in kernel:
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(D), atol=1e-5)
    assert len(np.unique(kernel[:, 0, 0])) == E
    if seed is not None:
        again, _ = kernels(keras.initializers.Orthogonal(seed=seed))
        np.testing.assert_array_equal(again, kernel)


class Ramp(keras.initializers.GlorotUniform):
    """A subclass that draws other numbers than Keras's class."""

    def __call__(self, shape, dtype=None):
        return ops.reshape(ops.arange(np.prod(shape), dtype=dtype), shape)


def test_initializers_with_a_call_of_their_own():
    kernel, _ = kernels(Ramp())
    np.testing.assert_array_equal(kernel[3].ravel(), np.arange(D * F))


def test_initializers_that_are_functions():
    def ramp(shape, dtype=None):
        return ops.reshape(ops.arange(np.prod(shape), dtype=dtype), shape)

    kernel, bias = kernels(ramp, "lecun_normal")
    np.testing.assert_array_equal(kernel[3].ravel(), np.arange(D * F))
    np.testing.assert_allclose(bias.std(), F**-0.5, rtol=0.1)


def test_hidden_and_output_kernels_differ():
    bank = layers.MLPExperts(E, D, kernel_initializer="he_normal")
    bank.build((None, E, None, D))
    mlp = layers.MLP(D, kernel_initializer=keras.initializers.HeNormal())
    mlp.build((None, D))
    for one, other in (
        (bank.hidden_kernel, bank.output_kernel),
        (mlp.hidden_dense.kernel, mlp.output_dense.kernel),
    ):
        one, other = ops.convert_to_numpy(one), ops.convert_to_numpy(other)
        assert np.abs(one - other).max() > 0.01


@pytest.mark.parametrize(
    "seed", [lambda: 5, lambda: keras.random.SeedGenerator(5)]
)
def test_kernels_of_one_seed_differ_and_repeat(seed):
    def made():
        layer = layers.SharedExpertMoEMLP(
            4, 8, 8,
            kernel_initializer=keras.initializers.HeNormal(seed=seed()),
        )  # fmt: skip
        layer.build((None, 4, 8))
        bank, mlp = layer.experts, layer.shared_expert
        stacks = (bank.hidden_kernel, bank.output_kernel)
        found = [x for stack in stacks for x in ops.convert_to_numpy(stack)]
        dense = (mlp.hidden_dense, mlp.output_dense)
        return found + [ops.convert_to_numpy(x.kernel) for x in dense]

    first, again = made(), made()
    np.testing.assert_array_equal(first, again)
    assert len(np.unique([x[0, 0] for x in first])) == 10


def test_penalties_of_experts_are_summed():
    penalty = keras.regularizers.OrthogonalRegularizer(0.1)  # Of a matrix.
    layer = layers.MoEMLP(
        3, 5, kernel_regularizer=penalty, bias_regularizer="l1"
    )
    layer.build((None, 4, 8))
    hidden, hidden_bias, output, output_bias = layer.experts.get_weights()
    expected = sum(
        float(penalty(matrix))
        for kernel in (hidden, output)
        for matrix in kernel
    )
    for bias in (hidden_bias, output_bias):
        expected += 0.01 * np.abs(bias).sum()
    total = ops.convert_to_numpy(sum(layer.losses))
    assert total == pytest.approx(expected, rel=1e-5)


def test_constraints_hold_for_each_expert_after_a_step():
    inputs = keras.Input((4, 8))
    layer = layers.MoEMLP(
        3, 5, kernel_constraint=keras.constraints.UnitNorm(axis=0)
    )
    model = keras.Model(inputs, layer(inputs))
    model.compile("sgd", "mse")
    x = np.random.default_rng(0).normal(size=(8, 4, 8)).astype("float32")
    model.fit(x, x, verbose=0)
    norms = np.linalg.norm(ops.convert_to_numpy(layer.experts.hidden_kernel),
                           axis=1)  # fmt: skip
    np.testing.assert_allclose(norms, 1.0, atol=1e-5)


def test_a_shared_expert_has_the_settings_of_the_bank():
    layer = layers.SharedExpertMoEMLP(
        3, 5, shared_hidden_dim=4, activation="relu", kernel_initializer="ones"
    )
    layer.build((None, 4, 8))
    shared = layer.shared_expert
    assert shared.activation is layer.experts.activation
    assert ops.convert_to_numpy(shared.hidden_dense.kernel).min() == 1.0


def test_no_option_at_all():
    options = for_each_expert(keras.initializers.Zeros(), None, None)
    assert options["regularizer"] is None and options["constraint"] is None
