"""`load`: content, order, determinism, and what a Keras model is fed."""

import pathlib
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from keras_vmoe import data
from keras_vmoe.data import schema
from keras_vmoe.data.schema import read_schema
from tests.data.conftest import write

LABELS = np.arange(48) % 5  # Of `gray`, in the order of its files.

# CIFAR-10 where it lies beside the repository; the rest is written anew.
_SHARED = pathlib.Path(__file__).resolve().parents[3] / "shared" / "data"
_REAL = [("cifar10", _SHARED)] if (_SHARED / "cifar10").is_dir() else []


def arrays(dataset):
    """All images and all labels of one pass."""
    images, labels = zip(*dataset.as_numpy_iterator(), strict=True)
    return np.concatenate(images), np.concatenate(labels)


@pytest.fixture
def folder(request, data_dir):
    return request.param or data_dir


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("image_size", [16, (8, 24)])
@pytest.mark.parametrize(
    "name, folder",
    [("gray", None), ("color", None), ("digits", None), *_REAL],
    indirect=["folder"],
)
def test_batches_are_what_a_model_expects(name, folder, image_size, training):
    dataset = data.load(name, "train[:6]", image_size, 4, training, folder)
    height, width = np.broadcast_to(image_size, 2)
    specs = dataset.element_spec
    assert specs[0].shape[1:] == (height, width, 3)
    assert [spec.dtype for spec in specs] == [tf.float32, tf.int32]
    images, labels = next(iter(dataset))
    assert images.shape == (4, height, width, 3)
    assert labels.shape == (4,)
    assert np.min(images) >= -1 - 1e-6 and np.max(images) <= 1 + 1e-6
    assert np.std(images) > 0.1
    assert len(dataset) == (1 if training else 2)


def test_evaluation_is_the_files_in_order(data_dir, gray_images):
    dataset = data.load("gray", "train", 28, 5, False, data_dir)
    for _ in range(2):
        images, labels = arrays(dataset)
        np.testing.assert_array_equal(labels, LABELS[:36])
        expected = np.repeat(gray_images[:36] / 127.5 - 1, 3, axis=-1)
        np.testing.assert_allclose(images, expected, atol=1e-6)


def test_evaluation_reads_one_file_after_the_other(data_dir):
    images, _ = arrays(data.load("long", "train", 1, 16, False, data_dir))
    numbers = np.round((images[:, 0, 0, 0] + 1) * 127.5)
    np.testing.assert_array_equal(numbers, np.arange(120))


def test_sums_and_slices_of_splits(data_dir):
    dataset = data.load("gray", "test+train[:25%]", 8, 4, False, data_dir)
    expected = np.concatenate([LABELS[36:], LABELS[:9]])
    np.testing.assert_array_equal(arrays(dataset)[1], expected)


