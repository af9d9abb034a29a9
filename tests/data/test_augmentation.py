"""Random changes to training images: what they keep and what repeats."""

import numpy as np
import pytest
import tensorflow as tf

from keras_vmoe import data
from keras_vmoe.data import images as images_lib
from keras_vmoe.data.augmentation import make_change
from keras_vmoe.data.augmentation import make_mix

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), "uint8")
LABELS = np.eye(10, dtype="float32")[np.arange(12) % 10]
KINDS = {
    "flip": {"flip": True},
    "three": {"three_augment": True},
    "jitter": {"color_jitter": 0.3},
    "erasing": {"erasing": 0.5},
    "rand": {"rand_augment": 0.5},
    "mixup": {"mixup": 0.8},
    "cutmix": {"cutmix": 1.0},
    "both": {"mixup": 0.8, "cutmix": 1.0},
}
each = pytest.mark.parametrize("kind", sorted(KINDS))


def make_augment(augmentation):
    """Changes the images of a batch one by one, and then mixes them."""
    change, mix = make_change(augmentation), make_mix(augmentation)

    def augment(images, labels, seed):
        seeds = tf.random.split(tf.cast(seed, tf.int64), 2)
        if change is not None:
            each = tf.random.split(seeds[0], tf.shape(images)[0])
            images = tf.map_fn(
                lambda x: change(*x),
                (images, each),
                fn_output_signature=tf.TensorSpec(images.shape[1:], tf.uint8),
            )
        if mix is not None:
            images, labels = mix(images, labels, seeds[1])
        return tf.cast(images, tf.float32), labels

    return augment


def run(seed, **settings):
    """Three batches of four, by a pipeline of its own."""
    augment = make_augment(data.Augmentation(**settings))
    dataset = tf.data.Dataset.from_tensor_slices((IMAGES, LABELS)).batch(4)
    dataset = tf.data.Dataset.zip(dataset, tf.data.Dataset.range(3))
    dataset = dataset.map(
        lambda batch, number: augment(*batch, [number, seed]), 3
    )
    images, labels = zip(*dataset.as_numpy_iterator(), strict=True)
    return np.concatenate(images), np.concatenate(labels)


@each
def test_ranges_labels_and_repetition(kind):
    images, labels = run(3, **KINDS[kind])
    assert images.dtype == np.float32 and images.shape == IMAGES.shape
    assert images.min() >= 0 and images.max() <= 255
    assert (np.abs(images - IMAGES).max(axis=(1, 2, 3)) > 0).any()
    np.testing.assert_allclose(labels.sum(axis=-1), 1, rtol=1e-5)
    if kind not in ("mixup", "cutmix", "both"):
        np.testing.assert_array_equal(labels, LABELS)
    again = run(3, **KINDS[kind])
    np.testing.assert_array_equal(images, again[0])
    np.testing.assert_array_equal(labels, again[1])
    other, _ = run(4, **KINDS[kind])
    assert (other != images).any()


