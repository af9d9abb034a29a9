"""Dense twins of `keras.applications.ConvNeXt*`."""

import keras
import numpy as np
import pytest

from keras_vmoe import checkpoints
from keras_vmoe import models
from tests.harness import randomize

pytestmark = pytest.mark.backends("torch")


def theirs(**arguments):
    """A `ConvNeXtTiny` of Keras for 32 x 32 pixels, with random weights."""
    arguments = {"weights": None, "include_preprocessing": False,
                 "input_shape": (32, 32, 3), "classes": 10,
                 "classifier_activation": None, **arguments}  # fmt: skip
    return keras.applications.ConvNeXtTiny(**arguments)


def shrink(model):
    """Small random weights, layer scale included, for logits of order 1."""
    generator = np.random.default_rng(0)
    for weight in model.weights:
        if len(weight.shape) > 1:
            continue  # Kernels as they start.
        values = generator.uniform(0.5, 1.0, weight.shape)
        weight.assign(values.astype("float32"))
    return model


@pytest.mark.slow
def test_the_same_logits():
    """All 28 million weights."""
    source = shrink(theirs())
    model = models.from_preset("convnext_t", image_size=32, num_classes=10)
    checkpoints.load_keras_applications(model, source)
    images = np.random.default_rng(1).normal(size=(2, 32, 32, 3))
    expected = source.predict(images, verbose=0)
    got = model.predict(images, verbose=0)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(got / scale, expected / scale, atol=1e-4)


@pytest.mark.slow
def test_preprocessing_and_a_new_head():
    source = shrink(theirs(include_preprocessing=True, classes=5))
    model = models.from_preset("convnext_t", image_size=32, num_classes=10)
    with pytest.warns(UserWarning, match="has 5 classes"):
        checkpoints.load_keras_applications(model, source)
    pixels = np.random.default_rng(1).uniform(0, 255, (2, 32, 32, 3))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    pooled = [
        keras.Model(m.inputs, m.get_layer(name).output).predict(x, verbose=0)
        for m, name, x in (
            (source, "convnext_tiny_head_layernorm", pixels),
            (model, "norm", (pixels / 255 - mean) / std),
        )
    ]
    np.testing.assert_allclose(pooled[1], pooled[0], atol=1e-3)


def tiny(**arguments):
    return models.ConvNeXtMoE(
        depths=(1, 1), dims=(4, 8), num_classes=3, image_size=8, **arguments
    )


def test_only_the_dense_twin():
    moe = {"layers": [1], "num_experts": 2}
    with pytest.raises(ValueError, match="must be dense.*models.upcycle"):
        checkpoints.load_keras_applications(tiny(moe=moe), tiny())
    with pytest.raises(TypeError, match="must be a ConvNeXtMoE"):
        checkpoints.load_keras_applications(keras.Sequential(), tiny())


@pytest.mark.parametrize("other", [None, "imagenet"])
def test_what_is_no_model(other):
    with pytest.raises(TypeError, match="must be a Keras model. Received"):
        checkpoints.load_keras_applications(tiny(), other)


@pytest.mark.filterwarnings("ignore:The head of the checkpoint")
def test_a_batch_norm_is_no_norm_of_ours():
    other = keras.Sequential(
        [keras.Input((4, 4, 8)), keras.layers.BatchNormalization(name="x")]
    )
    with pytest.raises(ValueError, match="Not in the model: .*x/beta"):
        checkpoints.load_keras_applications(tiny(), other)


@pytest.mark.filterwarnings("ignore:The head of the checkpoint")
def test_other_models_are_refused_and_change_nothing():
    model = randomize(tiny())
    before = model.get_weights()
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    words = r"Missing in the file: .*block_0_conv/kernel \(7, 7, 4, 1\)"
    with pytest.raises(ValueError, match=words) as error:
        checkpoints.load_keras_applications(model, other)
    assert "; and " in str(error.value) and len(str(error.value)) < 800
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