def test_slices_of_a_dataset_in_class_order_are_warned_about_once(tmp_path):
    image = tfds.features.Image(shape=(1, 1, 1))
    pixels = np.zeros((48, 1, 1, 1), "uint8")
    # Two files, of 20 examples of class 0 and 16 of class 1.
    write(tmp_path, "by_class", image, pixels, np.arange(48) // 20, 2)
    data.load("by_class", "train", 1, 4, False, tmp_path)
    words = "'train' in .*by_class.* class 0 .* class 1. Take whole splits"
    with pytest.warns(UserWarning, match=words) as warned:
        data.load("by_class", "test+train[:90%]", 1, 4, False, tmp_path)
    assert len(warned) == 1 and warned[0].filename == __file__
    data.load("by_class", "train[:50%]", 1, 4, False, tmp_path)


def test_load_agrees_with_preprocess(data_dir, color_images):
    dataset = data.load("color", "train", (9, 7), 4, False, data_dir)
    images, _ = arrays(dataset)
    for image, raw in zip(images, color_images[:6], strict=True):
        np.testing.assert_allclose(
            image, data.preprocess(raw, (9, 7)), atol=1e-6
        )


@pytest.mark.parametrize("name", ["deep", "floats", "tensors"])
def test_every_pixel_type_means_the_same(name, data_dir, gray_images):
    images, _ = arrays(data.load(name, "train", 28, 4, False, data_dir))
    expected = np.repeat(gray_images[:6] / 127.5 - 1, 3, axis=-1)
    np.testing.assert_allclose(images, expected, atol=1e-5)


# Training: 36 examples of `gray`, identified by their first pixels.


def train(data_dir, epochs=1, **options):
    """The images of some epochs, `(epochs, B, 28, 28, 3)`."""
    dataset = data.load("gray", "train", 28, 4, True, data_dir, **options)
    return np.stack([arrays(dataset)[0] for _ in range(epochs)])


def as_sets(images):
    return sorted(image.tobytes() for image in images)


def test_training_epochs_are_permutations_that_differ(data_dir):
    evaluation, _ = arrays(data.load("gray", "train", 28, 4, False, data_dir))
    epochs = train(data_dir, epochs=3)
    orders = {epoch.tobytes() for epoch in [*epochs, evaluation]}
    assert len(orders) == 4
    for epoch in epochs:
        assert as_sets(epoch) == as_sets(evaluation)


def test_class_weights(data_dir):
    """Class 0 four times as often; the length of an epoch stays."""

    def labels_of(passes, epoch=None):
        dataset = data.load(
            "gray", "train", 8, 6, True, data_dir, seed=1, epoch=epoch,
            class_weights=[4, 1, 1, 1, 1],
        )  # fmt: skip
        assert len(dataset) == 6
        return [arrays(dataset)[1].tolist() for _ in range(passes)]

    passes = labels_of(40)
    assert passes[0] != passes[1]
    assert labels_of(1) == passes[:1]
    first, second = labels_of(2, epoch=3)
    assert first == second != labels_of(1, epoch=4)[0]
    counts = np.bincount(LABELS[:36], minlength=5) * [4, 1, 1, 1, 1]
    many = np.concatenate(passes)
    shares = np.bincount(many, minlength=5) / len(many)
    np.testing.assert_allclose(shares, counts / counts.sum(), atol=0.04)


@pytest.mark.parametrize("weights", [[1, 2], [0, 1, 1, 1, 1], "even"])
def test_bad_class_weights(data_dir, weights):
    with pytest.raises(ValueError, match="must be 5 positive numbers"):
        data.load("gray", "train", 8, 4, True, data_dir, class_weights=weights)


def test_training_labels_stay_with_their_images(data_dir, gray_images):
    images, labels = arrays(data.load("gray", "train", 28, 4, True, data_dir))
    known = np.round((images[..., :1] + 1) * 127.5).astype("uint8")
    for image, label in zip(known, labels, strict=True):
        (position,) = np.flatnonzero((gray_images == image).all((1, 2, 3)))
        assert LABELS[position] == label


@pytest.mark.parametrize("padding", [0, 2])
def test_training_repeats_for_the_same_seed_only(data_dir, padding):
    augmentation = data.Augmentation(crop_padding=padding)
    options = {"epochs": 2, "augmentation": augmentation}
    first = train(data_dir, seed=1, **options)
    np.testing.assert_array_equal(first, train(data_dir, seed=1, **options))
    assert not np.array_equal(first, train(data_dir, seed=2, **options))


def window_of(crop, image, padding):
    """The offsets at which the padded image holds the crop."""
    height, width, _ = image.shape
    black = [(padding, padding), (padding, padding), (0, 0)]
    padded = np.pad(image, black, constant_values=-1)
    return [
        (y, x)
        for y in range(2 * padding + 1)
        for x in range(2 * padding + 1)
        if np.array_equal(padded[y : y + height, x : x + width], crop)
    ]


def test_training_crops_are_windows_that_differ_between_epochs():
    # A buffer of one does not shuffle, so that images can be compared.
    augmentation = data.Augmentation(crop_padding=2)
    options = {"augmentation": augmentation, "shuffle_buffer": 1}
    crops = data.load("digits", "train[:64]", 8, 16, True, **options)
    plain, _ = arrays(data.load("digits", "train[:64]", 8, 16, False))
    epochs = []
    for _ in range(2):
        images, _ = arrays(crops)
        windows = [
            window_of(crop, image, 2)
            for crop, image in zip(images, plain, strict=True)
        ]
        assert all(windows)
        epochs.append([w[0] for w in windows if len(w) == 1])
    assert len(set(epochs[0])) > 15  # Of 25.
    assert epochs[0] != epochs[1]


def test_evaluation_ignores_what_is_random(data_dir):
    plain = arrays(data.load("gray", "test", 28, 5, False, data_dir))
    augmentation = data.Augmentation(crop_padding=4, flip=True, mixup=1.0)
    options = {"seed": 3, "augmentation": augmentation, "shuffle_buffer": 7}
    other = data.load("gray", "test", 28, 5, False, data_dir, **options)
    for expected, result in zip(plain, arrays(other), strict=True):
        np.testing.assert_array_equal(expected, result)


@pytest.mark.parametrize(
    "training, drop_remainder, sizes",
    [
        (True, None, [5, 5]),
        (True, False, [5, 5, 2]),
        (False, None, [5, 5, 2]),
        (False, True, [5, 5]),
    ],
)
def test_last_batch(data_dir, training, drop_remainder, sizes):
    dataset = data.load(
        "gray", "test", 8, 5, training, data_dir, drop_remainder=drop_remainder
    )
    assert [len(labels) for _, labels in dataset] == sizes
    assert len(dataset) == len(sizes)
    static = 5 if sizes[-1] == 5 else None
    assert dataset.element_spec[0].shape[0] == static


def test_num_classes_may_exceed_the_datasets(data_dir):
    dataset = data.load("gray", "test", 8, 4, False, data_dir, num_classes=9)
    assert arrays(dataset)[1].max() == 4


def test_keras_fits_and_evaluates():
    model = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(10)])
    model.compile(
        keras.optimizers.Adam(0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    train = data.load("digits", "train", 8, 64, True)
    test = data.load("digits", "test", 8, 64, False)
    model.fit(train, epochs=2, shuffle=False, verbose=0)
    assert model.evaluate(test, verbose=0, return_dict=True)["accuracy"] > 0.6


_FIGURES = {
    "digits": ({"train": 1254, "validation": 179, "test": 364}, (8, 8, 1)),
    "cifar10": ({"train": 50_000, "test": 10_000}, (32, 32, 3)),
}


@pytest.mark.parametrize("name, folder", [("digits", None), *_REAL])
def test_published_figures(name, folder):
    splits, image_shape = _FIGURES[name]
    info = data.info(name, folder)
    assert info.splits == splits
    assert info.image_shape == image_shape
    assert info.num_classes == len(info.class_names) == 10
    dataset = data.load(name, "test", image_shape[0], 500, False, folder)
    labels = np.concatenate([y for _, y in dataset.as_numpy_iterator()])
    counts = np.bincount(labels, minlength=10)
    assert counts.sum() == splits["test"]
    assert counts.max() - counts.min() <= 0.01 * counts.sum()


def test_info(data_dir):
    assert data.info("gray", data_dir) == schema.DatasetInfo(
        name="gray",
        num_classes=5,
        class_names=("0", "1", "2", "3", "4"),
        splits={"train": 36, "test": 12},
        image_shape=(28, 28, 1),
    )
    assert data.info("color", data_dir).image_shape == (None, None, 3)
    unknown = data.info("wrong_labels", data_dir)
    assert (unknown.num_classes, unknown.class_names) == (None, ())


def test_supervised_keys_name_the_features():
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(4, 4, 1)),
            "label": tfds.features.ClassLabel(num_classes=2),
            "photo": tfds.features.Image(shape=(8, 8, 3)),
            "kind": tfds.features.ClassLabel(num_classes=7),
        }
    )
    keys = ("photo", "kind")
    info = types.SimpleNamespace(features=features, supervised_keys=keys)
    schema = read_schema("photos", info)
    assert (schema.image, schema.label, schema.num_classes) == (*keys, 7)
