"""Each auxiliary loss against its definition in loops, with its gradient."""

import functools

import numpy as np
import pytest
from keras import ops

from keras_vmoe import losses
from tests.gradients import numeric_gradient
from tests.gradients import value_and_gradients
from tests.routing.definitions import global_entropy_slowly
from tests.routing.definitions import gshard_slowly
from tests.routing.definitions import importance_slowly
from tests.routing.definitions import load_slowly
from tests.routing.definitions import local_entropy_slowly
from tests.routing.definitions import z_slowly


@functools.lru_cache
def all_losses(num_selected_experts, noise_std):
    """Each loss by name, as a function of tensors."""
    return {
        "importance": losses.importance_loss,
        "gshard": losses.gshard_loss,
        "z": losses.router_z_loss,
        "local entropy": losses.local_entropy_loss,
        "global entropy": lambda gates, mask=None: losses.global_entropy_loss(
            gates, 4.0, mask
        ),
        "load": lambda logits, noisy_logits, mask=None: losses.load_loss(
            logits, noisy_logits, noise_std, num_selected_experts, mask
        ),
    }


SLOWLY = {
    "local entropy": local_entropy_slowly,
    "global entropy": functools.partial(global_entropy_slowly, min_experts=4.0),
    "importance": importance_slowly,
    "gshard": gshard_slowly,
    "z": z_slowly,
    "load": functools.partial(
        load_slowly, noise_std=0.4, num_selected_experts=2
    ),
}
MASK = np.array([[1, 1, 0, 1, 1, 0], [0, 0, 0, 0, 1, 0]], bool)


def arguments_of(name, num_experts):
    """Random gates, logits, or logits with and without noise."""
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(2, 6, num_experts)).astype("float32")
    if name == "z":
        return (logits,)
    if name == "load":
        noise = generator.normal(size=logits.shape).astype("float32")
        return logits, logits + 0.4 * noise
    gates = np.exp(logits)
    return (gates / gates.sum(-1, keepdims=True),)


@functools.lru_cache
def weighted(name, num_selected_experts=2, noise_std=0.4):
    """A scalar whose gradient tells the groups apart, and the loss itself."""
    loss = all_losses(num_selected_experts, noise_std)[name]

    def function(*arguments):
        values = loss(*arguments)
        return values[0] + 10.0 * values[1], (values,)

    return function


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", SLOWLY)
def test_values_and_gradients(name, masked):
    arguments = arguments_of(name, num_experts=4)
    mask = MASK if masked else np.ones_like(MASK)

    def definition(*arguments):
        values = []
        for g in range(2):
            kept = [a.astype("float64")[g, mask[g]] for a in arguments]
            values.append(SLOWLY[name](*kept))
        return np.array(values)

    (_, (values,)), gradients = value_and_gradients(
        weighted(name), *arguments, constants=(mask,) if masked else ()
    )
    np.testing.assert_allclose(values, definition(*arguments), rtol=1e-5)
    for i, gradient in enumerate(gradients):

        def slowly(argument, i=i):
            with_one = [*arguments[:i], argument, *arguments[i + 1 :]]
            return definition(*with_one) @ [1.0, 10.0]

        expected = numeric_gradient(slowly, arguments[i])
        np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-5)
        assert not gradient[~mask].any(), "masked tokens have no gradient"
        assert gradient[mask].any()


@pytest.mark.parametrize("name", SLOWLY)
def test_nothing_but_masked_tokens(name):
    # The first group is padding only: its loss is 0 and so is its gradient.
    arguments = arguments_of(name, num_experts=4)
    mask = np.ones((2, 6), bool)
    mask[0] = False
    (_, (values,)), gradients = value_and_gradients(
        weighted(name), *arguments, constants=(mask,)
    )
    assert values[0] == 0.0 and values[1] > 0.0
    for gradient in gradients:
        assert not gradient[0].any()
        assert np.isfinite(gradient).all() and gradient[1].any()


