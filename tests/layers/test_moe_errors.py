"""The words with which routers, experts and the MoE layer refuse."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_vmoe import layers
from tests.harness import first_everywhere


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_experts": 0}, "`num_experts` must be an integer of at least 1. "
         "Received: num_experts=0"),
        ({"num_experts": -1}, "Received: num_experts=-1"),
        ({"num_experts": 2.5}, "Received: num_experts=2.5"),
        ({"num_selected_experts": 5}, "between 1 and the number of experts. "
         "Received: num_selected_experts=5 with num_experts=4. Select fewer"),
        ({"num_selected_experts": 0}, "num_selected_experts=0 with"),
        ({"capacity_factor": 0.0}, "`capacity_factor` must be positive: with "
         "0 every expert has a capacity of 0.*Received: capacity_factor=0.0"),
        ({"capacity_factor": -1.0}, "Received: capacity_factor=-1.0"),
        ({"capacity_factor": float("nan")}, "capacity_factor=nan"),
        ({"noise_std": -0.1}, "`noise_std` must be a finite number and not "
         "negative. Received: noise_std=-0.1. 0 turns it off"),
        ({"gate": "linaer"}, r"`gate` must be one of \[.*'linear'.*\] or a "
         r"Keras layer. Received: gate='linaer'. Did you mean 'linear'\?"),
        ({"gate": 3}, "Received: gate=3"),
        ({"min_experts": 0}, "Received: min_experts=0"),
        ({"min_experts": 5}, "at most.*Received: min_experts=5 of 4"),
    ],
)  # fmt: skip
def test_bad_router(arguments, words):
    with pytest.raises(ValueError, match=words):
        layers.TopKRouter(**{"num_experts": 4, **arguments})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_experts": 0}, "`num_experts` must be an integer of at least 1. "
         "Received: num_experts=0"),
        ({"hidden_dim": 0}, "`hidden_dim` must be an integer of at least 1. "
         "Received: hidden_dim=0"),
        ({"router": layers.TopKRouter(3)}, "same number of experts. Received: "
         "router.num_experts=3 and num_experts=4"),
        ({"images_per_group": 0}, "`images_per_group` must be an integer of "
         "at least 1, or 'batch' for one group per batch. Received: "
         "images_per_group=0"),
        ({"images_per_group": 2.0}, "Received: images_per_group=2.0"),
        ({"images_per_group": -8}, "Received: images_per_group=-8"),
        ({"dropout": -0.1}, "`dropout` must be.*Received: dropout=-0.1"),
        ({"dropout": 1.5}, "Received: dropout=1.5"),
        ({"dropout": "a"}, "Received: dropout='a'"),
    ],
)  # fmt: skip
def test_bad_layer(arguments, words):
    with pytest.raises(ValueError, match=words):
        layers.MoEMLP(**{"num_experts": 4, "hidden_dim": 8, **arguments})


def test_a_shared_expert_of_another_size():
    expert = layers.MLP(4)
    layers.SharedExpertMoEMLP(2, 8, 4, expert)
    with pytest.raises(ValueError, match="shared_hidden_dim=5 together"):
        layers.SharedExpertMoEMLP(2, 8, 5, expert)


def test_a_gate_of_other_experts_is_refused_when_a_model_is_made():
    router = layers.TopKRouter(4, gate=layers.LinearGate(8))
    with pytest.raises(ValueError, match="each of 4 experts. Received: logits"):
        layers.MoEMLP(4, 8, router)(keras.Input((5, 6)))


def test_no_tokens():
    with pytest.raises(ValueError, match=r"Received: shape=\(2, 0, 4\)"):
        layers.MoEMLP(2, 8)(np.ones((2, 0, 4), "float32"))


def test_a_failed_layer_keeps_no_router():
    router = layers.TopKRouter(4)
    with pytest.raises(ValueError, match="Received: hidden_dim='a'"):
        layers.MoEMLP(4, "a", router=router)
    layers.MoEMLP(4, 8, router=router)


def test_a_gate_of_one_router_serves_another():
    gate = layers.LinearGate(4)
    routers = [layers.TopKRouter(4, gate=gate) for _ in range(2)]
    assert routers[0].gate_layer is routers[1].gate_layer


@pytest.mark.parametrize(
    "policy", first_everywhere(["mixed_float16", "mixed_bfloat16"])
)
def test_a_gate_of_lower_precision_trains(policy):
    gate = keras.layers.Dense(4, use_bias=False, dtype=policy)
    router = layers.TopKRouter(4, 2, gate=gate, dtype=policy)
    layer = layers.MoEMLP(4, 8, router, dtype=policy)
    inputs = keras.Input((6, 4))
    model = keras.Model(inputs, layer(inputs))
    model.compile("sgd", "mse")
    x = np.ones((3, 6, 4), "float32")
    assert np.isfinite(model.fit(x, x, verbose=0).history["loss"][0])
    weight = router(np.ones((1, 6, 4), "float32")).weight
    assert keras.backend.standardize_dtype(weight.dtype) == "float32"


def test_vectors_are_no_tokens():
    words = (
        r"\(batch, tokens..., features\) with at least one axis of tokens. "
        r"Received: shape=\(5, 4\).*expand_dims\(x, 1\)"
    )
    with pytest.raises(ValueError, match=words):
        layers.MoEMLP(2, 8)(np.ones((5, 4), "float32"))
    with pytest.raises(ValueError, match="at least one axis of tokens"):
        layers.MoEMLP(2, 8)(keras.Input((4,)))


def test_other_features_than_built():
    layer = layers.MoEMLP(2, 8)
    layer.build((None, 6, 4))
    words = (
        r"built for 4 features. Received: shape=\(5, 6, 3\), with 3 features. "
        "Project the inputs first or use a new layer"
    )
    with pytest.raises(ValueError, match=words):
        layer(np.ones((5, 6, 3), "float32"))
    with pytest.raises(ValueError, match="built for 4 features"):
        layer(keras.Input((6, 3)))


def test_unknown_features():
    with pytest.raises(ValueError, match="features must be known. Received: "
                       r"input_shape=\(None, 6, None\)"):  # fmt: skip
        layers.MoEMLP(2, 8)(keras.Input((6, None)))


def test_router_takes_groups():
    words = (
        r"\(groups, tokens per group, features\). "
        r"Received: input_shape=\(5, 4\).*`MoEMLP` splits a batch into groups"
    )
    with pytest.raises(ValueError, match=words):
        layers.TopKRouter(2)(np.ones((5, 4), "float32"))


@pytest.mark.parametrize("shape", [(5, 3, 4), (1, 3, 6, 4)])
def test_experts_take_buffers(shape):
    words = (
        r"\(groups, experts, capacity, features\) with 2 experts. "
        r"Received: input_shape=\(.*`plan.dispatch\(tokens\)`"
    )
    with pytest.raises(ValueError, match=words):
        layers.MLPExperts(2, 8)(np.ones(shape, "float32"))


def test_router_without_a_plan():
    router = layers.Router(2)
    with pytest.raises(NotImplementedError, match="Router must define "
                       "`make_plan`"):  # fmt: skip
        router(np.ones((1, 6, 4), "float32"))


def test_settings_of_the_router_are_pointed_there():
    words = "is a setting of the router. Received: num_selected_experts=2"
    with pytest.raises(ValueError, match=words):
        layers.MoEMLP(4, 8, num_selected_experts=2)


def test_masks_of_unknown_sizes():
    """Refused when the model is made, or when it runs; a list is a mask."""
    layer = layers.MoEMLP(2, 8)
    tokens, mask = keras.Input((6, 8)), keras.Input((4,), dtype="bool")
    with pytest.raises(ValueError, match=r"shape \(None, 4\) for .*None, 6"):
        layer(tokens, mask=mask)
    tokens = np.ones((4, 6, 8), "float32")
    kept = np.arange(24).reshape(4, 6) % 5 > 0
    expected = layer(tokens, mask=kept)
    np.testing.assert_array_equal(
        ops.convert_to_numpy(layer(tokens, mask=kept.tolist())),
        ops.convert_to_numpy(expected),
    )


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("shape", [(2, 12), (12, 2), (24, 1), (6, 4)])
def test_a_mask_in_a_graph_of_unknown_sizes(shape):
    import tensorflow as tf

    layer = layers.MoEMLP(2, 8)
    layer(np.ones((4, 6, 8), "float32"))

    @tf.function(
        input_signature=[
            tf.TensorSpec((None, None, 8)), tf.TensorSpec((None, None), tf.bool)
        ]
    )  # fmt: skip
    def run(tokens, mask):
        return layer(tokens, mask=mask)

    tokens = tf.random.normal((4, 6, 8))
    mask = np.arange(24).reshape(4, 6) % 5 > 0
    expected = layer(tokens, mask=mask)
    np.testing.assert_allclose(run(tokens, mask), expected, atol=1e-6)
    with pytest.raises(tf.errors.InvalidArgumentError):
        run(tokens, mask.reshape(shape))
