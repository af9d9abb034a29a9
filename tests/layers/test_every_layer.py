"""Every public layer passes through the harness, with every flag."""

import inspect

import keras
import numpy as np
import pytest
from keras import ops

from keras_vmoe import layers
from keras_vmoe.layers import attention
from keras_vmoe.layers import ensemble
from keras_vmoe.layers import patches
from keras_vmoe.layers import pooling
from keras_vmoe.layers import positions
from keras_vmoe.layers import stochastic
from keras_vmoe.layers import windows
from keras_vmoe.layers.attention import MultiHeadAttention
from keras_vmoe.layers.normalization import LayerNormalization
from keras_vmoe.layers.top_k_router import BalanceBias
from tests.gradients import compiled
from tests.harness import Case
from tests.harness import arguments_of
from tests.harness import check_config
from tests.harness import check_gradients
from tests.harness import check_outputs
from tests.harness import check_policy

TOKENS = (3, 6, 8)


def moe(label, router=None, **arguments):
    """A MoE layer; in training each of its 3 experts gets some of 18 tokens."""
    arguments = {"num_experts": 3, "hidden_dim": 5, **arguments}
    if isinstance(router, dict):
        router = layers.TopKRouter(3, **router)
    if router is not None:
        arguments["router"] = router
    layer = layers.MoEMLP
    if "shared_hidden_dim" in arguments:
        layer = layers.SharedExpertMoEMLP
    return Case(layer, arguments, TOKENS, label=f"{layer.__name__} {label}")


