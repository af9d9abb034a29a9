"""`predict`: uneven batches are spread all the same, and groups stay whole."""

import keras
import numpy as np
import pytest

from keras_vmoe import distribution
from keras_vmoe import layers
from keras_vmoe.distribution import prediction


def model_of(*images_per_group):
    """Layers whose experts are too small for all tokens of a group."""
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((4, 6))
    for images in images_per_group:
        router = layers.TopKRouter(4, 2, capacity_factor=0.5, noise_std=0.0)
        x = x + layers.MoEMLP(4, 8, router, images_per_group=images)(x)
    return keras.Model(inputs, x)


@pytest.fixture
def calls(monkeypatch):
    """Notes how many images were spread, and how many not."""
    found = []
    call = prediction._call

    def noted(model, images, sharding, parallel):
        found.append((len(images), sharding is not None))
        return call(model, images, sharding, parallel)

    monkeypatch.setattr(prediction, "_call", noted)
    return found


@pytest.mark.backends("jax")
@pytest.mark.parametrize(
    ("groups", "images", "expected"),
    [
        ((2,), 16, [(16, True)]),
        # Six groups, two of zeros, and half a group on one device.
        ((2,), 13, [(16, True), (1, False)]),
        ((2,), 1, [(1, False)]),
        ((2, 3), 13, [(24, True), (1, False)]),
        # All images compete: zeros would take slots.
        (("batch",), 12, [(12, False)]),
        ((), 5, [(8, True)]),
    ],
)
def test_uneven_batches_are_spread(calls, groups, images, expected):
    x = np.random.default_rng(0).normal(size=(images, 4, 6)).astype("float32")
    alone = model_of(*groups).predict_on_batch(x)
    devices = keras.distribution.list_devices()[:4]
    parallel = keras.distribution.DataParallel(devices=devices)
    with parallel.scope():
        spread = distribution.predict(model_of(*groups), x)
    np.testing.assert_allclose(spread, alone, atol=1e-6)
    assert calls == expected


def test_one_device():
    x = np.ones((3, 4, 6), "float32")
    model = model_of(2)
    expected = model.predict_on_batch(x)
    np.testing.assert_allclose(
        distribution.predict(model, x), expected, atol=1e-6
    )
