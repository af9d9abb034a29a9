"""What the package uses of Keras that is not public."""

import keras
import pytest
from keras import ops

from keras_vmoe import _keras
from keras_vmoe import layers


def test_layers_in_layers_and_models_are_found():
    class Outer(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.inner = layers.MoEMLP(2, 4)

    outer = Outer()
    nested = keras.Sequential([keras.layers.Dense(2), outer])
    model = keras.Sequential([nested, keras.layers.ReLU()])
    found = _keras.all_layers(model)
    for layer in (model, nested, *nested.layers, outer.inner, model.layers[1]):
        assert sum(x is layer for x in found) == 1
    assert _keras.parts_of(model) == model.layers
    assert _keras.parts_of(outer) == [outer.inner]


def test_the_seed_that_was_set():
    keras.utils.set_random_seed(123)
    assert _keras.get_random_seed() == 123


@pytest.mark.backends("jax", "tensorflow", "torch")
def test_uninitialized_variables_stay_so():
    made = []

    def initializer(shape, dtype=None):
        made.append(shape)
        return ops.zeros(shape, dtype)

    def build(size):
        keras.layers.Dense(size, kernel_initializer=initializer).build((2,))

    with _keras.uninitialized_variables():
        build(3)
    # A scope that ends fills what is waiting: that layer must not be.
    with keras.StatelessScope():
        build(4)
    assert made == [(2, 4)]
