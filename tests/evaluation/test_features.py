"""`extract_features`: what the head of a model gets."""

import keras
import numpy as np
import pytest

from keras_vmoe import evaluation
from tests.harness import first_everywhere
from tests.harness import randomize
from tests.models.definitions import images_of
from tests.models.definitions import tiny

LABELS = np.arange(8) % 10


def batches():
    images = images_of(8)
    return [(images[:5], LABELS[:5]), (images[5:], LABELS[5:])]


@pytest.mark.parametrize("representation_size", first_everywhere([6, None]))
@pytest.mark.backends("jax", "torch")
def test_the_head_makes_logits_of_them(representation_size):
    model = tiny(representation_size=representation_size)
    model = randomize(model)
    features, labels = evaluation.extract_features(model, batches())
    np.testing.assert_array_equal(labels, LABELS)
    logits = np.concatenate([model.predict(x, verbose=0) for x, _ in batches()])
    kernel, bias = model.get_layer("head").get_weights()
    np.testing.assert_allclose(features @ kernel + bias, logits, atol=1e-5)
    assert features.dtype == np.float32 and labels.dtype == np.int64


@pytest.mark.backends("torch")
def test_a_model_without_a_head():
    model = randomize(tiny(num_classes=None, representation_size=6))
    features, _ = evaluation.extract_features(model, batches())
    expected = [model.predict(x, verbose=0) for x, _ in batches()]
    np.testing.assert_allclose(features, np.concatenate(expected), atol=1e-6)


@pytest.mark.backends("torch")
def test_a_model_of_maps():
    inputs = keras.Input((8, 8, 3))
    model = keras.Model(inputs, keras.layers.Conv2D(2, 3, name="conv")(inputs))
    words = "vector of features per image.*Received: a 'conv' of output shape"
    with pytest.raises(ValueError, match=words):
        evaluation.extract_features(model, batches())


@pytest.mark.backends("torch")
def test_images_that_spoil_the_features():
    model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten()])
    images = images_of(8)
    images[3, 0, 0, 0] = np.nan
    images[6] = np.inf
    words = r"in 2 images \(counted from 0: 3, 6\)\. Look at those images"
    with pytest.raises(ValueError, match=words):
        evaluation.extract_features(model, [(images, LABELS)])


@pytest.mark.backends("torch")
def test_no_images():
    with pytest.raises(ValueError, match="Received: an empty dataset"):
        evaluation.extract_features(tiny(), [])
