"""`expert_choice_plan` against its slow definition."""

import functools

import keras
import numpy as np
import pytest
from keras import ops

from keras_vmoe.routing import expert_choice_plan
from keras_vmoe.routing.expert_choice import ExpertChoicePlan
from tests.gradients import compiled
from tests.gradients import value_and_gradients
from tests.routing.cases import GATES
from tests.routing.cases import check_layer
from tests.routing.cases import images_of
from tests.routing.cases import random_gates
from tests.routing.cases import random_layer
from tests.routing.cases import some_mask
from tests.routing.definitions import expert_choice_slowly
from tests.routing.definitions import experts_of_images_slowly


def make_plan(gates, capacity, mask=None):
    """A plan, compiled."""

    def fields(gates, mask=None):
        plan = expert_choice_plan(gates, capacity, mask)
        return plan.token, plan.weight, plan.mask

    arrays = (gates,) if mask is None else (gates, mask)
    return ExpertChoicePlan(*compiled(fields)(*arrays))


def test_three_tokens():
    # Expert 0 likes the last token best, then the first; expert 1 the second.
    gates = np.array([[[0.6, 0.4], [0.5, 0.5], [0.9, 0.1]]], "float32")
    plan = make_plan(gates, 2)
    assert ops.convert_to_numpy(plan.token).tolist() == [[[2, 0], [1, 0]]]
    np.testing.assert_allclose(
        ops.convert_to_numpy(plan.weight), [[[0.9, 0.6], [0.5, 0.4]]], rtol=1e-6
    )
    assert float(plan.dropped_share()) == 0.0
    # With one slot each, no expert takes the first token.
    plan = make_plan(gates, 1)
    assert float(plan.dropped_share()) == pytest.approx(1 / 3)


def test_the_earlier_of_equal_tokens():
    plan = make_plan(np.full((1, 5, 2), 0.5, "float32"), 3)
    assert ops.convert_to_numpy(plan.token).tolist() == [[[0, 1, 2]] * 2]


CASES = [
    ("random", 4, None),
    ("random", 4, some_mask()),
    ("random", 9, None),
    ("random", 9, some_mask()),
    ("random", 1, None),
    ("ties", 4, some_mask()),
    ("ties", 4, None),
    ("an empty and an overflowing expert", 4, some_mask()),
]
ALL_CASES = [
    (name, capacity, mask)
    for name in GATES
    for capacity in (1, 2, 4, 8, 9)
    for mask in (None, some_mask())
]
# One expert; one token; both; nobody at all.
SMALL_CASES = [
    (random_gates(2, 5, 1), 3, None),
    (random_gates(1, 1, 3), 1, None),
    (random_gates(1, 1, 1), 1, None),
    (random_gates(1, 1, 3), 1, np.zeros((1, 1), bool)),
]


def with_gates(cases):
    return [(GATES[name], *rest) for name, *rest in cases]


@pytest.mark.parametrize("gates, capacity, mask", with_gates(CASES))
def test_values_and_gradients(gates, capacity, mask):
    check_plan(gates, capacity, mask)


@pytest.mark.parametrize("gates, capacity, mask", SMALL_CASES)
def test_small_groups(gates, capacity, mask):
    check_plan(gates, capacity, mask)


@pytest.mark.slow
@pytest.mark.parametrize("gates, capacity, mask", with_gates(ALL_CASES))
def test_every_combination(gates, capacity, mask):
    check_plan(gates, capacity, mask)


def check_plan(gates, capacity, mask):
    dispatch, combine = expert_choice_slowly(gates, capacity, mask)
    more, tokens = check_layer(
        fast_layer(capacity), gates, capacity, dispatch, mask
    )
    token, weight, buffers, combined, dropped, share, used = more
    np.testing.assert_array_equal(one_hot(token, dispatch), dispatch)
    np.testing.assert_allclose(weight, combine.sum(axis=1), rtol=1e-6)
    assert token.min() >= 0 and token.max() <= gates.shape[1]
    expected = np.einsum("gsec,gsd->gecd", dispatch, tokens)
    np.testing.assert_allclose(buffers, expected, rtol=1e-6)
    # Empty slots may hold anything: no token ever looks at them.
    scale = random_layer(gates)[2]
    expected = np.einsum("gsec,gecd->gsd", combine, np.cos(expected + scale))
    np.testing.assert_allclose(combined, expected, rtol=1e-5, atol=1e-6)

    kept = np.ones(gates.shape[:2], bool) if mask is None else mask
    chosen = dispatch.any(axis=(2, 3))
    expected = (kept & ~chosen).sum() / max(1, kept.sum())
    assert float(dropped) == pytest.approx(expected, abs=1e-6)
    filled = dispatch.sum(axis=(0, 1, 3))
    expected = filled / max(1, filled.sum())
    np.testing.assert_allclose(share, expected, rtol=1e-6)
    np.testing.assert_array_equal(
        used, experts_of_images_slowly(dispatch, images_of(gates))
    )