@each
def test_eagerly_as_in_a_pipeline(kind):
    augment = make_augment(data.Augmentation(**KINDS[kind]))
    tf.config.run_functions_eagerly(True)
    try:
        results = [
            augment(IMAGES[i : i + 4], LABELS[i : i + 4], [i // 4, 3])
            for i in (0, 4, 8)
        ]
    finally:
        tf.config.run_functions_eagerly(False)
    images, labels = (np.concatenate(x) for x in zip(*results, strict=True))
    expected_images, expected_labels = run(3, **KINDS[kind])
    np.testing.assert_allclose(images, expected_images, atol=1e-3)
    np.testing.assert_allclose(labels, expected_labels, atol=1e-6)


def test_a_function_is_traced_once():
    settings = {"rand_augment": 0.7, "rand_augment_layers": 1, "mixup": 0.5}
    for make in (make_change, make_mix):
        one, other = (make(data.Augmentation(**settings)) for _ in range(2))
        assert one is other
        assert make(data.Augmentation(crop_padding=2)) is None


def test_flips_are_mirror_images():
    images, _ = run(0, flip=True)
    same = (images == IMAGES).all(axis=(1, 2, 3))
    mirrored = (images == IMAGES[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (same | mirrored).all() and same.any() and mirrored.any()


def test_mixup_mixes_labels_as_images():
    """Of black and white images the gray is the label."""
    images = np.zeros((8, 4, 4, 3), "uint8")
    images[::2] = 255
    labels = np.eye(2, dtype="float32")[np.arange(8) % 2]
    augment = make_augment(data.Augmentation(mixup=1.0))
    mixed, mixed_labels = augment(images, labels, [0, 5])
    gray = np.asarray(mixed).mean(axis=(1, 2, 3)) / 255
    np.testing.assert_allclose(gray, mixed_labels[:, 0], atol=1e-5)
    assert ((gray > 0.01) & (gray < 0.99)).any()


def test_cutmix_mixes_labels_by_area():
    images = np.zeros((8, 16, 16, 3), "uint8")
    images[::2] = 255
    labels = np.eye(2, dtype="float32")[np.arange(8) % 2]
    augment = make_augment(data.Augmentation(cutmix=1.0))
    mixed, mixed_labels = augment(images, labels, [0, 5])
    mixed = np.asarray(mixed)
    gray = mixed.mean(axis=(1, 2, 3)) / 255
    np.testing.assert_allclose(gray, mixed_labels[:, 0], atol=1e-5)
    assert set(np.unique(mixed)) == {0.0, 255.0}
    assert ((gray > 0.05) & (gray < 0.95)).any()


# Crops.


def jpeg(height, width):
    pixels = np.linspace(0, 255, height * width * 3).reshape(height, width, 3)
    return tf.io.encode_jpeg(pixels.astype("uint8"), quality=100)


def decode(image):
    return tf.io.decode_image(image, 3, expand_animations=False)


def test_a_window_of_a_jpeg_is_that_of_its_pixels():
    """Decoding only the window gives what cropping the whole gives."""
    image = jpeg(40, 60)
    for seed in range(5):
        args = ((0.1, 0.5), [seed, 0])
        window = images_lib.decode_and_crop(image, decode, *args)
        whole = images_lib.decode_and_crop(decode(image), None, *args)
        assert window.shape == whole.shape
        difference = np.abs(window.numpy().astype(int) - whole.numpy())
        assert difference.max() <= 2
        share = window.shape[0] * window.shape[1] / 2400
        assert 0.05 < share <= 0.55


def test_windows_of_png_gray_and_sixteen_bits():
    png = tf.io.encode_png(IMAGES[0])
    crop = images_lib.decode_and_crop(png, decode, (0.2, 0.5), [1, 2])
    assert crop.shape[-1] == 3 and crop.dtype == tf.uint8
    deep = tf.io.encode_png(IMAGES[0].astype("uint16") * 257)

    def decode_16(image):
        return tf.io.decode_png(image, 3, tf.uint16)

    crop = images_lib.decode_and_crop(deep, decode_16, (0.2, 0.5), [1, 2])
    assert crop.dtype == tf.uint16


@pytest.mark.parametrize("share", [1.0, 0.875, 0.5])
def test_the_centre_of_an_image(share):
    image = tf.constant(IMAGES[0, :, :12])  # 16 x 12.
    crop = images_lib.center_crop(image, (8, 8), share)
    side = round(12 * share)
    top, left = (16 - side) // 2, (12 - side) // 2
    expected = IMAGES[0, top : top + side, left : left + side]
    np.testing.assert_array_equal(crop, expected)


# In `load`.


def load(epoch=None, seed=1, **settings):
    augmentation = data.Augmentation(**settings) if settings else None
    dataset = data.load(
        "digits", "train[:64]", 16, 16, True, seed=seed, epoch=epoch,
        augmentation=augmentation,
    )  # fmt: skip
    images, labels = zip(*dataset.as_numpy_iterator(), strict=True)
    return np.concatenate(images), np.concatenate(labels)


@pytest.mark.parametrize(
    "settings", [{}, {"crop_padding": 2}, {"crop_area": (0.3, 1.0)},
                 {"mixup": 0.8, "flip": True}],
)  # fmt: skip
def test_an_epoch_is_a_function_of_its_number(settings):
    images, labels = load(epoch=3, **settings)
    again, same = load(epoch=3, **settings)
    np.testing.assert_array_equal(images, again)
    np.testing.assert_array_equal(labels, same)
    other, _ = load(epoch=4, **settings)
    assert (other != images).any()


def test_one_epoch_is_the_same_however_often_it_is_read():
    dataset = data.load("digits", "train[:64]", 16, 16, True, epoch=0)
    first, second = (
        np.concatenate([labels for _, labels in dataset.as_numpy_iterator()])
        for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)


def test_mixed_labels_are_one_hot_and_repeats_stand_side_by_side():
    _, labels = load(mixup=0.8)
    assert labels.shape == (64, 10) and labels.dtype == np.float32
    _, labels = load(repeats=2)
    np.testing.assert_array_equal(labels[::2], labels[1::2])
    assert len(labels) == 64


@pytest.mark.parametrize("settings", [{}, {"crop_area": (0.3, 1.0)}])
def test_copies_are_changed_each_in_its_own_way(settings):
    """Also where they are decoded together."""
    images, labels = load(repeats=2, erasing=1.0, **settings)
    np.testing.assert_array_equal(labels[::2], labels[1::2])
    differs = (images[::2] != images[1::2]).any(axis=(1, 2, 3))
    assert differs.all()
    again, _ = load(repeats=2, erasing=1.0, **settings)
    np.testing.assert_array_equal(images, again)


def test_changes_are_those_of_the_number_and_the_seed():
    """A pipeline does to each image what `make_change` does with its seed."""
    settings = data.Augmentation(flip=True, rand_augment=0.9, erasing=0.5)
    change = make_change(settings)
    seeds = tf.constant([[i, 7] for i in range(12)], tf.int64)
    expected = [change(IMAGES[i], seeds[i]) for i in range(12)]
    dataset = tf.data.Dataset.from_tensor_slices((IMAGES, seeds))
    changed = dataset.map(change, 3).batch(12).get_single_element()
    assert changed.dtype == tf.uint8
    np.testing.assert_array_equal(changed, expected)


def test_repeated_augmentation_sees_all_images_in_time():
    seen, size = set(), 64
    for epoch in range(12):
        dataset = data.load(
            "digits", f"train[:{size}]", 8, 16, True, epoch=epoch,
            augmentation=data.Augmentation(repeats=4), shuffle_buffer=4,
        )  # fmt: skip
        images = np.concatenate([x for x, _ in dataset.as_numpy_iterator()])
        distinct = {image.tobytes() for image in images}
        assert len(images) == size and len(distinct) == size // 4
        seen |= distinct
    assert len(seen) > 0.8 * size


def test_one_hot_labels():
    dataset = data.load("digits", "test[:8]", 16, 8, False, one_hot=True)
    ((_, labels),) = dataset.as_numpy_iterator()
    assert labels.shape == (8, 10) and (labels.sum(axis=-1) == 1).all()


# Words.


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"repeats": 0}, "repeats=0"),
        (
            {"mixup": -1},
            "`mixup` must be a finite number and not negative. Received",
        ),
        ({"erasing": 1.5}, "number in .0, 1.. Received: erasing=1.5"),
        ({"crop_area": (0.5, 0.1)}, "crop_area=.0.5, 0.1."),
        ({"rand_augment": "strong"}, "rand_augment='strong'"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        data.Augmentation(**settings)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"augmentation": {"flip": True}}, "must be an Augmentation, an image"),
        ({"test_crop": 0}, "test_crop=0"),
        ({"epoch": -1}, "epoch=-1"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        data.load("digits", "test[:8]", 16, 8, False, **arguments)