ROUTER_FLAGS = {
    "num_selected_experts": 2,
    "capacity_factor": 1.5,
    "batch_priority": True,
    "renormalize": True,
    "noise_std": 0.5,
    "importance_loss_weight": 0.1,
    "load_loss_weight": 0.2,
    "gshard_loss_weight": 0.3,
    "z_loss_weight": 0.4,
    "local_entropy_loss_weight": 0.5,
    "global_entropy_loss_weight": 0.6,
    "min_experts": 2.5,
    "seed": 7,
}
BIAS_FLAGS = {
    "update_rate": 0.1,
    "importance_loss_weight": 0.1,
    "load_loss_weight": 0.2,
}
CHOICE_FLAGS = {
    "capacity_factor": 1.5,
    "noise_std": 0.5,
    "z_loss_weight": 0.4,
    "seed": 7,
}
SOFT_FLAGS = {
    "num_slots": 2,
    "noise_std": 0.5,
    "seed": 7,
}
KERNEL_FLAGS = {
    "kernel_initializer": keras.initializers.HeNormal(seed=1),
    "kernel_regularizer": keras.regularizers.L2(0.1),
    "kernel_constraint": keras.constraints.MaxNorm(2.0),
}
WEIGHT_FLAGS = {
    **KERNEL_FLAGS,
    "bias_initializer": keras.initializers.RandomNormal(stddev=0.1, seed=2),
    "bias_regularizer": keras.regularizers.L1(0.1),
    "bias_constraint": keras.constraints.NonNeg(),
    "seed": 3,
}
GATE_FLAGS = {
    **KERNEL_FLAGS,
    "projection_dim": 3,
    "temperature": 0.2,
    "min_temperature": 0.05,
}
CASES = [
    Case(pooling.AttentionPooling,
         {"num_heads": 2, "hidden_dim": 12, "activation": "relu"},
         TOKENS, (3, 8)),
    Case(patches.ClassToken, {}, TOKENS, (3, 7, 8)),
    Case(patches.RegisterTokens, {"num_registers": 2}, TOKENS, (3, 8, 8)),
    Case(stochastic.SeededDropout,
         {"rate": 0.2, "seed": 3, "noise_shape": (3, 1, 8)}, TOKENS),
    Case(stochastic.DropPath, {"rate": 0.2, "seed": 3}, TOKENS),
    Case(stochastic.LayerScale, {"initial_value": 0.1}, TOKENS),
    Case(positions.LearnedPositions, {"grid": (2, 3)}, TOKENS),
    Case(layers.MLP,
         {"hidden_dim": 12, "activation": "gelu_tanh", "dropout": 0.1,
          "use_output_bias": False, **WEIGHT_FLAGS}, TOKENS),
    Case(windows.WindowAttention,
         {"num_heads": 2, "window_size": 2, "shift": True,
          "pretrained_window_size": 3}, (2, 3, 4, 8)),
    Case(windows.MergePatches, {}, (2, 4, 6, 8), (2, 2, 3, 32)),
    Case(ensemble.RepeatImages, {"ensemble_size": 2}, TOKENS, (6, 6, 8)),
    Case(ensemble.JoinMembers, {"ensemble_size": 2}, (4, 8), (2, 2, 8)),
    Case(patches.PatchEmbedding,
         {"hidden_dim": 8, "patch_size": 2}, (2, 4, 6, 3), (2, 6, 8)),
    Case(attention.SelfAttention, {"num_heads": 4, "qk_norm": True}, TOKENS),
    Case(positions.SinCos2DPositions, {"grid": (2, 3)}, TOKENS),
    Case(pooling.TokenPooling, {}, TOKENS, (3, 8)),
    moe("as it comes"),
    moe("with all flags", ROUTER_FLAGS, images_per_group=2,
        activation="gelu_tanh", dropout=0.1, **WEIGHT_FLAGS),
    moe("one group", {"num_selected_experts": 3}, images_per_group="batch"),
    moe("dropless", {"capacity_factor": "dropless", "num_selected_experts": 2}),
    moe("with a cosine gate", {"gate": "cosine", "num_selected_experts": 3,
                               "capacity_factor": 3.0}),
    moe("with a gate layer", {"gate": layers.L2Gate(3, 2),
                              "num_selected_experts": 3,
                              "capacity_factor": 3.0}),
    moe("bias balanced", layers.BiasBalancedRouter(
        3, num_selected_experts=3, capacity_factor=3.0, **BIAS_FLAGS)),
    moe("expert choice", layers.ExpertChoiceRouter(3)),
    moe("expert choice with all flags",
        layers.ExpertChoiceRouter(3, gate="l2", **CHOICE_FLAGS),
        images_per_group=2),
    moe("soft", layers.SoftRouter(3)),
    moe("soft with more slots", layers.SoftRouter(3, capacity_factor=1.5)),
    moe("soft with all flags", layers.SoftRouter(3, **SOFT_FLAGS),
        images_per_group=1, activation="gelu_tanh", dropout=0.1),
    moe("with a bank", {"num_selected_experts": 3, "capacity_factor": 3.0},
        experts=layers.MLPExperts(3, 5)),
    moe("as it comes", {"num_selected_experts": 3}, shared_hidden_dim=4),
    moe("with a layer", {"num_selected_experts": 3}, shared_hidden_dim=4,
        shared_expert=layers.MLP(4)),
    moe("with all flags", ROUTER_FLAGS, images_per_group=2,
        activation="gelu_tanh", dropout=0.1, shared_hidden_dim=4,
        **WEIGHT_FLAGS),
]  # fmt: skip
# These stand in no functional model by themselves.
PARTS = [
    Case(layers.LinearGate, {"num_experts": 3, **KERNEL_FLAGS},
         TOKENS, (3, 6, 3)),
    Case(layers.CosineGate, {"num_experts": 3, **GATE_FLAGS},
         TOKENS, (3, 6, 3)),
    Case(layers.L2Gate, {"num_experts": 3, **GATE_FLAGS}, TOKENS, (3, 6, 3)),
    Case(layers.SoftGate, {"num_experts": 3, "capacity_factor": 1.5},
         TOKENS, (3, 6, 3, 3)),
    Case(layers.SoftGate, {"num_experts": 3, "num_slots": 2},
         TOKENS, (3, 6, 3, 2), label="SoftGate with slots"),
    Case(LayerNormalization, {"epsilon": 1e-3}, TOKENS, TOKENS),
    Case(layers.MLPExperts,
         {"num_experts": 3, "hidden_dim": 5, "activation": "gelu_tanh",
          "dropout": 0.1, "use_output_bias": False, **WEIGHT_FLAGS},
         (2, 3, 4, 8)),
]  # fmt: skip
ROUTERS = [
    Case(
        layers.TopKRouter,
        {"num_experts": 3, "gate": "cosine", **ROUTER_FLAGS},
        TOKENS,
    ),
    Case(
        layers.TopKRouter,
        {"num_experts": 3, "gate": layers.LinearGate(3)},
        TOKENS,
        label="TopKRouter with a layer as gate",
    ),
    Case(
        layers.BiasBalancedRouter,
        {"num_experts": 3, "balance": BalanceBias(3), **BIAS_FLAGS},
        TOKENS,
    ),
    Case(
        layers.EnsembleRouter,
        {"num_experts": 4, "ensemble_size": 2, "num_selected_experts": 2},
        TOKENS,
    ),
    Case(
        layers.ExpertChoiceRouter,
        {"num_experts": 3, "gate": "cosine", **CHOICE_FLAGS},
        TOKENS,
    ),
    Case(
        layers.SoftRouter,
        {"num_experts": 3, "gate": layers.SoftGate(3, 2), **SOFT_FLAGS},
        TOKENS,
    ),
    Case(
        layers.SoftRouter,
        {"num_experts": 3, "capacity_factor": 1.5},
        TOKENS,
        label="SoftRouter with more slots",
    ),
]
each = pytest.mark.parametrize("case", CASES + PARTS, ids=str)
# Gates are float32 under every policy: they have tests of their own below.
lower_precision = pytest.mark.parametrize(
    "case",
    [case for case in CASES + PARTS if "Gate" not in case.layer.__name__],
    ids=str,
)