@functools.lru_cache
def fast_layer(capacity):
    """A MoE layer by the plan; returns its loss and what is in the plan."""

    def layer(gates, tokens, scale, probe, mask=None):
        plan = expert_choice_plan(gates, capacity, mask)
        buffers = plan.dispatch(tokens)
        loss = ops.sum(probe * plan.combine(ops.tanh(scale * buffers)))
        combined = plan.combine(ops.cos(buffers + scale))
        figures = (plan.dropped_share(), plan.load_share())
        used = plan.experts_of_images(images_of(gates))
        fields = (plan.token, plan.weight, buffers, combined)
        return loss, (*fields, *figures, used)

    return layer


def one_hot(token, like):
    dispatch = np.zeros(like.shape)
    for g, e, c in np.ndindex(token.shape):
        if token[g, e, c] < like.shape[1]:
            dispatch[g, token[g, e, c], e, c] = 1.0
    return dispatch


def test_gradient_of_buffers_reaches_filled_slots_only():
    gates, mask = GATES["random"], some_mask()
    _, combine = expert_choice_slowly(gates, 8, mask)
    plan = make_plan(gates, 8, mask)
    generator = np.random.default_rng(4)
    buffers = generator.normal(size=(2, 4, 8, 3)).astype("float32")
    probe = generator.normal(size=(2, 9, 3)).astype("float32")
    _, (gradient,) = value_and_gradients(
        lambda buffers, probe: ops.sum(plan.combine(buffers) * probe),
        buffers,
        constants=(probe,),
    )
    expected = np.einsum("gsec,gsd->gecd", combine, probe)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)


def test_gates_of_zero_stand_before_masked_tokens():
    # A softmax may underflow to 0: such a token still goes before a masked one.
    gates = np.zeros((1, 3, 1), "float32")
    plan = make_plan(gates, 2, np.array([[False, True, True]]))
    assert ops.convert_to_numpy(plan.token).tolist() == [[[1, 2]]]


def test_a_masked_nan_token_spoils_nobody():
    gates, mask = random_gates(), np.ones((2, 9), bool)
    mask[:, 5] = False
    tokens = random_layer(gates)[0]
    tokens[:, 5], gates[:, 5] = np.nan, np.nan
    plan = make_plan(gates, 9, mask)
    buffers = plan.dispatch(ops.convert_to_tensor(tokens))
    assert np.isfinite(ops.convert_to_numpy(buffers)).all()
    assert np.isfinite(ops.convert_to_numpy(plan.combine(buffers))).all()


def test_bfloat16_tokens_move_without_change():
    gates = GATES["random"]
    plan = make_plan(gates, 9)
    tokens = ops.cast(random_layer(gates)[0], "bfloat16")
    buffers = plan.dispatch(tokens)
    out = plan.combine(buffers)
    for tensor in (buffers, out):
        assert keras.backend.standardize_dtype(tensor.dtype) == "bfloat16"
    # Everybody takes every token: the gates add up to 1.
    np.testing.assert_allclose(
        ops.convert_to_numpy(ops.cast(out, "float32")),
        ops.convert_to_numpy(ops.cast(tokens, "float32")),
        rtol=2**-6,
    )


@pytest.mark.parametrize("capacity", [0, -3])
def test_bad_capacity(capacity):
    with pytest.raises(ValueError, match="`capacity` must be at least 1. "
                       f"Received: capacity={capacity}"):  # fmt: skip
        expert_choice_plan(ops.convert_to_tensor(GATES["random"]), capacity)
