"""What a router must be, and whose it is."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_vmoe import layers
from keras_vmoe import models
from tests.gradients import value_and_gradients


def test_numpy_integers_are_integers(tmp_path):
    router = layers.TopKRouter(
        np.int64(4), np.int64(2), capacity_factor=np.float32(1.5)
    )
    layer = layers.MoEMLP(
        np.int64(4), np.int64(8), router, images_per_group=np.int32(2)
    )
    inputs = keras.Input((3, 8))
    model = keras.Model(inputs, layer(inputs))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    x = np.ones((3, 3, 8), "float32")
    np.testing.assert_array_equal(
        model.predict(x, verbose=0), loaded.predict(x, verbose=0)
    )


def test_a_router_serves_layers_of_one_width(tmp_path):
    router = layers.TopKRouter(4)
    inputs = keras.Input((3, 6))
    x = layers.MoEMLP(4, 8, router, name="first")(inputs)
    x = layers.MoEMLP(4, 8, router, name="second")(x)
    model = keras.Model(inputs, x)
    assert len(model.weights) == 9  # Two banks, one gate.
    images = np.random.default_rng(0).normal(size=(3, 3, 6))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    ours, theirs = (x.predict(images, verbose=0) for x in (model, loaded))
    np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(ValueError, match="built for 6 .*in a layer of 5"):
        layers.MoEMLP(4, 8, router).build((None, 3, 5))


def test_a_gate_serves_routers_of_other_settings(tmp_path):
    """Its weights are one in the model, in its file and in what is loaded."""
    gate, inputs = layers.LinearGate(4), keras.Input((3, 6))
    x = inputs
    for name, selected in (("first", 1), ("second", 2)):
        router = layers.TopKRouter(4, selected, gate=gate)
        x = layers.MoEMLP(4, 8, router, name=name)(x)
    model = keras.Model(inputs, x)
    images = np.random.default_rng(0).normal(size=(3, 3, 6))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert len(model.weights) == len(loaded.weights) == 9
    ours, theirs = (x.predict(images, verbose=0) for x in (model, loaded))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.backends("torch")
def test_a_gate_of_another_width_or_number_of_experts():
    gate = layers.LinearGate(4)
    layers.TopKRouter(4, gate=gate).build((None, 3, 6))
    with pytest.raises(ValueError, match="built for 6 features, in a router"):
        layers.TopKRouter(4, gate=gate).build((None, 3, 5))
    with pytest.raises(ValueError, match="one logit for each of 3 experts"):
        layers.TopKRouter(3, gate=gate)(np.ones((1, 3, 6), "float32"))


@pytest.mark.backends("torch")
@pytest.mark.parametrize("router", ["topk", 3])
def test_a_router_is_an_object_or_a_name(router):
    with pytest.raises(ValueError, match="`router` must be .*Received: router"):
        layers.MoEMLP(4, 8, router)


@pytest.mark.backends("torch")
def test_gate_of_another_width():
    router = layers.TopKRouter(4, gate=keras.layers.Dense(6))
    with pytest.raises(
        ValueError, match="one logit for each of 4 experts.*Received: logits"
    ):
        router(np.ones((1, 5, 8), "float32"))


@pytest.mark.backends("torch")
@pytest.mark.parametrize(
    "setting",
    ["noise_std", "importance_loss_weight", "load_loss_weight"],
)
@pytest.mark.parametrize("value", [-1.0, float("nan"), "1"])
def test_settings_are_finite_and_not_negative(setting, value):
    with pytest.raises(ValueError, match=f"`{setting}` must be.*Received"):
        layers.TopKRouter(4, **{setting: value})


@pytest.mark.backends("torch")
def test_copies_of_a_seeded_router_draw_different_noise():
    model = models.ViTMoE(
        8, 4, 8, 4, 2, 8, 3,
        moe=dict(layers="last_2", router=layers.TopKRouter(4, seed=7)),
    )  # fmt: skip
    seeds = [layer.router.seed for layer in model.moe_layers]
    assert seeds == [8, 10]


@pytest.mark.backends("torch")
@pytest.mark.parametrize("moe", [True, "last_2", [1]])
def test_moe_is_a_dict(moe):
    with pytest.raises(ValueError, match="must be a dict.*Received: moe="):
        models.ViTMoE(8, 4, 8, 4, 2, 8, 3, moe=moe)


@pytest.mark.backends("torch")
@pytest.mark.parametrize(
    "size", ["patch_size", "hidden_dim", "num_layers", "mlp_dim", "num_classes"]
)
def test_sizes_of_a_model_are_positive(size):
    sizes = dict(
        image_size=8, patch_size=4, hidden_dim=8, num_layers=4, num_heads=2,
        mlp_dim=8, num_classes=3,
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"`{size}` must.*Received: {size}=0"):
        models.ViTMoE(**{**sizes, size: 0})


def rematerialized(layer):
    """A function like the layer whose forward pass is computed twice."""
    if keras.backend.backend() == "jax":
        # Not `RematScope`: Keras traces `training` there, as for any layer.
        import jax

        return jax.checkpoint(lambda x: layer(x))
    with keras.RematScope(mode="full"):
        again = layers.MoEMLP.from_config(layer.get_config())
    again.build((None, 3, 8))
    again.set_weights(layer.get_weights())
    return again


def test_gradients_are_the_same_when_the_layer_is_rematerialized():
    x = np.random.default_rng(0).normal(size=(4, 3, 8)).astype("float32")
    layer = layers.MoEMLP(4, 8, layers.TopKRouter(4, 2, noise_std=0.0))
    layer.build(x.shape)

    def loss(function):
        return lambda x: ops.sum(ops.square(function(x)))

    value, gradients = value_and_gradients(loss(layer), x)
    again, same = value_and_gradients(loss(rematerialized(layer)), x)
    assert value == pytest.approx(again, rel=1e-5)
    assert np.abs(gradients[0]).max() > 0
    np.testing.assert_allclose(gradients[0], same[0], atol=1e-5)
