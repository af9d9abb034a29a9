"""`dropless_plan` is `top_k_plan` with room for everybody."""

import functools

import numpy as np
import pytest
from keras import ops

from keras_vmoe.routing import dropless_plan
from keras_vmoe.routing import top_k_plan
from keras_vmoe.routing._blocks import block_size
from tests.gradients import compiled
from tests.gradients import value_and_gradients
from tests.routing.cases import GATES
from tests.routing.cases import check_layer
from tests.routing.cases import images_of
from tests.routing.cases import random_gates
from tests.routing.cases import random_layer
from tests.routing.cases import some_mask
from tests.routing.definitions import experts_of_images_slowly
from tests.routing.definitions import top_k_slowly


def one_expert_for_all(num_tokens):
    gates = np.full((2, num_tokens, 4), 0.1, "float32")
    gates[..., 2] = 0.7
    return gates


CASES = [
    (GATES["random"], 1, None),
    (GATES["random"], 2, some_mask()),
    (GATES["random"], 4, None),
    (GATES["ties"], 2, some_mask()),
    (GATES["an empty and an overflowing expert"], 1, None),
    (GATES["an empty and an overflowing expert"], 2, some_mask()),
    # Loads that fill their blocks to the last slot, and one more.
    (one_expert_for_all(8), 1, None),
    (one_expert_for_all(9), 2, None),
    # One expert; one token; both; nobody.
    (random_gates(2, 5, 1), 1, None),
    (random_gates(1, 1, 3), 2, None),
    (random_gates(1, 1, 1), 1, None),
    (random_gates(1, 1, 3), 2, np.zeros((1, 1), bool)),
    # Blocks of more than 8 slots, where the backend likes them.
    (random_gates(2, 66, 2), 1, None),
]
ALL_CASES = [
    (gates, num_selected_experts, mask)
    for gates in GATES.values()
    for num_selected_experts in (1, 2, 3, 4)
    for mask in (None, some_mask())
]
COLUMNS = "gates, num_selected_experts, mask"


@pytest.mark.parametrize(COLUMNS, CASES)
def test_values_and_gradients(gates, num_selected_experts, mask):
    check_plan(gates, num_selected_experts, mask)


@pytest.mark.slow
@pytest.mark.parametrize(COLUMNS, ALL_CASES)
def test_every_combination(gates, num_selected_experts, mask):
    check_plan(gates, num_selected_experts, mask)


def check_plan(gates, num_selected_experts, mask):
    groups, num_tokens, num_experts = gates.shape
    dispatch, _, load = top_k_slowly(
        gates, num_selected_experts, num_tokens, mask=mask
    )
    assert dispatch.sum() == load.sum(), "nobody is dropped"
    more, tokens = check_layer(
        fast_layer(num_selected_experts), gates, num_selected_experts,
        dispatch, mask,
    )  # fmt: skip
    rows, expert, choice, slot, got_load, share, dropped, used = more
    np.testing.assert_array_equal(got_load, load)
    assert float(dropped) == 0.0
    np.testing.assert_allclose(
        share, load.sum(axis=0) / max(1, load.sum()), rtol=1e-6
    )
    np.testing.assert_array_equal(
        used, experts_of_images_slowly(dispatch, images_of(gates))
    )
    # Blocks stand by expert, and each expert's hold what it would get.
    assert (np.diff(expert) >= 0).all()
    assert expert.min() >= 0 and expert.max() < num_experts
    total = groups * num_tokens * num_selected_experts
    assert choice.min() >= 0 and choice.max() <= total
    assert slot.min() >= 0 and slot.max() <= rows.shape[0] * rows.shape[1]
    assert (choice[0][choice[0] < total].size) == load.sum()
    flat = tokens.reshape(groups * num_tokens, -1)
    for m, t in np.ndindex(rows.shape[:2]):
        if choice[0, m, t] == total:
            assert not rows[m, t].any()
            continue
        s = choice[0, m, t] // num_selected_experts
        np.testing.assert_array_equal(rows[m, t], flat[s])
        g, s = divmod(s, num_tokens)
        assert dispatch[g, s, expert[m]].any()