@pytest.mark.parametrize(
    ("name", "value"),
    # One expert: always even. Its gate is 1, so GShard's loss is 1.
    [("importance", 0.0), ("load", 0.0), ("gshard", 1.0)],
)
def test_one_expert(name, value):
    arguments = arguments_of(name, num_experts=1)
    (_, (values,)), gradients = value_and_gradients(
        weighted(name, num_selected_experts=1), *arguments
    )
    np.testing.assert_allclose(values, [value, value], atol=1e-6)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_entropies_by_hand():
    """One expert for each token, and all of them for all tokens."""
    alone = np.array([[[1.0, 0.0, 0.0, 0.0]] * 3], "float32")
    spread = np.full((1, 3, 4), 0.25, "float32")
    for gates, local, lacking in (
        (alone, 0.0, np.log(2)),
        (spread, np.log(4), 0.0),  # More than two are used: nothing is lacking.
    ):
        (_, (values,)), (gradient,) = value_and_gradients(
            weighted("local entropy"), np.repeat(gates, 2, axis=0)
        )
        np.testing.assert_allclose(values, [local, local], atol=1e-6)
        assert np.isfinite(gradient).all()
        found = losses.global_entropy_loss(ops.convert_to_tensor(gates), 2)
        assert float(found[0]) == pytest.approx(lacking, abs=1e-6)
    with pytest.raises(ValueError, match="min_experts=0"):
        losses.global_entropy_loss(ops.convert_to_tensor(spread), 0)


def test_all_zero_gates():
    # 0 / 0 is no imbalance, and its gradient is no NaN.
    gates = np.zeros((2, 6, 3), "float32")
    (_, (values,)), (gradient,) = value_and_gradients(
        weighted("importance"), gates
    )
    assert not values.any() and not gradient.any()


# By hand: importance (3, 1) has mean 2 and standard deviation 1, so 1/4.
# (4, 0) has mean 2 and standard deviation 2, so 1.
@pytest.mark.parametrize(
    ("gates", "value"),
    [
        ([[0.5, 0.5]] * 4, 0.0),
        ([[0.75, 0.25]] * 4, 0.25),
        ([[1.0, 0.0]] * 4, 1.0),
        ([[1.0, 0.0], [0.0, 1.0]], 0.0),
    ],
)
def test_importance_by_hand(gates, value):
    loss = losses.importance_loss(ops.convert_to_tensor([gates]))
    np.testing.assert_allclose(ops.convert_to_numpy(loss), [value], atol=1e-6)


# By hand: all four tokens prefer expert 0 with gate 3/4, so the shares are
# (1, 0), the mean gates (3/4, 1/4), and 4 * (3/4 + 0) / 2 = 3/2.
@pytest.mark.parametrize(
    ("gates", "value"),
    [
        ([[0.75, 0.25]] * 4, 1.5),
        ([[0.75, 0.25], [0.25, 0.75]], 1.0),
        ([[1.0, 0.0]] * 4, 2.0),
    ],
)
def test_gshard_by_hand(gates, value):
    loss = losses.gshard_loss(ops.convert_to_tensor([gates]))
    np.testing.assert_allclose(ops.convert_to_numpy(loss), [value], rtol=1e-6)


def test_load_by_hand():
    # One token, logits (0, 1), K = 1, no noise drawn: the threshold is 1. With
    # sigma = 1 expert 1 is chosen with probability 1/2, expert 0 with
    # 1 - phi(1) = 0.158655.
    logits = ops.convert_to_tensor([[[0.0, 1.0]]])
    loss = losses.load_loss(logits, logits, 1.0, num_selected_experts=1)
    load = np.array([0.158655, 0.5])
    expected = (load.std() / load.mean()) ** 2
    np.testing.assert_allclose(ops.convert_to_numpy(loss), [expected], 1e-5)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_the_threshold_of_ties_is_that_of_a_sort(k):
    logits = np.array([[[3.0, 3.0, 1.0, 1.0]]], "float32")
    threshold = np.sort(logits[0, 0])[-k]
    phi = {0.0: 0.5, 2.0: 0.97725, -2.0: 0.02275}  # Of a standard normal.
    load = np.array([1 - phi[threshold - x] for x in logits[0, 0].tolist()])
    expected = (load.std() / load.mean()) ** 2
    tensor = ops.convert_to_tensor(logits)
    loss = losses.load_loss(tensor, tensor, 1.0, k)
    np.testing.assert_allclose(ops.convert_to_numpy(loss), [expected], 1e-3)


def test_large_logits_do_not_overflow():
    logits = ops.convert_to_tensor([[[1000.0, 0.0], [0.0, 1000.0]]])
    loss = losses.router_z_loss(logits)
    np.testing.assert_allclose(ops.convert_to_numpy(loss), [1e6], rtol=1e-6)


@pytest.mark.parametrize("noise_std", [0, 0.0, -0.5])
def test_load_loss_needs_noise(noise_std):
    logits = ops.zeros((1, 2, 3))
    words = (
        f"The load loss needs noise.*Received: noise_std={noise_std}. "
        "Use a positive `noise_std`, or set the loss's weight to 0"
    )
    with pytest.raises(ValueError, match=words):
        losses.load_loss(logits, logits, noise_std, 1)
