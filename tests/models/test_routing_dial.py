"""`set_routing`: the same weights under other settings."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_vmoe import layers
from keras_vmoe._keras import all_layers
from keras_vmoe.models import ViTMoE
from keras_vmoe.models import set_routing
from tests.harness import first_everywhere
from tests.harness import randomize
from tests.layers.definitions import float64
from tests.models.definitions import images_of
from tests.models.definitions import tiny


def vit(**moe):
    """A model of 2 blocks, the second one sparse, with random weights.

    The mean over all tokens feels what happens to each of them.
    """
    moe = {"layers": [1], **moe}
    return randomize(tiny(num_layers=2, pooling="gap", moe=moe))


def predict(model, images):
    return ops.convert_to_numpy(model(images))


def assert_same(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def shared_weights(model, dial):
    """Asserts that both models have the same weights, in the same order."""
    pairs = list(zip(model.weights, dial.weights, strict=True))
    assert pairs and all(mine is theirs for mine, theirs in pairs)


SETTINGS = [
    ({"capacity_factor": 2.0}, {"capacity_factor": 2.0}),
    ({"capacity_factor": "dropless"}, {"capacity_factor": "dropless"}),
    ({"num_selected_experts": 1}, {"num_selected_experts": 1}),
    (
        {"batch_priority": True, "capacity_factor": 0.3},
        {"batch_priority": True, "capacity_factor": 0.3},
    ),
    ({"images_per_group": 4}, {"images_per_group": 4}),
    ({"images_per_group": "batch"}, {"images_per_group": "batch"}),
]


@pytest.mark.parametrize("case", first_everywhere(SETTINGS))
def test_each_setting(case, tmp_path):
    settings, moe = case
    model, images = vit(capacity_factor=0.8), images_of(5)
    before, config = predict(model, images), model.get_config()
    dial = set_routing(model, **settings)
    assert type(dial) is ViTMoE and dial.name == model.name
    assert isinstance(dial.input, keras.KerasTensor)  # And no list of one.
    shared_weights(model, dial)

    fresh = vit(**{"capacity_factor": 0.8, **moe})
    fresh.set_weights(model.get_weights())
    got = predict(dial, images)
    assert_same(got, predict(fresh, images))
    assert np.abs(got - before).max() > 1e-3, "this setting changes nothing"
    assert dial.get_config() == fresh.get_config()

    # The original is as it was.
    assert model.get_config() == config
    np.testing.assert_array_equal(predict(model, images), before)

    dial.save(tmp_path / "dial.keras")
    loaded = keras.saving.load_model(tmp_path / "dial.keras")
    np.testing.assert_array_equal(predict(loaded, images), got)
    assert loaded.get_config() == dial.get_config()


@pytest.mark.backends("torch")
def test_settings_left_out_stay():
    model = vit(capacity_factor=0.3, gate="cosine", noise_std=0.5)
    dial = set_routing(model, num_selected_experts=3)
    router = dial.moe_layers[0].router
    assert router.num_selected_experts == 3
    assert (router.capacity_factor, router.noise_std) == (0.3, 0.5)
    assert router.gate == "cosine" and dial.moe.gate == "cosine"
    assert dial.moe_layers[0].images_per_group == 2
    again = set_routing(dial, capacity_factor=2.0).moe_layers[0].router
    assert (again.num_selected_experts, again.capacity_factor) == (3, 2.0)


def test_setting_it_back():
    model, images = vit(), images_of(5)
    dial = set_routing(model, capacity_factor=0.2, num_selected_experts=1)
    back = set_routing(dial, capacity_factor=1.05, num_selected_experts=2)
    np.testing.assert_array_equal(predict(back, images), predict(model, images))
    shared_weights(model, back)


@pytest.mark.parametrize("router", first_everywhere(["bias_balanced", "top_k"]))
def test_it_follows_further_training(router):
    model = vit(router=router)
    dial = set_routing(model, num_selected_experts=1)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    images = images_of(6)
    model.fit(images, np.ones((6, 10)), epochs=3, batch_size=6, verbose=0)
    fresh = vit(router=router, num_selected_experts=1)
    fresh.set_weights(model.get_weights())
    assert_same(predict(dial, images), predict(fresh, images))
    for mine, theirs in zip(dial.weights, model.weights, strict=True):
        np.testing.assert_array_equal(float64(mine), float64(theirs))


def test_it_trains_by_itself():
    model = vit()
    model.compile(keras.optimizers.SGD(0.1), "mse")
    dial = set_routing(model, num_selected_experts=1)
    before = float64(model.get_layer("head").kernel)
    images = images_of(4)
    loss = dial.fit(images, np.ones((4, 10)), verbose=0).history["loss"]
    assert np.isfinite(loss).all()
    assert (float64(model.get_layer("head").kernel) != before).any()
    # Each has statistics of its own.
    assert model.moe_layers[0].router.statistics.result() is None
    assert dial.moe_layers[0].router.statistics.result() is not None


@pytest.mark.backends("torch")
def test_an_uncompiled_model_stays_uncompiled():
    model = vit()
    assert not set_routing(model, capacity_factor=2.0).compiled
    model.compile("sgd", "mse", metrics=["mae"])
    assert set_routing(model, capacity_factor=2.0).compiled


ROUTERS = [
    ("a shared expert", {"shared_hidden_dim": 8},
     {"num_selected_experts": 1}),
    ("expert choice", {"router": "expert_choice"}, {"capacity_factor": 4.0}),
    ("expert choice", {"router": "expert_choice"}, {"images_per_group": 4}),
    ("bias", {"router": "bias_balanced"}, {"num_selected_experts": 1}),
    ("a router object",
     {"router": layers.TopKRouter(4, 2, gate="l2", seed=3)},
     {"num_selected_experts": 1}),
    ("a gate object",
     {"router": layers.TopKRouter(4, 2, gate=layers.CosineGate(4, 8))},
     {"num_selected_experts": 1}),
    ("a gate of Keras",
     {"router": layers.TopKRouter(4, 2, gate=keras.layers.Dense(
         4, dtype="float32"))},
     {"num_selected_experts": 1}),
]  # fmt: skip


@pytest.mark.parametrize("case", first_everywhere(ROUTERS))
def test_other_routers(case, tmp_path):
    label, moe, settings = case
    model, images = vit(**moe), images_of(5)
    before = predict(model, images)
    dial = set_routing(model, **settings)
    got = predict(dial, images)
    assert np.abs(got - before).max() > 1e-3, label
    np.testing.assert_array_equal(predict(model, images), before)
    dial.save(tmp_path / "dial.keras")
    loaded = keras.saving.load_model(tmp_path / "dial.keras")
    np.testing.assert_array_equal(predict(loaded, images), got)
    twin = ViTMoE.from_config(dial.get_config())
    twin.set_weights(dial.get_weights())
    assert_same(predict(twin, images), got)


# Models of anybody.


def plain(name="moe"):
    """A functional model with a MoE layer and a skip."""
    inputs = keras.Input((6, 8))
    router = layers.TopKRouter(4, 2, capacity_factor=0.5)
    moe = layers.MoEMLP(4, 16, router, images_per_group=2, name=name)
    return keras.Model(inputs, inputs + moe(inputs))


def nested():
    """The same, one and two levels down, and one level next to it."""
    inputs = keras.Input((6, 8))
    x = plain("first")(inputs)
    inner = keras.Model(inputs, plain("second")(x))
    outer = keras.Input((6, 8))
    x = plain("third")(inner(outer))
    return keras.Model(outer, keras.layers.GlobalAveragePooling1D()(x))


@pytest.mark.backends("tensorflow", "torch")
@pytest.mark.parametrize("make", first_everywhere([nested, plain]))
def test_models_of_anybody(make, tmp_path):
    model = randomize(make())
    tokens = np.random.default_rng(0).normal(size=(5, 6, 8)).astype("float32")
    before = predict(model, tokens)
    dial = set_routing(model, capacity_factor="dropless", images_per_group=5)
    shared_weights(model, dial)
    found = [
        layer for layer in all_layers(dial) if isinstance(layer, layers.MoEMLP)
    ]
    assert len(found) == (1 if make is plain else 3)
    for layer in found:
        assert layer.router.capacity_factor == "dropless"
        assert layer.images_per_group == 5
    got = predict(dial, tokens)
    assert np.abs(got - before).max() > 1e-3
    np.testing.assert_array_equal(predict(model, tokens), before)
    back = set_routing(dial, capacity_factor=0.5, images_per_group=2)
    np.testing.assert_array_equal(predict(back, tokens), before)
    dial.save(tmp_path / "dial.keras")
    loaded = keras.saving.load_model(tmp_path / "dial.keras")
    np.testing.assert_array_equal(predict(loaded, tokens), got)


def sequential():
    return keras.Sequential(
        [keras.Input((6, 8)), layers.MoEMLP(4, 16, name="moe")]
    )


def vit_inside():
    images = keras.Input((8, 8, 3))
    features = tiny(num_layers=2, num_classes=None, moe={"layers": [1]})
    return keras.Model(images, keras.layers.Dense(3)(features(images)))


def test_sequential_models():
    model = randomize(sequential())
    dial = set_routing(model, num_selected_experts=2)
    assert isinstance(dial, keras.Sequential)
    shared_weights(model, dial)
    assert dial.layers[0].router.num_selected_experts == 2


def test_a_vit_inside_of_a_model_stays_one():
    model = randomize(vit_inside())
    dial = set_routing(model, capacity_factor=0.5)
    shared_weights(model, dial)
    vit_moe = dial.get_layer("vit_moe")
    assert type(vit_moe) is ViTMoE and vit_moe.moe.capacity_factor == 0.5


def test_features_of_both_models_by_name():
    model, images = vit(capacity_factor=0.3), images_of(4)
    dial = set_routing(model, capacity_factor=2.0)
    logits = [predict(m, images) for m in (model, dial)]
    for m, expected in zip((model, dial), logits, strict=True):
        pooled = keras.Model(m.input, m.get_layer("pooling").output)
        got = m.get_layer("head")(predict(pooled, images))
        assert_same(float64(got), expected)
        assert len(m.get_layer("norm")._inbound_nodes) == 1


def test_freezing_is_shared_as_the_weights_are():
    model = vit()
    dial = set_routing(model, capacity_factor=2.0)
    dial.get_layer("head").trainable = False
    assert not model.get_layer("head").kernel.trainable


@pytest.mark.backends("torch")
def test_hidden_layers_are_refused():
    inputs = keras.Input((3, 6, 8))
    moe = layers.MoEMLP(4, 16, name="moe")
    outer = keras.layers.TimeDistributed(moe, name="outer")
    model = keras.Model(inputs, outer(inputs))
    with pytest.raises(ValueError, match="'outer', a TimeDistributed"):
        set_routing(model, capacity_factor=2.0)


def test_a_layer_used_twice_is_changed_once():
    inputs = keras.Input((6, 8))
    moe = layers.MoEMLP(4, 16, name="moe")
    model = randomize(keras.Model(inputs, moe(moe(inputs))))
    dial = set_routing(model, num_selected_experts=2)
    shared_weights(model, dial)
    assert len([x for x in dial.layers if isinstance(x, layers.MoEMLP)]) == 1


# Words.


@pytest.mark.backends("torch")
@pytest.mark.parametrize(
    ("moe", "settings", "words"),
    [
        ({}, {}, "At least one routing setting must be given. Received: none"),
        (None, {"capacity_factor": 1.0},
         "must have MoE layers. Received: model='vit_moe' without any"),
        ({"router": "soft", "images_per_group": 1}, {"capacity_factor": 2.0},
         "SoftRouter of 'block_1_moe' lacks this setting. "
         "Received: capacity_factor=2.0"),
        ({"router": "soft", "images_per_group": 1}, {"images_per_group": 4},
         "routes each image alone. Received: images_per_group=4"),
        ({"router": "soft", "images_per_group": 1}, {"images_per_group": 8},
         "routes each image alone. Received: images_per_group=8"),
        ({"router": "expert_choice"}, {"num_selected_experts": 1},
         "ExpertChoiceRouter of 'block_1_moe' lacks this setting. "
         "Received: num_selected_experts=1. Leave it out"),
        ({"router": "expert_choice"}, {"batch_priority": True},
         "Received: batch_priority=True"),
        ({"router": "expert_choice"}, {"capacity_factor": "dropless"},
         "cannot be dropless. Received: capacity_factor='dropless'"),
        ({}, {"capacity_factor": 0.0}, "capacity_factor=0.0"),
        ({}, {"capacity_facto": 1.0}, "Did you mean 'capacity_factor'?"),
        ({}, {"capacity_factor": "all"}, "capacity_factor='all'"),
        ({}, {"capacity_factor": "droples"}, "number above 0 or 'dropless'"),
        ({}, {"images_per_group": "btach"}, "at least 1, or 'batch'"),
        ({}, {"batch_priority": "no"}, "batch_priority='no'"),
        ({}, {"num_selected_experts": 5}, "num_selected_experts=5 with"),
        ({}, {"images_per_group": 0}, "images_per_group=0"),
        ({}, {"images_per_group": "all"}, "images_per_group='all'"),
        ({}, {"capacity_factor": "dropless", "batch_priority": True},
         "none needs priority"),
    ],
)  # fmt: skip
def test_bad_settings(moe, settings, words):
    model = tiny(moe=None) if moe is None else vit(**moe)
    with pytest.raises(ValueError, match=words):
        set_routing(model, **settings)


class Subclass(keras.Model):
    def __init__(self):
        super().__init__()
        self.moe = layers.MoEMLP(4, 8)

    def call(self, x):
        return self.moe(x)


@pytest.mark.backends("torch")
@pytest.mark.parametrize("make", [Subclass, lambda: "model", lambda: None])
def test_models_that_cannot_be_rebuilt(make):
    words = "must be a built functional or sequential .*Received: model="
    with pytest.raises(ValueError, match=words):
        set_routing(make(), capacity_factor=2.0)


@pytest.mark.backends("torch")
def test_an_unbuilt_model():
    model = keras.Sequential([layers.MoEMLP(4, 8)])
    with pytest.raises(ValueError, match="must be a built functional or seq"):
        set_routing(model, capacity_factor=2.0)
