"""Routing decisions and losses of the reference program, to the last token.

Gates, noise and losses were computed once by the authors' own V-MoE code for
two groups of 68 tokens and 8 experts, under seven configurations; those of
expert choice for two groups of 64 tokens and 4 experts, and those of Soft MoE
for two images of 49 tokens, 4 experts and 5 slots.
"""

import json
import pathlib

import numpy as np
import pytest
from keras import ops

from keras_vmoe import layers
from keras_vmoe import losses
from keras_vmoe.routing import capacity
from keras_vmoe.routing import expert_choice_plan
from keras_vmoe.routing import top_k_plan
from keras_vmoe.routing.plans import SparsePlan
from tests.gradients import compiled
from tests.routing.definitions import expert_choice_slowly
from tests.routing.definitions import one_hot_dispatch

FOLDER = pathlib.Path(__file__).parent
GOLDEN = dict(np.load(FOLDER / "routing_top_k.npz"))
CONFIGS = json.loads((FOLDER / "routing_top_k.json").read_text())
CHOICE = dict(np.load(FOLDER / "routing_expert_choice.npz"))
CHOICE_CONFIGS = json.loads((FOLDER / "routing_expert_choice.json").read_text())
SOFT = dict(np.load(FOLDER / "routing_soft.npz"))


def eagerly(function):
    return lambda *arrays: function(*map(ops.convert_to_tensor, arrays))


def slow_after(number, values):
    """All but the first few are slow."""
    slow = [pytest.param(v, marks=pytest.mark.slow) for v in values[number:]]
    return [*values[:number], *slow]


# Eager JAX compiles each operation, and so is slow.
EAGERLY = [
    pytest.param(eagerly, marks=pytest.mark.backends("tensorflow", "torch")),
    pytest.param(
        eagerly, marks=[pytest.mark.slow, pytest.mark.backends("jax")]
    ),
]
HOW = pytest.mark.parametrize("how", [compiled, *EAGERLY])
EACH = pytest.mark.parametrize("number", range(len(CONFIGS)))


def places(config):
    return capacity(
        GOLDEN["gates"].shape[1],
        GOLDEN["gates"].shape[2],
        config["num_selected_experts"],
        config["capacity_factor"],
    )


@EACH
def test_decisions_and_outputs(number):
    check_decisions_and_outputs(compiled, number)


# The first with K = 1, the fourth with K = 2 and BPR.
@pytest.mark.parametrize("number", slow_after(2, [0, 3, 1, 2, 4, 5, 6]))
def test_decisions_and_outputs_eager(number):
    check_decisions_and_outputs(eagerly, number)


def check_decisions_and_outputs(how, number):
    config = CONFIGS[number]

    def layer(gates, tokens, scale):
        plan = top_k_plan(
            gates,
            config["num_selected_experts"],
            places(config),
            config["batch_priority"],
        )
        combined = plan.combine(plan.dispatch(tokens) * scale)
        fields = (plan.choice, plan.slot, plan.weight, plan.load)
        return fields, combined, plan.dropped_share()

    fields, combined, dropped_share = how(layer)(
        GOLDEN["gates"], GOLDEN["data"], GOLDEN["expert_scale"]
    )
    shape = GOLDEN[f"c{number}/dispatch_shape"]
    dispatch = np.unpackbits(GOLDEN[f"c{number}/dispatch"])
    dispatch = dispatch[: np.prod(shape)].reshape(shape)
    np.testing.assert_array_equal(
        one_hot_dispatch(SparsePlan(*fields)), dispatch
    )
    np.testing.assert_allclose(
        ops.convert_to_numpy(combined),
        GOLDEN[f"c{number}/combined"],
        rtol=1e-5,
        atol=1e-7,
    )
    # Theirs counts choices as well.
    dropped = 1 - dispatch.sum() / (2 * 68 * config["num_selected_experts"])
    assert float(dropped_share) == pytest.approx(dropped, abs=1e-6)


@pytest.mark.backends("torch")
@EACH
def test_capacity(number):
    assert places(CONFIGS[number]) == CONFIGS[number]["capacity"]


