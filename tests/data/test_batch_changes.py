"""Augmentation by layers of Keras and Keras-CV, and by functions."""

import keras
import keras_cv
import numpy as np
import pytest

from keras_vmoe import data
from keras_vmoe.data import loading

CV, KERAS = keras_cv.layers, keras.layers


def batch_of(augmentation, training=True, **options):
    dataset = data.load(
        "digits", "test[:32]", 8, 32, training,
        augmentation=augmentation, **options,
    )  # fmt: skip
    return next(iter(dataset.as_numpy_iterator()))


class Darker(CV.BaseImageAugmentationLayer):
    def augment_image(self, image, **kwargs):
        return image * 0.7

    def augment_label(self, label, **kwargs):
        return label


@pytest.mark.parametrize(
    "make",
    [
        lambda: KERAS.RandAugment(),
        lambda: KERAS.RandomBrightness(0.5, value_range=(0, 1)),
        lambda: keras.Sequential([KERAS.Pipeline([KERAS.RandomRotation(0.2)])]),
        lambda: [data.Augmentation(crop_padding=1), KERAS.RandomFlip()],
        lambda: CV.RandAugment(value_range=(0, 255)),
        lambda: [[CV.RandAugment(value_range=(0, 1))]],
        lambda: CV.Posterization(bits=4, value_range=(0, 1)),
        lambda: Darker(),
        lambda: CV.RandomCropAndResize((8, 8), (0.5, 0.9), (0.75, 1.33)),
        lambda: CV.RandomAugmentationPipeline(
            [CV.RandomFlip(), CV.RandomBrightness(0.2)], 2
        ),
        lambda: lambda images, labels: (255 - images, labels),
    ],
)
def test_images_change_and_stay_images(make):
    plain, _ = batch_of(None, training=False)
    images, labels = batch_of(make())
    assert images.dtype == "float32" and labels.dtype == "int32"
    assert images.shape == plain.shape and labels.shape == (32,)
    assert np.abs(images).max() <= 1.001
    # In some order: none is only what is stored.
    distance = np.abs(images[:, None] - plain[None]).mean((2, 3, 4)).min(1)
    assert distance.mean() > 0.01
    assert np.ptp(images) > 1.0
    evaluated, _ = batch_of(make(), training=False)
    np.testing.assert_array_equal(evaluated, plain)


class MyMixUp(KERAS.MixUp):
    pass


@pytest.mark.parametrize(
    "make",
    [
        lambda: KERAS.MixUp(),
        lambda: MyMixUp(),
        lambda: [KERAS.RandomFlip(), KERAS.CutMix()],
        lambda: CV.MixUp(),
        lambda: CV.RandomChoice([CV.MixUp(), CV.CutMix()], batchwise=True),
    ],
)
def test_mixed_labels_are_distributions(make):
    _, labels = batch_of(make())
    assert labels.shape == (32, 10) and labels.dtype == "float32"
    np.testing.assert_allclose(labels.sum(-1), 1, atol=1e-6)
    assert ((labels > 0.01) & (labels < 0.99)).any()


def test_a_function_gets_pixels_and_labels_as_asked():
    seen = []

    def look(images, labels):
        seen.append((images.dtype.name, labels.dtype.name, labels.shape.rank))
        return images / 2, labels

    images, labels = batch_of(look, one_hot=True, preprocessing={"mean": 0})
    assert {*seen} == {("float32", "float32", 2)}
    assert images.min() >= 0 and images.max() <= 1  # 255 / 2 / 127.5
    assert labels.shape == (32, 10)


def test_gray_images():
    """Of a layer that takes no dict; digits are gray before."""
    images, _ = batch_of(KERAS.RandomGrayscale(1.0), epoch=0)
    plain, _ = batch_of(None, epoch=0)
    np.testing.assert_allclose(images, plain, atol=1e-2)


def test_pixels_of_another_range_come_back():
    still = KERAS.RandomBrightness(0.0, value_range=(-1, 1))
    images, _ = batch_of(still, class_weights=None)
    plain, _ = batch_of(data.Augmentation())
    images, plain = (
        found[np.argsort(found.reshape(32, -1).sum(1))]
        for found in (images, plain)
    )
    np.testing.assert_allclose(images, plain, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: KERAS.RandomCrop(4, 4), r"'random_crop.*', .* \(2, 4, 4, 3\)"),
        (lambda: lambda x, y: (x[:, :5], y), r"<lambda>.*\(2, 5, 8, 3\)"),
        (lambda: lambda x, y: (x, y[:1]), r"shape of the labels, \(2,\) of"),
        (lambda: lambda x, y: (x, None), r"which fails|shape of the labels"),
        (lambda: lambda x, y: x, "return both. Received: '<lambda>', which f"),
        (lambda: lambda x: x, "which fails: .*takes 1 positional argument"),
        (lambda: lambda x, y: None, "return both. Received: '<lambda>'"),
        (lambda: KERAS.Dropout(0.5), "belong in the model"),
        (lambda: KERAS.RandomFlip, "an Augmentation first. Received"),
        (lambda: "flip", "Received: augmentation='flip'"),
        (lambda: [KERAS.RandomFlip(), data.Augmentation()], "Augmentation f"),
        (
            lambda: CV.RandomChoice(
                [
                    CV.RandAugment(value_range=(0, 255)),
                    CV.RandAugment(value_range=(0, 1)),
                ]
            ),
            "must have one `value_range`",
        ),
    ],
)
def test_what_is_no_augmentation(make, words):
    with pytest.raises(ValueError, match=words):
        batch_of(make())


def test_what_is_wrong_is_told_before_files_are_read(monkeypatch):
    monkeypatch.setattr(loading, "_part_of", lambda *_, **__: pytest.fail())
    with pytest.raises(ValueError, match="`augmentation` must be an Augment"):
        data.load("digits", "train", 8, 8, True, augmentation=[3])
