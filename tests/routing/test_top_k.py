"""`top_k_plan` against its slow definition: values, then gradients."""

import functools

import keras
import numpy as np
import pytest
from keras import ops

from keras_vmoe.routing import dropless_plan
from keras_vmoe.routing import top_k_plan
from keras_vmoe.routing._selection import select_experts
from keras_vmoe.routing.plans import SparsePlan
from tests.gradients import compiled
from tests.gradients import value_and_gradients
from tests.harness import first_everywhere
from tests.routing.cases import GATES
from tests.routing.cases import images_of
from tests.routing.cases import random_gates
from tests.routing.cases import random_layer
from tests.routing.cases import slow_layer
from tests.routing.cases import some_mask
from tests.routing.definitions import experts_of_images_slowly
from tests.routing.definitions import one_hot_combine
from tests.routing.definitions import one_hot_dispatch
from tests.routing.definitions import top_k_slowly

# Three tokens, two experts, room for one token each. Everyone likes expert 0
# best; the last token is the surest of all.
THREE_TOKENS = np.array([[[0.6, 0.4], [0.7, 0.3], [0.9, 0.1]]], "float32")


@pytest.mark.parametrize(
    ("num_selected_experts", "batch_priority", "capacity", "served"),
    [
        # K = 1, vanilla: the first token takes the only slot of expert 0.
        (1, False, 1, {(0, 0): 0}),
        # K = 1, BPR: the surest token takes it.
        (1, True, 1, {(0, 0): 2}),
        # K = 2, vanilla: then the second choices fill expert 1, in order.
        (2, False, 1, {(0, 0): 0, (1, 0): 0}),
        # K = 2, BPR: second choices too are served in the order of the best
        # gate, although token 0 has the largest gate for expert 1.
        (2, True, 1, {(0, 0): 2, (1, 0): 2}),
        # Room for two: vanilla serves tokens 0 and 1, BPR serves 2 and 1.
        (1, False, 2, {(0, 0): 0, (0, 1): 1}),
        (1, True, 2, {(0, 0): 2, (0, 1): 1}),
        # Room for all: BPR changes who sits where, and nothing else.
        (1, False, 3, {(0, 0): 0, (0, 1): 1, (0, 2): 2}),
        (1, True, 3, {(0, 0): 2, (0, 1): 1, (0, 2): 0}),
    ],
)
def test_three_tokens(num_selected_experts, batch_priority, capacity, served):
    plan = make_plan(
        THREE_TOKENS, num_selected_experts, capacity, batch_priority, None
    )
    expected = np.zeros((1, 3, 2, capacity))
    for (expert, slot), token in served.items():
        expected[0, token, expert, slot] = 1.0
    np.testing.assert_array_equal(one_hot_dispatch(plan), expected)


def test_all_first_choices_come_before_any_second_choice():
    # Token 0 wants expert 0, then 1. Token 1 wants expert 1, then 0. Each
    # expert has one slot: both first choices are served, although token 0's
    # second choice stands before token 1's first.
    gates = np.array([[[0.9, 0.1], [0.3, 0.7]]], "float32")
    plan = make_plan(gates, 2, 1, False, None)
    weight = ops.convert_to_numpy(plan.weight)[0]
    np.testing.assert_allclose(weight, [[0.9, 0.0], [0.7, 0.0]], rtol=1e-6)


def test_combine_weights_are_not_renormalized():
    gates = np.array([[[0.5, 0.3, 0.2]]], "float32")
    plan = make_plan(gates, 2, 1, False, None)
    weight = ops.convert_to_numpy(plan.weight)[0, 0]
    np.testing.assert_allclose(weight, [0.5, 0.3], rtol=1e-6)


@pytest.mark.parametrize("dropless", [False, True])
@pytest.mark.parametrize("num_selected_experts", first_everywhere([2, 1, 4]))
def test_renormalised_weights(num_selected_experts, dropless):
    """Of every token they sum to 1 before any is dropped; masked ones get 0."""
    gates, mask = random_gates(2, 9, 4), some_mask()
    arguments = {"mask": ops.convert_to_tensor(mask), "renormalize": True}
    tensor = ops.convert_to_tensor(gates)
    if dropless:
        plan = dropless_plan(tensor, num_selected_experts, **arguments).sparse
    else:
        plan = top_k_plan(tensor, num_selected_experts, 4, True, **arguments)
        # Served in the order of the gates themselves.
        arguments["renormalize"] = False
        plain = top_k_plan(tensor, num_selected_experts, 4, True, **arguments)
        np.testing.assert_array_equal(
            ops.convert_to_numpy(plan.slot), ops.convert_to_numpy(plain.slot)
        )
    weight = ops.convert_to_numpy(plan.weight).reshape(2, 9, -1)
    best = -np.sort(-gates, axis=-1)[..., :num_selected_experts]
    expected = best / best.sum(axis=-1, keepdims=True) * mask[..., None]
    num_slots = plan.choice.shape[1] * plan.choice.shape[2]
    served = ops.convert_to_numpy(plan.slot).reshape(2, 9, -1) < num_slots
    np.testing.assert_allclose(weight, expected * served, rtol=1e-6)
    assert dropless or not served.all()