@HOW
def test_gates(how):
    for logits, gates in (
        (GOLDEN["logits"], GOLDEN["gates"]),
        (GOLDEN["logits"] + GOLDEN["noise"], GOLDEN["gates_noisy"]),
    ):
        got = ops.convert_to_numpy(how(ops.softmax)(logits))
        np.testing.assert_allclose(got, gates, rtol=1e-5)


@HOW
@pytest.mark.parametrize(
    ("loss", "gates", "name"),
    [
        (losses.importance_loss, "gates", "importance_loss"),
        (losses.gshard_loss, "gates", "gshard_loss"),
        (losses.gshard_loss, "gates_noisy", "gshard_loss_noisy"),
    ],
)
def test_losses_of_gates(how, loss, gates, name):
    values = ops.convert_to_numpy(how(loss)(GOLDEN[gates]))
    np.testing.assert_allclose(values, GOLDEN[name], rtol=1e-5)


@HOW
@EACH
def test_load_loss(how, number):
    selected = CONFIGS[number]["num_selected_experts"]
    noise_std = float(GOLDEN["noise_std"])
    assert noise_std == 1.0 / 8

    def loss(logits, noisy_logits):
        return losses.load_loss(logits, noisy_logits, noise_std, selected)

    noisy_logits = GOLDEN["logits"] + GOLDEN["noise"]
    values = how(loss)(GOLDEN["logits"], noisy_logits)
    np.testing.assert_allclose(
        ops.convert_to_numpy(values), GOLDEN[f"c{number}/load_loss"], rtol=1e-5
    )


# Expert choice.


@HOW
@pytest.mark.parametrize("number", range(len(CHOICE_CONFIGS)))
def test_expert_choice(how, number):
    config, logits = CHOICE_CONFIGS[number], CHOICE["logits"]
    places = capacity(64, 4, 1, config["capacity_factor"])
    assert places == config["capacity"]

    def layer(logits, tokens, scale):
        plan = expert_choice_plan(ops.softmax(logits), places)
        combined = plan.combine(plan.dispatch(tokens) * scale)
        return combined, plan.token, plan.dropped_share()

    combined, token, dropped_share = how(layer)(
        logits, CHOICE["data"], CHOICE["expert_scale"]
    )
    np.testing.assert_allclose(
        ops.convert_to_numpy(combined),
        CHOICE[f"c{number}/combined"],
        rtol=1e-5,
        atol=1e-6,
    )
    experts_per_token = CHOICE[f"c{number}/experts_per_token"]
    token = ops.convert_to_numpy(token)
    count = [np.bincount(places.ravel(), minlength=64) for places in token]
    np.testing.assert_array_equal(count, experts_per_token)
    dropped = np.mean(experts_per_token == 0)
    assert float(dropped_share) == pytest.approx(dropped, abs=1e-6)


@pytest.mark.backends("torch")
def test_the_slow_definition_of_expert_choice():
    gates = np.exp(CHOICE["logits"].astype("float64"))
    gates /= gates.sum(axis=-1, keepdims=True)
    for number, config in enumerate(CHOICE_CONFIGS):
        dispatch, combine = expert_choice_slowly(gates, config["capacity"])
        np.testing.assert_array_equal(
            dispatch.sum(axis=(2, 3)), CHOICE[f"c{number}/experts_per_token"]
        )
        scale = np.einsum("gsec,eod->gsd", combine, CHOICE["expert_scale"])
        np.testing.assert_allclose(
            CHOICE["data"] * scale,
            CHOICE[f"c{number}/combined"],
            rtol=1e-5,
            atol=1e-6,
        )


# Soft MoE.


@HOW
def test_soft(how):
    router = layers.SoftRouter(num_experts=4, num_slots=5)
    router.build(SOFT["input"].shape)
    router.gate_layer.mu.assign(SOFT["mu"])
    router.gate_layer.scale.assign(SOFT["scale"])

    def layer(tokens, scale):
        plan = router(tokens)
        combined = plan.combine(plan.dispatch(tokens) * scale)
        return plan.dispatch_weight, plan.combine_weight, combined

    got = how(layer)(SOFT["input"], SOFT["expert_scale"])
    names = ("dispatch_weights", "combine_weights", "combined")
    for tensor, name in zip(got, names, strict=True):
        np.testing.assert_allclose(
            ops.convert_to_numpy(tensor),
            SOFT[name],
            rtol=1e-5,
            atol=1e-6,
            err_msg=name,
        )
