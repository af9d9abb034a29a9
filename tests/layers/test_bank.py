"""An expert bank of the user's own."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_vmoe import layers
from keras_vmoe import models


@keras.saving.register_keras_serializable("tests")
class GatedExperts(keras.layers.Layer):
    """Gated linear units: `silu(x @ gate) * (x @ value) @ output`."""

    def build(self, shape):  # (G, E, C, D)
        kernel = (shape[1], shape[-1], shape[-1])
        self.gate = self.add_weight(shape=kernel, name="gate")
        self.value = self.add_weight(shape=kernel, name="value")
        self.output_kernel = self.add_weight(shape=kernel, name="output")

    def call(self, buffers):
        hidden = ops.silu(ops.matmul(buffers, self.gate))
        hidden = hidden * ops.matmul(buffers, self.value)
        return ops.matmul(hidden, self.output_kernel)


def make(**router):
    inputs = keras.Input((5, 6))
    layer = layers.MoEMLP(
        4,
        router=layers.TopKRouter(4, 2, **router),
        experts=GatedExperts(),
        name="moe",
    )
    return keras.Model(inputs, layer(inputs))


def images():
    return np.random.default_rng(0).normal(size=(8, 5, 6)).astype("float32")


def test_trained_saved_loaded_and_dialled(tmp_path):
    model, x = make(), images()
    model.compile("sgd", "mse")
    before = model.get_layer("moe").get_weights()
    model.fit(x, 3 * x, verbose=0)
    after = model.get_layer("moe").get_weights()
    assert all((a != b).any() for a, b in zip(before, after, strict=True))
    expected = model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), expected)
    dialled = models.set_routing(model, num_selected_experts=1)
    layer = dialled.get_layer("moe")
    assert layer.experts is model.get_layer("moe").experts
    assert layer.router.num_selected_experts == 1


def test_variables_are_found_as_those_of_experts():
    variables = make().get_layer("moe").experts.trainable_variables
    assert all("/experts/" in x.path for x in variables)


def test_dropless_needs_a_bank_that_takes_blocks():
    with pytest.raises(ValueError, match="Set capacity_factor=num_experts /"):
        make(capacity_factor=None)(images())


def test_a_bank_of_another_shape():
    layer = layers.MoEMLP(4, experts=keras.layers.Dense(3))
    with pytest.raises(ValueError, match="must return the shape.*Received"):
        layer(images())


def test_a_bank_of_another_number_of_experts():
    with pytest.raises(ValueError, match="same number of experts. Received"):
        layers.MoEMLP(4, experts=layers.MLPExperts(3, 8))


def test_settings_that_a_bank_would_not_follow():
    with pytest.raises(ValueError, match="its own `dropout`. Received"):
        layers.MoEMLP(4, experts=layers.MLPExperts(4, 8), dropout=0.1)