@pytest.mark.backends("torch")
def test_no_layer_and_no_argument_is_left_out():
    ours = {
        layer
        for layer in keras.saving.get_custom_objects().values()
        if layer.__module__.startswith("keras_vmoe.layers.")
        and inspect.isclass(layer)
    }
    public = {getattr(layers, name) for name in layers.__all__}
    assert public - ours == {layers.Router}
    cases = CASES + PARTS + ROUTERS
    # A part of others, a router's own bias, and what has another shape in
    # training (see `ViTMoE(ensemble_size=)`).
    inner = {MultiHeadAttention, BalanceBias, ensemble.MeanProbability}
    assert ours - {case.layer for case in cases} == inner
    for layer in ours - inner:
        for name, default in arguments_of(layer).items():
            values = [c.arguments.get(name) for c in cases if c.layer is layer]
            used = [v for v in values if v is not None and v is not default]
            assert used, f"{layer.__name__}: {name} never differs"


@pytest.mark.backends("torch")
@pytest.mark.parametrize("case", CASES + PARTS + ROUTERS, ids=str)
def test_config(case):
    check_config(case)


@pytest.mark.backends("torch")
@pytest.mark.parametrize("case", CASES + PARTS + ROUTERS, ids=str)
def test_integers_of_numpy(case):
    """Such as a count of classes: the layer is the same as of Python's."""
    arguments = {
        name: np.array(value)[()] if type(value) is int else value
        for name, value in case.arguments.items()
    }
    layer = case.layer(**arguments)
    plain, found = case.make().get_config(), layer.get_config()
    for name in plain.keys() - {"name"}:
        if isinstance(plain[name], int):
            assert type(found[name]) is type(plain[name]), name


@each
def test_outputs_and_reload(case, tmp_path):
    check_outputs(case, tmp_path)


@each
def test_every_weight_has_a_gradient(case):
    check_gradients(case)


@lower_precision
def test_mixed_bfloat16(case):
    check_policy(case, "mixed_bfloat16")


@pytest.mark.slow
@pytest.mark.backends("torch")
@lower_precision
def test_mixed_float16(case):
    check_policy(case, "mixed_float16")


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_gates_are_float32_under_every_policy(policy):
    router = layers.TopKRouter(3, dtype=policy)
    router.build((None, None, 8))

    def step(tokens):
        plan = router(tokens, training=True)
        logits = router.gate_layer(tokens)
        return logits, plan.weight, plan.dispatch(tokens)

    tokens = ops.cast(np.ones((1, 4, 8)), policy.removeprefix("mixed_"))
    logits, weight, buffers = compiled(step, router)(tokens)
    for tensor in (logits, weight, router.gate_layer.kernel):
        assert keras.backend.standardize_dtype(tensor.dtype) == "float32"
    # And tokens travel in the policy's own dtype.
    dtype = keras.backend.standardize_dtype(buffers.dtype)
    assert dtype == policy.removeprefix("mixed_")


def test_float32_gates_tell_apart_what_bfloat16_cannot():
    # The two logits differ by 2**-10 of their size: equal in bfloat16, where
    # the lower index would win.
    gate = layers.LinearGate(2, dtype="mixed_bfloat16")
    gate.build((1, 1, 2))
    gate.kernel.assign([[1.0, 1.0 + 2**-10], [0.0, 0.0]])
    logits = gate(ops.cast(np.ones((1, 1, 2)), "bfloat16"))
    assert int(ops.argmax(logits[0, 0])) == 1


@pytest.mark.backends("torch")
def test_a_router_stands_not_alone():
    with pytest.raises(ValueError, match="returns a routing plan, not a "
                       "tensor.*MoEMLP\\(router=...\\)"):  # fmt: skip
        layers.TopKRouter(3)(keras.Input((6, 8)))
    for router in (layers.ExpertChoiceRouter, layers.SoftRouter):
        router = router(3)
        with pytest.raises(ValueError, match=f"A {type(router).__name__} ret"):
            router(keras.Input((6, 8)))


@pytest.mark.backends("torch")
def test_parts_agree_on_the_global_policy():
    keras.config.set_dtype_policy("mixed_bfloat16")
    layer = layers.MoEMLP(num_experts=2, hidden_dim=4)
    assert layer.experts.compute_dtype == "bfloat16"
    assert layer(keras.Input((2, 4))).dtype == "bfloat16"
