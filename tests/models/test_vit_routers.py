"""Every router and gate through the `moe` argument of `ViTMoE`."""

import json

import keras
import numpy as np
import pytest
from keras import ops

from keras_vmoe import layers
from keras_vmoe.layers.activations import gelu_tanh
from keras_vmoe.models import MoEConfig
from keras_vmoe.models import ViTMoE
from tests.harness import randomize
from tests.models.definitions import images_of
from tests.models.definitions import tiny

CASES = {
    "expert choice": (
        {"router": "expert_choice", "capacity_factor": 2.0},
        {"capacity_factor": 2.0, "noise_std": 1.0, "z_loss_weight": 0.0},
    ),
    "soft": (
        {"router": "soft", "images_per_group": 1, "num_slots": 2},
        {"num_slots": 2, "noise_std": 0.0},
    ),
    "bias balanced": (
        {"router": "bias_balanced", "z_loss_weight": 0.1},
        {
            "num_selected_experts": 2,
            "capacity_factor": 1.05,
            "importance_loss_weight": 0.0,
            "load_loss_weight": 0.0,
            "z_loss_weight": 0.1,
            "update_rate": 0.001,
        },
    ),
    "dropless, cosine": (
        {"capacity_factor": "dropless", "gate": "cosine"},
        {
            "capacity_factor": "dropless",
            "num_selected_experts": 2,
            "gate": "cosine",
        },
    ),
    "expert choice, l2": (
        {"router": "expert_choice", "gate": "l2", "noise_std": 0.0},
        {"gate": "l2", "noise_std": 0.0, "capacity_factor": 1.0},
    ),
    "shared expert": (
        {"shared_hidden_dim": 16, "num_selected_experts": 1},
        {"num_selected_experts": 1},
    ),
    "a router object": (
        {"router": layers.ExpertChoiceRouter(4, 2.0, seed=3)},
        {"capacity_factor": 2.0, "seed": 4},
    ),
    "a soft router object": (
        {"router": layers.SoftRouter(4, 2), "images_per_group": 1},
        {"num_slots": 2, "seed": None},
    ),
}
CLASSES = {
    "expert choice": layers.ExpertChoiceRouter,
    "expert choice, l2": layers.ExpertChoiceRouter,
    "a router object": layers.ExpertChoiceRouter,
    "soft": layers.SoftRouter,
    "a soft router object": layers.SoftRouter,
    "bias balanced": layers.BiasBalancedRouter,
}


# Each router is fitted under every backend in tests/layers/test_moe_routers.py.
EVERYWHERE = ("dropless, cosine",)
ONCE = pytest.mark.backends("torch")


@pytest.mark.parametrize(
    "name",
    [x if x in EVERYWHERE else pytest.param(x, marks=ONCE) for x in CASES],
)
def test_settings_fit_and_reload(name, tmp_path):
    moe, settings = CASES[name]
    model = randomize(tiny(num_layers=2, moe={"layers": [1], **moe}))
    router = model.moe_layers[-1].router
    assert type(router) is CLASSES.get(name, layers.TopKRouter)
    for setting, value in settings.items():
        assert getattr(router, setting) == value, setting
    shared = moe.get("shared_hidden_dim")
    assert hasattr(model.moe_layers[0], "shared_expert") == bool(shared)

    config = model.get_config()
    twin = ViTMoE.from_config(json.loads(json.dumps(config)))
    assert twin.get_config() == config
    names = [weight.path for weight in model.weights]
    assert [weight.path for weight in twin.weights] == names

    model.compile(keras.optimizers.SGD(0.01), "mse")
    images = images_of(3)
    loss = model.fit(images, np.ones((3, 10)), verbose=0).history["loss"]
    assert np.isfinite(loss).all()
    got = ops.convert_to_numpy(model(images))
    assert np.isfinite(got).all()
    twin.set_weights(model.get_weights())
    np.testing.assert_allclose(
        ops.convert_to_numpy(twin(images)), got, rtol=1e-5, atol=1e-5
    )
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    again = ops.convert_to_numpy(loaded(images))
    np.testing.assert_array_equal(again, got)
    assert loaded.get_config() == config