def test_gradient_of_renormalised_weights():
    """That of a softmax over the selected logits; of one weight 0."""
    gates, probe = random_gates(1, 3, 4), np.array([0.3, -1.0, 2.0])

    def ours(gates):
        plan = top_k_plan(gates, 2, 3, renormalize=True)
        first = plan.weight[0, :, 0] * ops.convert_to_tensor(probe, "float32")
        return ops.sum(first)

    _, (got,) = value_and_gradients(ours, gates)
    for s, row in enumerate(gates[0]):
        a, b = np.argsort(-row, kind="stable")[:2]
        expected = np.zeros(4)
        expected[a] = row[b] / (row[a] + row[b]) ** 2
        expected[b] = -row[a] / (row[a] + row[b]) ** 2
        np.testing.assert_allclose(got[0, s], probe[s] * expected, rtol=1e-4)

    def one(gates):
        return ops.sum(top_k_plan(gates, 1, 3, renormalize=True).weight)

    value, (got,) = value_and_gradients(one, gates)
    assert value == 3.0
    np.testing.assert_allclose(got, 0.0, atol=1e-6)


# What belongs together is in one row, since each new shape costs JAX seconds:
# (gates, K, C, BPR, mask).
CASES = [
    ("random", 1, 4, False, None),
    ("random", 1, 4, True, None),
    ("random", 2, 4, False, None),
    ("random", 2, 4, True, None),
    ("random", 2, 4, False, some_mask()),
    ("random", 2, 4, True, some_mask()),
    ("random", 2, 9, True, None),
    ("random", 4, 1, True, None),
    ("random", 4, 9, False, some_mask()),
    ("ties", 1, 4, False, None),
    ("ties", 1, 4, True, None),
    ("ties", 2, 4, True, some_mask()),
    ("ties", 4, 1, False, None),
    ("an empty and an overflowing expert", 1, 4, False, None),
    ("an empty and an overflowing expert", 1, 4, True, None),
    ("an empty and an overflowing expert", 2, 4, True, some_mask()),
]
ALL_CASES = [
    (name, num_selected_experts, capacity, batch_priority, mask)
    for name in GATES
    for num_selected_experts in (1, 2, 3, 4)
    for capacity in (1, 2, 4, 8, 9, 12)
    for batch_priority in (False, True)
    for mask in (None, some_mask())
]
# One expert; K = E; a single token; both at once. Gates first.
SMALL_CASES = [
    (random_gates(2, 5, 1), 1, 3, False, None),
    (random_gates(2, 5, 1), 1, 3, True, None),
    (random_gates(1, 1, 3), 2, 1, True, None),
    (random_gates(1, 1, 1), 1, 1, False, None),
    (random_gates(1, 1, 3), 3, 1, False, np.zeros((1, 1), bool)),
]
COLUMNS = "gates, num_selected_experts, capacity, batch_priority, mask"


def with_gates(cases):
    """Cases with the arrays in the place of their names."""
    return [(GATES[name], *rest) for name, *rest in cases]


@pytest.mark.parametrize(COLUMNS, with_gates(CASES) + SMALL_CASES)
def test_values_and_gradients(
    gates, num_selected_experts, capacity, batch_priority, mask
):
    check_plan(gates, mask, num_selected_experts, capacity, batch_priority)


