"""An expert bank of the user's own."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from keras_vmoe import distribution
from keras_vmoe import export
from keras_vmoe import layers
from keras_vmoe import models


@keras.saving.register_keras_serializable("tests")
class GatedExperts(keras.layers.Layer):
    """Gated linear units: `silu(x @ gate) * (x @ value) @ output`."""

    def build(self, shape):  # (G, E, C, D)
        self.gate = self.add_kernel("gate", shape)
        self.value = self.add_kernel("value", shape)
        self.output_kernel = self.add_kernel("output", shape)

    def add_kernel(self, name, shape):
        initializer = keras.initializers.GlorotUniform(
            input_axes=(1,), output_axes=(2,)
        )
        return self.add_weight(
            name=name,
            shape=(shape[1], shape[-1], shape[-1]),
            initializer=initializer,
        )

    def call(self, buffers):
        hidden = ops.silu(ops.matmul(buffers, self.gate))
        hidden = hidden * ops.matmul(buffers, self.value)
        return ops.matmul(hidden, self.output_kernel)


def make(images_per_group=8, **router):
    inputs = keras.Input((5, 6))
    layer = layers.MoEMLP(
        4,
        router=layers.TopKRouter(4, 2, **router),
        experts=GatedExperts(),
        images_per_group=images_per_group,
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


def test_an_expert_starts_as_if_it_were_alone():
    bank = GatedExperts()
    bank.build((None, 16, None, 24))
    for kernel in bank.get_weights():
        np.testing.assert_allclose(kernel.std(), 24**-0.5, rtol=0.03)


def test_variables_are_found_as_those_of_experts():
    variables = make().get_layer("moe").experts.trainable_variables
    assert all("/experts/" in x.path for x in variables)


def test_dropless_needs_a_bank_that_takes_blocks():
    with pytest.raises(ValueError, match="Set capacity_factor=num_experts /"):
        make(capacity_factor="dropless")(images())


@pytest.mark.parametrize("inputs", [keras.Input((5, 6)), images()])
def test_a_bank_of_another_shape(inputs):
    bank = keras.layers.Cropping2D(((0, 0), (0, 3)), "channels_first")
    layer = layers.MoEMLP(4, experts=bank)
    with pytest.raises(ValueError, match="must return the shape.*Received"):
        layer(inputs)


@pytest.mark.parametrize("shape", [(2, 4, 3, 8), (2, 1, 3, 6), (2, 3, 3, 6)])
@pytest.mark.parametrize("bank", [GatedExperts, layers.MLPExperts])
def test_a_bank_that_was_built_for_another_layer(bank, shape):
    if bank is layers.MLPExperts and shape[1] != 4:
        return  # Refused before it is built.
    bank = bank() if bank is GatedExperts else bank(4, 8)
    bank.build(shape)
    with pytest.raises(ValueError, match="One bank serves layers.*built for"):
        layers.MoEMLP(4, experts=bank)(keras.Input((5, 6)))


@pytest.mark.backends("tensorflow")
def test_shapes_that_are_known_at_run_time_only():
    """A graph without the batch, in groups of an unknown number."""
    layer = make().get_layer("moe")
    spec = tf.TensorSpec((None, 5, 6), "float32")
    outputs = tf.function(layer, input_signature=[spec])(images())
    np.testing.assert_allclose(outputs, layer(images()), atol=1e-5)


def test_a_bank_of_another_number_of_experts():
    with pytest.raises(ValueError, match="same number of experts. Received"):
        layers.MoEMLP(4, experts=layers.MLPExperts(3, 8))


def test_settings_that_a_bank_would_not_follow():
    with pytest.raises(ValueError, match="its own `dropout`. Received"):
        layers.MoEMLP(4, experts=layers.MLPExperts(4, 8), dropout=0.1)


def test_what_a_bank_costs():
    """Three matrices of 6 by 6 for each slot."""
    cost = models.cost(make(capacity_factor=1.0))
    slots = 4 * 20 / 8  # ceil(40 * 2 / 4) of each expert, by images.
    assert cost.macs == 5 * 6 * 4 + slots * 3 * 36
    assert cost.active_params == 6 * 4 + 2 * 3 * 36


@pytest.mark.backends("torch")
def test_exported(tmp_path):
    """The process that writes imports the module that holds the bank."""
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Reshape((4, 48))(inputs)
    router = layers.TopKRouter(4, 2, capacity_factor=2.0)
    x = layers.MoEMLP(4, router=router, experts=GatedExperts())(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    model = keras.Model(inputs, keras.layers.Dense(3)(x))
    pixels = np.random.default_rng(0).normal(size=(5, 8, 8, 3))
    pixels = pixels.astype("float32")
    path = export.saved_model(model, tmp_path / "served", warmup=False)
    served = tf.saved_model.load(str(path)).signatures["serving_default"]
    logits = served(tf.constant(pixels))["logits"]
    expected = models.set_routing(model, images_per_group=1)
    expected = expected.predict(pixels, verbose=0)
    np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.backends("jax")
def test_on_several_devices():
    """On four shards it learns what it learns on one device."""
    x, losses, kernels = images(), [], []
    for shards in (None, 4):
        parallel = shards and distribution.ExpertParallel(shards)
        keras.distribution.set_distribution(parallel)
        try:
            keras.utils.set_random_seed(0)
            model = make(images_per_group=2, noise_std=0.0)
            model.compile("sgd", "mse")
            data = tf.data.Dataset.from_tensor_slices((x, 3 * x))
            data = data.repeat(4).batch(8, drop_remainder=True)
            run = model.fit(data, verbose=0, shuffle=False)
            losses.append(run.history["loss"])
            bank = model.get_layer("moe").experts
            if shards:
                (shard, *_) = bank.value.value.addressable_shards
                assert shard.data.shape == (1, 6, 6)  # One of four experts.
            kernels.append(np.asarray(bank.value))
        finally:
            keras.distribution.set_distribution(None)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    np.testing.assert_allclose(kernels[1], kernels[0], atol=1e-5)


class Pair(keras.layers.Layer):
    def call(self, buffers):
        return buffers, buffers


class OfSeven(keras.layers.Layer):
    def build(self, shape):
        self.kernel = self.add_weight(shape=(7, shape[3], shape[3]))

    def call(self, buffers):
        return buffers


@pytest.mark.backends("torch")
@pytest.mark.parametrize(
    "bank, words",
    [
        (keras.layers.Dense(8), r"start with an axis of 4 experts.*\(8, 8\)"),
        (OfSeven(), r"axis of 4 experts.*\(7, 8, 8\)"),
        (Pair(), "must return the shape.*Received: tuple"),
    ],
)
def test_what_is_no_bank_of_the_layer(bank, words):
    with pytest.raises(ValueError, match=words):
        layers.MoEMLP(4, experts=bank)(np.ones((2, 5, 8), "float32"))


@pytest.mark.backends("torch")
def test_integers_are_inputs_as_well():
    ones = np.ones((2, 5, 8))
    layer = layers.MoEMLP(4, 8)
    outputs = [layer(ones.astype(kind)) for kind in ("int32", "float32")]
    assert (outputs[0] == outputs[1]).all()
