"""`load_vmoe`: all or nothing, with words that say what is wrong."""

import numpy as np
import pytest
from keras import ops

from keras_vmoe.checkpoints import load_vmoe
from keras_vmoe.checkpoints.vmoe import vmoe_weights
from keras_vmoe.models import ViTMoE
from tests.golden.models import build
from tests.golden.models import read
from tests.models.definitions import tiny


@pytest.fixture(scope="module")
def loaded():
    """A model of the golden architecture with the golden weights."""
    _, weights, config = read("vit_last2_k2")
    return load_vmoe(build(config), weights), weights


def check_unchanged(model, weights):
    for name, weight in vmoe_weights(model).items():
        np.testing.assert_array_equal(
            ops.convert_to_numpy(weight), weights[name]
        )


def test_every_weight_is_theirs(loaded):
    model, weights = loaded
    named = vmoe_weights(model)
    assert set(named) == set(weights)
    assert {id(w) for w in named.values()} == {id(w) for w in model.weights}
    check_unchanged(model, weights)


HEAD = "head/kernel"
GATE = "Encoder/encoderblock_3/Moe/Router/dense/kernel"


def without(weights, name):
    return {key: value for key, value in weights.items() if key != name}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: without(w, GATE), "name by name and shape by shape. "
         "Received: 107 arrays for 108 weights. Missing in the file: "
         rf"{GATE} \(32, 4\). Not in the model: none. Of another shape: none. "
         "Build the model with the architecture"),
        (lambda w: {**w, "Encoder/x": w[HEAD]}, "Missing in the file: none. "
         r"Not in the model: Encoder/x \(32, 10\). Of"),
        (lambda w: {**without(w, HEAD), "a": w[HEAD], "b": w[HEAD]},
         rf"Missing in the file: {HEAD} \(32, 10\). Not in the model: a "
         r"\(32, 10\); b \(32, 10\)"),
        (lambda w: {**w, HEAD: w[HEAD].T}, "Not in the model: none. Of another "
         rf"shape: {HEAD} \(10, 32\) for \(32, 10\). Build the model"),
        (lambda w: {**w, HEAD: w[HEAD].astype(str)},
         f"must hold real numbers. Received: {HEAD} of dtype <U"),
        (lambda w: {**w, HEAD: 1.0, GATE: w[GATE][:, :2]},
         rf"{GATE} \(32, 2\) for \(32, 4\); {HEAD} \(\) for \(32, 10\)"),
        (lambda w: {}, "Received: 0 arrays for 108 weights"),
    ],
)  # fmt: skip
def test_wrong_arrays_leave_the_model_as_it_was(loaded, change, words):
    model, weights = loaded
    # Were anything assigned before the check, it would be these zeros.
    zeros = {name: np.zeros_like(array) for name, array in weights.items()}
    with pytest.raises(ValueError, match=words):
        load_vmoe(model, change(zeros))
    check_unchanged(model, weights)


@pytest.mark.parametrize("arrays", [[1, 2], None, np.zeros(3)])
def test_not_a_dict(loaded, arrays):
    words = "or a dict from the reference's names to arrays. Received: "
    with pytest.raises(TypeError, match=words + "arrays="):
        load_vmoe(loaded[0], arrays)


@pytest.mark.parametrize("pooling", ["token", "gap", "map"])
@pytest.mark.parametrize("position_embedding", ["learned", "sincos2d"])
def test_names_for_every_architecture(pooling, position_embedding):
    model = ViTMoE(
        image_size=8,
        patch_size=4,
        hidden_dim=8,
        num_layers=2,
        num_heads=2,
        mlp_dim=12,
        num_classes=5,
        pooling=pooling,
        position_embedding=position_embedding,
        representation_size=None if pooling == "gap" else 6,
        moe={"layers": [0], "num_experts": 2},
    )
    names = vmoe_weights(model)
    assert {id(w) for w in names.values()} == {id(w) for w in model.weights}
    assert ("cls" in names) == (pooling == "token")
    attention = "MapHead/MultiHeadDotProductAttention"
    for name in (
        "MapHead/probe",
        f"{attention}/query/kernel",
        f"{attention}/out/bias",
        "MapHead/LayerNorm/scale",
        "MapHead/Mlp/Dense_1/kernel",
    ):
        assert (name in names) == (pooling == "map")
    positions = "Encoder/posembed_input/pos_embedding"
    assert (positions in names) == (position_embedding == "learned")
    assert ("pre_logits/kernel" in names) == (pooling != "gap")
    kernel = names["Encoder/encoderblock_0/Moe/Mlp/Dense_0/kernel"]
    assert tuple(kernel.shape) == (2, 8, 12)
    # The four kinds of projections are told apart.
    block = "Encoder/encoderblock_1/SelfAttention"
    for part in ("query", "key", "value"):
        assert part in names[f"{block}/{part}/kernel"].path
        assert tuple(names[f"{block}/{part}/kernel"].shape) == (8, 2, 4)
    assert tuple(names[f"{block}/out/kernel"].shape) == (2, 4, 8)


V2 = np.zeros(10, "V2")


@pytest.mark.parametrize(
    "bias",
    [V2, np.zeros(10, [("a", "f4")]), np.zeros(10, complex), ["a"] * 10],
    ids=str,
)
def test_what_is_no_number_changes_nothing(loaded, bias):
    model, weights = loaded
    zeros = {name: np.zeros_like(array) for name, array in weights.items()}
    with pytest.raises(ValueError, match="real numbers. Received: head/bias"):
        load_vmoe(model, {**zeros, "head/bias": bias})
    check_unchanged(model, weights)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"layer_scale_init_value": 0.1}, "block_0_attention_scale/scale"),
        ({"moe": {"shared_hidden_dim": 4}}, "shared_expert"),
        ({"moe": {"router": "bias_balanced"}}, "router/balance/bias"),
    ],
)
def test_weights_that_the_reference_lacks_are_listed(arguments, name):
    arrays = vmoe_weights(tiny())
    arrays = {k: ops.convert_to_numpy(v) for k, v in arrays.items()}
    with pytest.raises(ValueError, match=f"Missing in the file:.*{name}"):
        load_vmoe(tiny(**arguments), arrays)


@pytest.mark.parametrize("bias", [np.float32(1), np.zeros((2, 2)), "abc"])
def test_a_broken_head_is_no_new_head(loaded, bias):
    model, weights = loaded
    with pytest.raises(ValueError, match="Of another shape: head/bias"):
        load_vmoe(model, {**weights, "head/bias": bias})