@functools.lru_cache
def fast_layer(num_selected_experts):
    """A MoE layer by the plan; returns its loss and what is in the plan."""

    def layer(gates, tokens, scale, probe, mask=None):
        plan = dropless_plan(gates, num_selected_experts, mask)
        blocks = plan.dispatch(tokens)
        rows, expert = blocks.rows, blocks.expert
        out = ops.tanh(ops.take(scale, expert, axis=0) * rows)
        loss = ops.sum(probe * plan.combine(blocks._replace(rows=out)))
        figures = (plan.load, plan.load_share(), plan.dropped_share())
        used = plan.experts_of_images(images_of(gates))
        fields = (rows, expert, plan.sparse.choice, plan.sparse.slot)
        return loss, (*fields, *figures, used)

    return layer


def test_equal_to_top_k_with_a_slot_for_every_token():
    gates, mask = GATES["random"], some_mask()
    tokens = random_layer(gates)[0]

    def both(gates, tokens, mask):
        plan = dropless_plan(gates, 2, mask)
        full = top_k_plan(gates, 2, capacity=9, mask=mask)
        combined = [p.combine(p.dispatch(tokens)) for p in (plan, full)]
        return *combined, plan.load, full.load

    out, expected, load, expected_load = map(
        ops.convert_to_numpy, compiled(both)(gates, tokens, mask)
    )
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    np.testing.assert_array_equal(load, expected_load)


def test_selection_by_scores_weights_by_gates():
    gates = np.array([[[0.7, 0.2, 0.1]] * 2], "float32")
    scores = gates + np.array([0.0, 0.0, 1.0], "float32")

    def moved(gates, tokens, scores):
        plan = dropless_plan(gates, 1, scores=scores)
        return plan.combine(plan.dispatch(tokens)), plan.load

    out, load = compiled(moved)(gates, np.ones((1, 2, 3), "float32"), scores)
    assert ops.convert_to_numpy(load).tolist() == [[0, 0, 2]]
    np.testing.assert_allclose(ops.convert_to_numpy(out), 0.1, rtol=1e-6)


def test_gradient_of_rows_reaches_filled_slots_only():
    gates = GATES["an empty and an overflowing expert"]

    def loss(noise, tokens):
        plan = dropless_plan(gates_of(gates), 1)
        blocks = plan.dispatch(tokens)
        out = plan.combine(blocks._replace(rows=blocks.rows + noise))
        return ops.sum(out), (plan.sparse.choice, blocks.expert)

    tokens = random_layer(gates)[0]
    shape = (18 // 8 + 4, 8, 3)
    (_, (choice, expert)), (gradient,) = value_and_gradients(
        loss, np.zeros(shape, "float32"), constants=(tokens,)
    )
    best = gates.max(axis=-1).ravel()
    expected = np.append(best, 0.0)[choice[0]]
    np.testing.assert_allclose(gradient[..., 0], expected, rtol=1e-6)


def gates_of(array):
    return ops.convert_to_tensor(array)


def test_a_masked_nan_token_spoils_nobody():
    gates, mask = random_gates(), np.ones((2, 9), bool)
    mask[:, 5] = False
    tokens = random_layer(gates)[0]
    tokens[:, 5], gates[:, 5] = np.nan, np.nan

    def move(gates, tokens, mask):
        plan = dropless_plan(gates, 2, mask)
        return plan.combine(plan.dispatch(tokens))

    out = ops.convert_to_numpy(compiled(move)(gates, tokens, mask))
    assert np.isfinite(out).all()
    assert not out[:, 5].any()


@pytest.mark.parametrize("num_experts", [1, 2, 8, 64])
@pytest.mark.parametrize("num_choices", [1, 7, 100, 1576, 50432])
def test_there_are_always_blocks_enough(num_choices, num_experts):
    # The worst load: every expert opens a block for one choice too many.
    size = block_size(num_choices, num_experts)
    assert size % 8 == 0 and 8 <= size <= 256
    crumbs = min(num_experts - 1, num_choices)
    loads = [1] * crumbs + [num_choices - crumbs]
    needed = sum(-(-load // size) for load in loads)
    assert needed <= num_choices // size + num_experts


def test_bad_selection():
    with pytest.raises(ValueError, match="num_selected_experts=5 with"):
        dropless_plan(gates_of(GATES["random"]), 5)