@pytest.mark.backends("torch")
def test_a_setting_of_none_is_the_routers_default():
    config = MoEConfig.from_dict({"router": "expert_choice"})
    assert config.router_settings() == {}
    config = MoEConfig.from_dict({"capacity_factor": "dropless", "gate": "l2"})
    assert config.router_settings() == {
        "capacity_factor": "dropless",
        "gate": "l2",
    }


@pytest.mark.backends("torch")
def test_the_shared_expert_has_the_activation_and_dropout_of_the_model():
    model = tiny(moe={"shared_hidden_dim": 16}, dropout=0.1)
    shared = model.moe_layers[0].shared_expert
    assert shared.activation is gelu_tanh
    assert (shared.hidden_dim, shared.dropout) == (16, 0.1)


@pytest.mark.backends("torch")
@pytest.mark.parametrize(
    ("moe", "words"),
    [
        ({"router": "expert_choice", "num_selected_experts": 2},
         "ExpertChoiceRouter has no `num_selected_experts`. Received: "
         "num_selected_experts=2"),
        ({"router": "expert_choice", "num_slots": 2}, "has no `num_slots`"),
        ({"num_slots": 2}, "TopKRouter has no `num_slots`"),
        ({"router": "expert_choice", "capacity_factor": "dropless"},
         "cannot be dropless"),
        ({"router": "soft", "images_per_group": 1, "gate": "l2"},
         "must be a `SoftGate`"),
        ({"router": "soft", "images_per_group": 4},
         "routes each image alone. Received: images_per_group=4"),
        ({"router": "soft", "images_per_group": 1, "num_slots": 0},
         "num_slots=0"),
        ({"router": "soft", "images_per_group": 1, "capacity_factor": 0.0},
         "capacity_factor=0.0"),
        ({"router": "soft", "images_per_group": 1, "capacity_factor": 0.1},
         "at least 1 slot"),
        ({"capacity_factor": "dropless", "batch_priority": True},
         "none needs priority"),
        ({"shared_hidden_dim": 0}, "`shared_hidden_dim` must be an integer"),
        ({"gate": "cosin"}, "Did you mean 'cosine'"),
        ({"router": "expert"}, r"`router` must be one of \['bias_balanced', "
         "'expert_choice', 'soft', 'top_k'\\]"),
        ({"router": layers.SoftRouter(4, name="mine"), "num_slots": 3,
          "images_per_group": 1},
         "has its own settings. Received: router=mine together with "
         "num_slots=3"),
    ],
)  # fmt: skip
def test_bad_input(moe, words):
    with pytest.raises(ValueError, match=words):
        tiny(moe=moe)


def test_a_router_or_gate_with_weights_is_refused():
    router = layers.TopKRouter(4)
    layers.MoEMLP(4, 8, router).build((None, 5, 16))
    for part in ({"router": router}, {"gate": router.gate_layer}):
        with pytest.raises(ValueError, match="which has weights: they would"):
            tiny(moe={"layers": "last_1", **part})


@pytest.mark.backends("torch")
def test_a_gate_by_its_class_name():
    with pytest.raises(ValueError, match="`router` must be a layer, or the"):
        MoEConfig.from_dict({"router": {"class_name": "x"}})
    gate = {"class_name": "Dense", "config": {"units": 4}}
    config = MoEConfig.from_dict({"gate": gate})
    assert config.gate.units == 4
    assert MoEConfig.from_dict(config.to_dict()).gate.units == 4


@pytest.mark.backends("torch")
def test_a_sequential_gate_without_an_input():
    gate = keras.Sequential([keras.layers.Dense(4)])
    router = layers.TopKRouter(4, gate=gate)
    layer = layers.MoEMLP(4, 8, router, images_per_group=2)
    for batch in (4, 3, 1):
        assert layer(np.ones((batch, 5, 8), "float32")).shape == (batch, 5, 8)


@pytest.mark.backends("tensorflow", "torch")
def test_a_gate_of_keras(tmp_path):
    gate = keras.layers.Dense(4, dtype="float32", name="mine")
    model = randomize(tiny(moe={"gate": gate}))
    one, other = (layer.router.gate_layer for layer in model.moe_layers)
    assert one is not other and type(one) is keras.layers.Dense
    assert not gate.built
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    images = images_of(2)
    np.testing.assert_array_equal(
        ops.convert_to_numpy(again(images)), ops.convert_to_numpy(model(images))
    )
