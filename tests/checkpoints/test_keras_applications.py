"""Dense twins of `keras.applications.ConvNeXt*`."""

import keras
import numpy as np
import PIL.Image
import pytest
import tensorflow as tf
from keras.src.applications.convnext import ConvNeXt

from keras_vmoe import checkpoints
from keras_vmoe import data
from keras_vmoe import evaluation
from keras_vmoe import export
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


@pytest.mark.backends("tensorflow")
@pytest.mark.slow
def test_the_same_answers_for_the_same_files(tmp_path):
    """From files to logits: ours, and Keras's own preprocessing and model.

    Of a small one, which Keras makes under no public name.
    """
    sizes = {"depths": (1, 1, 2, 1), "projection_dims": (8, 16, 16, 32)}
    source = shrink(
        ConvNeXt(
            **sizes, weights=None, input_shape=(32, 32, 3), classes=10,
            classifier_activation=None, name="convnext_tiny",
        )
    )  # fmt: skip
    model = models.ConvNeXtMoE(
        *sizes.values(), num_classes=10, image_size=32,
        layer_scale_init_value=1e-6,
    )  # fmt: skip
    checkpoints.load_keras_applications(model, source)
    assert model.preprocessing == data.Preprocessing.imagenet()
    generator, paths = np.random.default_rng(1), []
    for i in range(3):
        paths.append(tmp_path / "images" / "test" / "abc"[i] / "0.jpg")
        paths[i].parent.mkdir(parents=True)
        noise = generator.integers(0, 256, (6, 5, 3), "uint8")
        image = PIL.Image.fromarray(noise).resize((50, 60))
        image.save(paths[i], quality=95)
    contents = [path.read_bytes() for path in paths]
    pixels = [tf.io.decode_jpeg(x) for x in contents]
    pixels = [tf.image.resize(x, (32, 32), antialias=True) for x in pixels]
    expected = source.predict(np.stack(pixels), verbose=0)
    scale = np.abs(expected).max()

    def check(found):
        np.testing.assert_allclose(found / scale, expected / scale, atol=1e-3)

    kept = models.load(models.save(model, tmp_path / "m.keras"))
    wanted = kept.preprocessing
    images = data.read_images(paths, 32, preprocessing=wanted)
    check(kept.predict(images, verbose=0))
    dataset = data.load(
        "image_folder", "test", 32, 3, False, tmp_path / "images",
        num_classes=10, preprocessing=wanted,
    )  # fmt: skip
    check(kept.predict(dataset, verbose=0))
    loss = evaluation.measure(kept, dataset).loss
    chances = np.exp(expected) / np.exp(expected).sum(-1, keepdims=True)
    assert loss == pytest.approx(-np.log(np.diag(chances)).mean(), rel=1e-3)
    served = export.saved_model(kept, tmp_path / "served", warmup=False)
    signature = tf.saved_model.load(str(served)).signatures["serve_jpeg"]
    check(signature(tf.constant(contents))["logits"].numpy())


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
