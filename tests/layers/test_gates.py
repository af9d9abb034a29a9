"""Gates against their definitions in numpy, and their precision."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_vmoe import layers
from tests.gradients import compiled
from tests.gradients import weight_gradients
from tests.harness import randomize
from tests.layers.definitions import float64
from tests.layers.definitions import logits_slowly
from tests.layers.definitions import softmax

GATES = {
    "linear": layers.LinearGate,
    "cosine": layers.CosineGate,
    "l2": layers.L2Gate,
}
NAMES = pytest.mark.parametrize("name", GATES)
LOWER = pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])


def tokens_of(*shape, seed=0):
    generator = np.random.default_rng(seed)
    return generator.normal(size=shape).astype("float32")


def check_logits(gate, tokens):
    logits = ops.convert_to_numpy(compiled(gate)(tokens))
    assert logits.dtype == "float32"
    expected = logits_slowly(gate, tokens)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "gate",
    [
        layers.LinearGate(5),
        layers.CosineGate(5),
        layers.L2Gate(5),
        layers.CosineGate(5, projection_dim=8, temperature=0.1),
        layers.L2Gate(1, projection_dim=1),
        layers.SoftGate(3, num_slots=2),
        layers.SoftGate(3, capacity_factor=2.0),
    ],
)
def test_definition(gate):
    gate.build((None, 6, 8))
    check_logits(randomize(gate), tokens_of(2, 6, 8))


@pytest.mark.parametrize("gate", [layers.CosineGate, layers.L2Gate])
def test_temperature_starts_as_set_and_is_clamped(gate):
    gate = gate(3, temperature=0.2, min_temperature=0.05)
    gate.build((None, None, 8))
    assert np.exp(-float64(gate.log_scale)) == pytest.approx(0.2, rel=1e-6)
    tokens = tokens_of(1, 4, 8)
    for temperature in (2.0, 0.05, 0.01, 1e-30):
        gate.log_scale.assign(-np.log(temperature))
        check_logits(gate, tokens)
    # Where it is clamped, nothing pulls it further.
    gradients = weight_gradients(
        gate, lambda: ops.sum(ops.square(gate(ops.convert_to_tensor(tokens))))
    )
    for path, gradient in gradients.items():
        assert gradient.any() == (not path.endswith("log_scale")), path


def test_cosine_of_large_and_of_zero_tokens():
    gate = layers.CosineGate(3, temperature=0.5)
    gate.build((None, None, 8))
    logits = compiled(gate)(1e6 * tokens_of(1, 4, 8))
    assert np.abs(ops.convert_to_numpy(logits)).max() <= 2.0 + 1e-5
    logits = compiled(gate)(np.zeros((1, 4, 8), "float32"))
    assert not ops.convert_to_numpy(logits).any()


@pytest.mark.parametrize(
    ("features", "projection_dim", "size"),
    [(8, None, 4), (1, None, 1), (600, None, 256), (8, 8, 8), (8, 3, 3)],
)
def test_size_of_the_projection(features, projection_dim, size):
    for gate in (layers.CosineGate, layers.L2Gate):
        gate = gate(3, projection_dim)
        gate.build((None, None, features))
        assert tuple(gate.kernel.shape) == (features, size)
        assert tuple(gate.codes.shape) == (size, 3)


@pytest.mark.parametrize(
    ("num_tokens", "settings", "slots"),
    [
        (49, {}, 16),  # 49 / 3 is 16.33.
        (50, {"capacity_factor": 0.5}, 8),  # 8.33
        (11, {"capacity_factor": 0.5}, 2),  # 1.83
        (49, {"num_slots": 2}, 2),
        (None, {"num_slots": 2}, 2),
    ],
)
def test_number_of_slots(num_tokens, settings, slots):
    gate = layers.SoftGate(3, **settings)
    gate.build((None, num_tokens, 8))
    assert tuple(gate.mu.shape) == (8, 3, slots)


def test_slots_start_as_if_each_were_alone():
    gate = layers.SoftGate(8, num_slots=16)
    gate.build((None, 128, 64))
    std = ops.convert_to_numpy(gate.mu).std()
    assert std == pytest.approx(64**-0.5, rel=0.05)
    assert float64(gate.scale) == 1.0


# Names.


@NAMES
def test_a_router_makes_the_gate_by_its_name(name):
    for router in (layers.TopKRouter, layers.ExpertChoiceRouter):
        gate = router(4, gate=name).gate_layer
        assert type(gate) is GATES[name] and gate.num_experts == 4


# Precision.


@LOWER
@pytest.mark.parametrize(
    "gate", [*GATES.values(), layers.SoftGate], ids=lambda gate: gate.__name__
)
def test_float32_under_every_policy(gate, policy):
    gate = gate(3, dtype=policy)
    gate.build((None, 6, 8))
    randomize(gate)
    tokens = ops.cast(tokens_of(2, 6, 8), policy.removeprefix("mixed_"))
    logits = compiled(gate)(tokens)
    assert keras.backend.standardize_dtype(logits.dtype) == "float32"
    for weight in gate.weights:
        assert keras.backend.standardize_dtype(weight.dtype) == "float32"
    expected = logits_slowly(gate, float64(tokens))
    np.testing.assert_allclose(
        ops.convert_to_numpy(logits), expected, rtol=1e-5, atol=1e-5
    )


def twin_routers(router, features=16, **arguments):
    """The same router under float32 and under mixed_bfloat16."""
    twins = []
    for policy in ("float32", "mixed_bfloat16"):
        twin = router(4, dtype=policy, **arguments)
        twin.build((None, 64, features))
        twins.append(randomize(twin))
    return twins


@NAMES
def test_decisions_of_bfloat16_tokens_are_those_of_float32_gates(name):
    # 512 tokens: with gates in bfloat16 some would choose otherwise.
    tokens = ops.cast(tokens_of(8, 64, 16), "bfloat16")
    exact, mixed = twin_routers(layers.TopKRouter, gate=name, capacity_factor=1)

    def choices(router):
        def call(tokens):
            plan = router(tokens)
            return plan.choice, plan.slot, plan.weight

        return map(ops.convert_to_numpy, compiled(call)(tokens))

    for got, expected in zip(choices(mixed), choices(exact), strict=True):
        np.testing.assert_array_equal(got, expected)
    gates = softmax(logits_slowly(exact.gate_layer, float64(tokens)))
    slot = ops.convert_to_numpy(compiled(lambda x: mixed(x).slot)(tokens))
    served = slot[..., 0] < 4 * 16
    np.testing.assert_array_equal(
        slot[served][:, 0] // 16, gates[served].argmax(axis=-1)
    )


ROUTERS = {
    **{name: (layers.TopKRouter, {"gate": name}) for name in GATES},
    "bias balanced": (layers.BiasBalancedRouter, {}),
    "dropless": (layers.TopKRouter, {"capacity_factor": "dropless"}),
    "expert choice": (layers.ExpertChoiceRouter, {}),
    "soft": (layers.SoftRouter, {"num_slots": 4}),
}


@pytest.mark.backends("tensorflow", "torch")
@pytest.mark.parametrize("name", ROUTERS)
def test_gradients_of_the_router_in_bfloat16_are_near_those_in_float32(name):
    router, arguments = ROUTERS[name]
    tokens = ops.cast(tokens_of(4, 64, 16), "bfloat16")
    tokens = ops.convert_to_tensor(float64(tokens), "float32")
    probe = ops.convert_to_tensor(tokens_of(4, 64, 16, seed=1))
    gradients = []
    for policy in ("float32", "mixed_bfloat16"):
        layer = layers.MoEMLP(
            4,
            32,
            router(4, dtype=policy, **arguments),
            images_per_group=1,
            dtype=policy,
        )
        layer.build((None, 64, 16))
        randomize(layer)

        def loss(layer=layer):
            out = layer(ops.cast(tokens, layer.compute_dtype))
            return ops.sum(ops.cast(out, "float32") * probe)

        found = weight_gradients(layer, loss)
        found = {k: v for k, v in found.items() if "router" in k or "gate" in k}
        assert found
        # Together: a scalar, such as a scale, is what cancelling terms leave.
        gradients.append(np.concatenate([np.ravel(x) for x in found.values()]))
    exact, mixed = gradients
    # Slots mix tokens in bfloat16: 2.1% on some processors under TensorFlow.
    tolerance = 0.03 if name == "soft" else 0.02
    assert np.linalg.norm(mixed - exact) < tolerance * np.linalg.norm(exact)


# Words.


@pytest.mark.parametrize("gate", [layers.CosineGate, layers.L2Gate])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"projection_dim": 0}, "`projection_dim` must be an integer of at "
         "least 1. Received: projection_dim=0"),
        ({"projection_dim": 2.5}, "Received: projection_dim=2.5"),
        ({"temperature": 0.0}, "must be positive numbers, the first not below "
         "the second. Received: temperature=0.0, min_temperature=0.01"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"min_temperature": 0.0}, "min_temperature=0.0"),
        ({"min_temperature": -0.1}, "min_temperature=-0.1"),
        ({"min_temperature": 0.6}, "temperature=0.5, min_temperature=0.6"),
    ],
)  # fmt: skip
def test_bad_projected_gate(gate, arguments, words):
    with pytest.raises(ValueError, match=words):
        gate(4, **arguments)


@pytest.mark.parametrize("gate", [layers.CosineGate, layers.L2Gate])
def test_projection_larger_than_the_tokens(gate):
    gate = gate(4, projection_dim=9)
    with pytest.raises(ValueError, match="must not be larger than the tokens' "
                       "features. Received: projection_dim=9 for 8 features. "
                       "The default is half"):  # fmt: skip
        gate.build((None, None, 8))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_slots": 0}, "`num_slots` must be an integer of at least 1. "
         "Received: num_slots=0"),
        ({"num_slots": 1.5}, "Received: num_slots=1.5"),
        ({"capacity_factor": 0.0}, "`capacity_factor` must be positive.*"
         "Received: capacity_factor=0.0"),
        ({"capacity_factor": "dropless"},
         "Received: capacity_factor='dropless'"),
        ({"num_experts": 0}, "`num_experts` must be an integer of at least 1. "
         "Received: num_experts=0"),
    ],
)  # fmt: skip
def test_bad_soft_gate(arguments, words):
    for maker in (layers.SoftGate, layers.SoftRouter):
        with pytest.raises(ValueError, match=words):
            maker(**{"num_experts": 4, **arguments})


@pytest.mark.parametrize(
    ("num_tokens", "words"),
    [
        (None, "number of tokens in an image, which must be known. Received: "
         "num_slots=None.*Set `num_slots`"),
        (1, "at least 1 slot. Received: num_experts=4, capacity_factor=1.0 "
         "and 1 tokens per image, which gives 0 slots"),
    ],
)  # fmt: skip
def test_slots_that_cannot_be_counted(num_tokens, words):
    gate = layers.SoftGate(4)
    with pytest.raises(ValueError, match=words):
        gate.build((None, num_tokens, 8))


@pytest.mark.parametrize("num_experts", [0, -1, 2.5])
@pytest.mark.parametrize("gate", GATES.values())
def test_gates_need_experts(gate, num_experts):
    with pytest.raises(ValueError, match="`num_experts` must be an integer"):
        gate(num_experts)


@pytest.mark.backends("torch")
def test_autocast_leaves_routing_in_float32():
    import torch

    tokens = torch.randn(4, 16, 32)
    routers = [layers.TopKRouter(8, 2, gate=name) for name in GATES]
    routers += [
        layers.TopKRouter(8, gate=keras.layers.Dense(8)),
        layers.ExpertChoiceRouter(8),
        layers.SoftRouter(8, num_slots=2),
    ]
    for router in routers:
        router.build(tokens.shape)
        right, plan = router.gate_layer(tokens), router(tokens)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if not isinstance(router.gate_layer, keras.layers.Dense):
                assert torch.equal(router.gate_layer(tokens), right)
            other = router(tokens)
        found = other.combine(other.dispatch(tokens))
        assert torch.equal(found, plan.combine(plan.dispatch(tokens)))