def thinned(cases):
    """A quarter of the cases, all of them under PyTorch: the same operations,
    which JAX compiles for each shape.
    """
    marks = [[], *3 * [[pytest.mark.backends("torch")]]]
    return [
        pytest.param(*case, marks=marks[i % 4]) for i, case in enumerate(cases)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(COLUMNS, thinned(with_gates(ALL_CASES)))
def test_every_combination(
    gates, num_selected_experts, capacity, batch_priority, mask
):
    check_plan(gates, mask, num_selected_experts, capacity, batch_priority)


def check_plan(gates, mask, *settings):
    """A plan, its two moves and their gradients against the definition.

    The experts are `tanh(scale_e * x)`, so that the buffers matter to them.
    """
    dispatch, combine, load = top_k_slowly(gates, *settings, mask=mask)
    tokens, probe, scale = random_layer(gates)
    fast = fast_layer(*settings)
    constants = (probe,) if mask is None else (probe, mask)
    (value, more), gradients = value_and_gradients(
        fast, gates, tokens, scale, constants=constants
    )
    plan = SparsePlan(*more[:4])
    np.testing.assert_array_equal(one_hot_dispatch(plan), dispatch)
    np.testing.assert_allclose(one_hot_combine(plan), combine, rtol=1e-6)
    np.testing.assert_array_equal(plan.load, load)
    check_both_ends(plan)
    check_figures(dispatch, load, *more[4:6])
    used = experts_of_images_slowly(dispatch, more[8].shape[1])
    np.testing.assert_array_equal(more[8], used)

    buffers = np.einsum("gsec,gsd->gecd", dispatch, tokens)
    np.testing.assert_allclose(more[6], buffers, rtol=1e-6)
    # Empty slots may hold anything: no token ever looks at them.
    combined = np.einsum("gsec,gecd->gsd", combine, np.cos(buffers + scale))
    np.testing.assert_allclose(more[7], combined, rtol=1e-5, atol=1e-6)

    expected_value, expected = value_and_gradients(
        slow_layer, gates, tokens, scale, constants=(probe, dispatch)
    )
    assert value == pytest.approx(expected_value, rel=1e-5, abs=1e-6)
    for name, got, want in zip(
        ("gates", "tokens", "scale"), gradients, expected, strict=True
    ):
        np.testing.assert_allclose(
            got, want, rtol=1e-5, atol=1e-6, err_msg=name
        )


@functools.lru_cache
def fast_layer(*settings):
    """A MoE layer by the plan; returns its loss and what is in the plan."""

    def layer(gates, tokens, scale, probe, mask=None):
        plan = top_k_plan(gates, *settings, mask=mask)
        buffers = plan.dispatch(tokens)
        loss = ops.sum(probe * plan.combine(ops.tanh(scale * buffers)))
        fields = (plan.choice, plan.slot, plan.weight, plan.load)
        figures = (plan.dropped_share(), plan.load_share())
        moved = (buffers, plan.combine(ops.cos(buffers + scale)))
        used = plan.experts_of_images(images_of(gates))
        return loss, (*fields, *figures, *moved, used)

    return layer


def check_figures(dispatch, load, dropped_share, load_share):
    total = load.sum()
    dropped = (total - dispatch.sum()) / total if total else 0.0
    share = load.sum(axis=0) / total if total else np.zeros(load.shape[1])
    assert float(dropped_share) == pytest.approx(dropped, abs=1e-6)
    np.testing.assert_allclose(load_share, share, rtol=1e-6)


def check_both_ends(plan):
    """Every choice that has a slot is the one that the slot names."""
    slot, choice = plan.slot, plan.choice
    groups, num_experts, capacity = choice.shape
    total = slot[0].size
    for g in range(groups):
        from_tokens = {
            (i, place)
            for i, place in enumerate(slot[g].ravel())
            if place < num_experts * capacity
        }
        from_buffers = {
            (i, place) for place, i in enumerate(choice[g].ravel()) if i < total
        }
        assert from_tokens == from_buffers
    assert slot.min() >= 0 and slot.max() <= num_experts * capacity
    assert choice.min() >= 0 and choice.max() <= total


def make_plan(gates, num_selected_experts, capacity, batch_priority, mask):
    """A plan, compiled."""

    def fields(gates, mask=None):
        plan = top_k_plan(
            gates,
            num_selected_experts,
            capacity,
            batch_priority=batch_priority,
            mask=mask,
        )
        return plan.choice, plan.slot, plan.weight, plan.load

    arrays = (gates,) if mask is None else (gates, mask)
    return SparsePlan(*compiled(fields)(*arrays))


def random_tokens(gates):
    return random_layer(gates)[0]


def test_gradient_of_buffers_reaches_served_slots_only():
    gates = GATES["an empty and an overflowing expert"]
    dispatch, combine, _ = top_k_slowly(gates, 1, 4)
    generator = np.random.default_rng(4)
    buffers = generator.normal(size=(2, 4, 4, 3)).astype("float32")
    probe = generator.normal(size=(2, 9, 3)).astype("float32")
    plan = make_plan(gates, 1, 4, False, None)
    _, (gradient,) = value_and_gradients(
        lambda buffers, probe: ops.sum(plan.combine(buffers) * probe),
        buffers,
        constants=(probe,),
    )
    expected = np.einsum("gsec,gsd->gecd", combine, probe)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)
    assert not gradient[:, 0].any(), "expert 0 is empty"


