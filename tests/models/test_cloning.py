"""A clone has the weights of its model: the same variables, in its order."""

import keras
import numpy as np
import pytest
from keras import layers as keras_layers

from keras_vmoe import layers
from keras_vmoe import models
from keras_vmoe.models.cloning import clone_around


class Affine(keras_layers.Layer):
    """Names its parts in another order than it makes them."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.shift = self.scale = self.second = self.first = None

    def build(self, input_shape):
        features = input_shape[-1:]
        self.scale = self.add_weight(shape=features, initializer="ones")
        self.shift = self.add_weight(shape=features)
        self.first = keras_layers.Dense(features[0])
        self.second = keras_layers.Dense(features[0])
        self.first.build(input_shape)
        self.second.build(input_shape)

    def call(self, x):
        return self.first(x * self.scale + self.shift) + self.second(x)


class NoConfig(keras_layers.Layer):
    """Keras can make no second one."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def get_config(self):
        raise NotImplementedError

    def call(self, x):
        return self.function(x)


class Scaled(layers.TopKRouter):
    """Has a weight of its own that its constructor does not take."""

    def build(self, input_shape):
        super().build(input_shape)
        self.temperature = self.add_weight(shape=(), initializer="ones")


class Widened(layers.MLPExperts):
    """Computes something else with the same weights."""


def lora():
    layer = keras_layers.Dense(8)
    layer.build((None, 6, 8))
    layer.enable_lora(2)
    return layer


@pytest.mark.parametrize(
    "make",
    [
        Affine,
        lora,
        lambda: NoConfig(keras.ops.tanh),
        lambda: keras_layers.BatchNormalization(),
        lambda: keras_layers.Bidirectional(
            keras_layers.LSTM(4, return_sequences=True)
        ),
        lambda: keras_layers.GRU(8, return_sequences=True, stateful=True),
        lambda: keras_layers.SpectralNormalization(keras_layers.Dense(8)),
    ],
)
def test_variables_are_the_same_in_the_same_order(make):
    x = inputs = keras.Input((6, 8), batch_size=2)
    x = make()(x)
    model = keras.Model(inputs, layers.MoEMLP(4, 8)(x))
    clone = clone_around(model)
    if make is Affine:  # A second one, whose features are its own.
        assert clone.layers[1] is not model.layers[1]
    assert [w.path for w in clone.weights] == [w.path for w in model.weights]
    for one, other in zip(clone.variables, model.variables, strict=True):
        # The routers' own: statistics and seeds of noise.
        assert one is other or "statistics" in one.path or "seed" in one.path
    images = np.random.default_rng(0).normal(size=(2, 6, 8))
    expected = model.predict(images, verbose=0)
    if "gru" not in model.layers[1].name:  # It goes on from where it was.
        np.testing.assert_array_equal(
            clone.predict(images, verbose=0), expected
        )


@pytest.mark.backends("torch")
def test_weights_that_no_constructor_takes_are_not_made_anew():
    inputs = keras.Input((6, 8))
    model = keras.Model(inputs, layers.MoEMLP(4, 8, Scaled(4))(inputs))
    with pytest.raises(ValueError, match="Scaled with the weights .*Hold"):
        models.set_routing(model, capacity_factor=0.5)
    router = model.layers[1].router
    assert models.set_routing(model, images_per_group=1).layers[1].router is (
        router
    )


@pytest.mark.backends("torch")
def test_other_experts_of_the_same_weights_are_not_quantized():
    from keras_vmoe.export.variants import check_quantization

    bank = Widened(4, 8)
    inputs = keras.Input((6, 8))
    model = keras.Model(inputs, layers.MoEMLP(4, experts=bank)(inputs))
    with pytest.raises(ValueError, match="Only `MLPExperts`.*Widened"):
        check_quantization(model, "int8", ("int8",))


@pytest.mark.backends("torch")
@pytest.mark.parametrize("slots", [dict(num_slots=2), dict(num_slots=None)])
def test_soft_routers_share_their_gate(slots):
    router = layers.SoftRouter(4, **slots)
    router.build((None, 12, 8))
    other = router.sharing(noise_std=1.0)
    assert other.gate_layer is router.gate_layer
    assert other.noise_std == 1.0
    with pytest.raises(ValueError, match="of its slots.*num_slots=5"):
        router.sharing(num_slots=5)


@pytest.mark.backends("torch")
def test_a_balance_of_two_routers_is_one_in_files(tmp_path):
    first = layers.BiasBalancedRouter(4, name="first")
    second = layers.BiasBalancedRouter(4, balance=first.balance, name="second")
    x = inputs = keras.Input((6, 8))
    for router in (first, second):
        x = layers.MoEMLP(4, 8, router)(x)
    keras.Model(inputs, x).save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    one, two = (layer.router for layer in loaded.layers[1:])
    assert one.balance is two.balance
