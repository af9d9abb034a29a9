"""`soft_plan` against its slow definition."""

import numpy as np
import pytest
from keras import ops

from keras_vmoe.routing import soft_plan
from keras_vmoe.routing.soft import SoftPlan
from tests.gradients import compiled
from tests.gradients import numeric_gradient
from tests.gradients import value_and_gradients
from tests.routing.cases import some_mask
from tests.routing.definitions import soft_slowly


def random_arrays(groups=2, num_tokens=9, num_experts=4, num_slots=2):
    """Logits, tokens, a probe of their shape and the experts' scales."""
    generator = np.random.default_rng(0)
    tokens = (groups, num_tokens, 3)
    shapes = (
        (groups, num_tokens, num_experts, num_slots),
        tokens,
        tokens,
        (num_experts, 1, 3),
    )
    return [generator.normal(size=s).astype("float32") for s in shapes]


CASES = [
    ((), None),
    ((), some_mask()),
    # One expert with one slot; one token; all at once; one masked token.
    ((2, 9, 1, 1), some_mask()),
    ((2, 1, 4, 2), None),
    ((1, 1, 1, 1), None),
    ((1, 1, 4, 2), np.zeros((1, 1), bool)),
    # More slots than tokens.
    ((1, 3, 2, 5), None),
]


def fast_layer(logits, tokens, scale, probe, mask=None):
    plan = soft_plan(logits, mask)
    buffers = plan.dispatch(tokens)
    loss = ops.sum(probe * plan.combine(ops.tanh(scale * buffers)))
    weights = (plan.dispatch_weight, plan.combine_weight)
    figures = (plan.load_share(), plan.dropped_share())
    return loss, (*weights, *figures, plan.experts_of_images(1))


def slow_layer(logits, tokens, scale, probe, mask=None):
    dispatch, combine = soft_slowly(logits, mask)
    buffers = np.tanh(scale * np.einsum("gsep,gsd->gepd", dispatch, tokens))
    return (probe * np.einsum("gsep,gepd->gsd", combine, buffers)).sum()


@pytest.mark.parametrize("sizes, mask", CASES)
def test_values_and_gradients(sizes, mask):
    arrays = logits, tokens, probe, scale = random_arrays(*sizes)
    constants = (probe,) if mask is None else (probe, mask)
    (value, more), gradients = value_and_gradients(
        fast_layer, logits, tokens, scale, constants=constants
    )
    dispatch, combine, share, dropped, used = more
    expected_dispatch, expected_combine = soft_slowly(logits, mask)
    # What a group of padding only has in its slots goes nowhere.
    kept = np.ones(logits.shape[:2], bool) if mask is None else mask
    real = kept.any(axis=1)
    np.testing.assert_allclose(
        dispatch[real], expected_dispatch[real], rtol=1e-5, atol=1e-7
    )
    assert np.isfinite(dispatch).all()
    np.testing.assert_allclose(combine, expected_combine, rtol=1e-5, atol=1e-7)
    total = expected_combine.sum()
    expected = expected_combine.sum(axis=(0, 1, 3)) / max(1, total)
    np.testing.assert_allclose(share, expected, rtol=1e-5)
    assert float(dropped) == 0.0
    assert used.all() and used.shape == (len(logits), 1, logits.shape[2])

    assert value == pytest.approx(
        slow_layer(logits, tokens, scale, probe, mask), rel=1e-5, abs=1e-6
    )
    arrays = [logits, tokens, scale]
    for i, gradient in enumerate(gradients):

        def slow(array, i=i):
            replaced = [*arrays[:i], array, *arrays[i + 1 :]]
            return slow_layer(*replaced, probe, mask)

        expected = numeric_gradient(slow, arrays[i])
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


def test_weights_sum_to_one():
    plan = SoftPlan(*compiled(weights_of)(random_arrays()[0], some_mask()))
    dispatch, combine = map(
        ops.convert_to_numpy, (plan.dispatch_weight, plan.combine_weight)
    )
    np.testing.assert_allclose(dispatch[0].sum(axis=0), 1.0, rtol=1e-6)
    np.testing.assert_allclose(
        combine.sum(axis=(2, 3)), some_mask().astype("float32"), rtol=1e-6
    )
    assert not dispatch[0, ~some_mask()[0]].any()


def weights_of(logits, mask=None):
    plan = soft_plan(logits, mask)
    return plan.dispatch_weight, plan.combine_weight


def test_large_logits_do_not_overflow():
    logits = 1e4 * random_arrays()[0]
    for weight in compiled(weights_of)(logits):
        assert np.isfinite(ops.convert_to_numpy(weight)).all()


def test_a_masked_nan_token_spoils_nobody():
    logits, tokens, *_ = random_arrays()
    mask = np.ones((2, 9), bool)
    mask[:, 5] = False
    tokens[:, 5], logits[:, 5] = np.nan, np.nan

    def move(logits, tokens, mask):
        plan = soft_plan(logits, mask)
        return plan.combine(plan.dispatch(tokens))

    out = ops.convert_to_numpy(compiled(move)(logits, tokens, mask))
    assert np.isfinite(out).all()
    assert not out[:, 5].any()