def test_a_nan_token_spoils_nobody_else():
    # Empty slots and dropped choices are filled with zeros, not multiplied
    # by zero: what a masked token holds never leaks.
    gates = random_gates()
    mask = np.ones((2, 9), bool)
    mask[:, 5] = False
    tokens = random_tokens(gates)
    tokens[:, 5] = np.nan
    plan = make_plan(gates, 2, 4, False, mask)
    buffers = plan.dispatch(ops.convert_to_tensor(tokens))
    assert np.isfinite(ops.convert_to_numpy(buffers)).all()
    assert np.isfinite(ops.convert_to_numpy(plan.combine(buffers))).all()


def test_bfloat16_tokens_move_without_change():
    gates = GATES["random"]
    plan = make_plan(gates, 1, 9, False, None)
    tokens = ops.cast(random_tokens(gates), "bfloat16")
    buffers = plan.dispatch(tokens)
    assert keras.backend.standardize_dtype(buffers.dtype) == "bfloat16"
    out = plan.combine(buffers)
    assert keras.backend.standardize_dtype(out.dtype) == "bfloat16"
    # With room for all, each token comes back times its best gate, rounded.
    expected = ops.cast(tokens, "float32") * gates.max(-1)[..., None]
    np.testing.assert_allclose(
        ops.convert_to_numpy(ops.cast(out, "float32")),
        ops.convert_to_numpy(expected),
        rtol=2**-7,
    )


def test_bfloat16_gradients_are_those_of_float32_rounded():
    gates = GATES["random"]
    tokens = random_tokens(gates)

    def loss(gates, tokens):
        plan = make_plan(gates, 2, 4, True, None)
        tokens = ops.cast(tokens, "bfloat16")
        out = plan.combine(plan.dispatch(tokens))
        return ops.sum(ops.cast(out, "float32"))

    _, (d_gates, d_tokens) = value_and_gradients(loss, gates, tokens)
    dispatch, combine, _ = top_k_slowly(gates, 2, 4, True)
    np.testing.assert_allclose(
        d_tokens[..., 0], combine.sum(axis=(2, 3)), rtol=2**-6
    )
    served = dispatch.sum(axis=3)
    expected = served * tokens.sum(-1, keepdims=True)
    np.testing.assert_allclose(d_gates, expected, rtol=2**-5, atol=2**-5)


def test_selection_is_stable_and_its_gradient_reaches_selected_scores():
    scores = np.array([[[0.3, 0.5, 0.5, 0.1], [0.2, 0.2, 0.2, 0.2]]], "float32")
    experts, values = select_experts(ops.convert_to_tensor(scores), 3)
    assert ops.convert_to_numpy(experts).tolist() == [[[1, 2, 0], [0, 1, 2]]]
    np.testing.assert_allclose(
        ops.convert_to_numpy(values), [[[0.5, 0.5, 0.3], [0.2, 0.2, 0.2]]]
    )
    weights = np.array([1.0, 10.0, 100.0], "float32")

    def loss(scores, weights):
        return ops.sum(select_experts(scores, 3)[1] * weights)

    _, (gradient,) = value_and_gradients(loss, scores, constants=(weights,))
    expected = [[[100.0, 1.0, 10.0, 0.0], [1.0, 10.0, 100.0, 0.0]]]
    np.testing.assert_allclose(gradient, expected)


def test_selection_of_all_experts_when_scores_underflow():
    # Softmax gives exact zeros; no expert may be chosen twice.
    scores = ops.convert_to_tensor([[[0.0, 1.0, 0.0, 0.0]]])
    experts, _ = select_experts(scores, 4)
    assert ops.convert_to_numpy(experts).tolist() == [[[1, 0, 2, 3]]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 1), "num_selected_experts=0 with num_experts=4"),
        ((5, 1), "between 1 and the number of experts.*Received: "
         "num_selected_experts=5 with num_experts=4"),
        ((1.0, 1), "num_selected_experts=1.0"),
        ((1, 0), "`capacity` must be at least 1. Received: capacity=0"),
        ((1, -3), "Received: capacity=-3"),
    ],
)  # fmt: skip
def test_bad_input(arguments, words):
    with pytest.raises(ValueError, match=words):
        top_k_plan(ops.convert_to_tensor(GATES["random"]), *arguments)
