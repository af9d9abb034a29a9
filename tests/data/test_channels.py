"""Images of any number of channels, from files to batches."""

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from keras_vmoe import data
from tests.data.conftest import write

GENERATOR = np.random.default_rng(0)
FOUR, SEVEN = (
    GENERATOR.integers(0, 256, (8, 6, 6, n), "uint8") for n in (4, 7)
)
ANY = {"flip": True, "erasing": 1.0, "crop_padding": 1, "cutmix": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Datasets of four channels (PNG) and of seven (a tensor)."""
    folder = tmp_path_factory.mktemp("channels")
    labels = np.arange(8) % 5
    write(folder, "four", tfds.features.Image(shape=(6, 6, 4)), FOUR, labels)
    feature = tfds.features.Tensor(shape=(6, 6, 7), dtype=np.uint8)
    write(folder, "seven", feature, SEVEN, labels)
    return folder


def images_of(*arguments, **options):
    dataset = data.load(*arguments, **options)
    return np.concatenate([x for x, _ in dataset.as_numpy_iterator()])


def test_gray_stays_gray(data_dir, gray_images):
    found = images_of("gray", "test", 28, 4, False, data_dir, channels=1)
    expected = gray_images[36:] / 127.5 - 1
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_rgb_becomes_gray(data_dir, color_images):
    found = images_of("color", "test", 8, 1, False, data_dir, channels=1)
    expected = [data.preprocess(x, 8, channels=1) for x in color_images[6:]]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    gray = color_images[6] @ [0.2989, 0.587, 0.114]
    found = data.preprocess(color_images[6], gray.shape, channels=1)[..., 0]
    np.testing.assert_allclose(found, gray / 127.5 - 1, atol=1e-5)


@pytest.mark.parametrize(("name", "stored"), [("four", FOUR), ("seven", SEVEN)])
def test_as_many_as_are_stored(folder, name, stored):
    channels = stored.shape[-1]
    found = images_of(name, "test", 6, 2, False, folder, channels=channels)
    np.testing.assert_allclose(found, stored[6:] / 127.5 - 1, atol=1e-6)
    assert data.info(name, folder).image_shape == (6, 6, channels)
    assert not list(data.find_corrupt(name, "train", folder))


@pytest.mark.parametrize("area", [None, (0.5, 1.0)])
@pytest.mark.parametrize(
    ("name", "channels"), [("gray", 1), ("four", 4), ("seven", 7)]
)
def test_augmentation(data_dir, folder, name, channels, area):
    augmentation = data.Augmentation(crop_area=area, mixup=0.5, **ANY)
    found = images_of(
        name, "train", 9, 2, True, data_dir if name == "gray" else folder,
        augmentation=augmentation, channels=channels,
    )  # fmt: skip
    assert found.shape[1:] == (9, 9, channels)
    assert found.min() >= -1 and found.max() <= 1 and found.std() > 0.1


@pytest.mark.parametrize(
    "settings",
    [{"rand_augment": 0.9}, {"three_augment": True}, {"color_jitter": 0.3}],
)
def test_augmentation_of_colors(data_dir, settings):
    (name,) = settings
    words = f"{name} must be given RGB images. Received: channels=1."
    with pytest.raises(ValueError, match=words):
        data.load(
            "gray", "train", 8, 4, True, data_dir,
            augmentation=data.Augmentation(**settings), channels=1,
        )  # fmt: skip


@pytest.mark.parametrize(("name", "channels"), [("seven", 3), ("four", 5)])
def test_channels_that_are_not_stored(folder, name, channels):
    with pytest.raises(ValueError, match=f"Received: .*, channels={channels}"):
        data.load(name, "test", 6, 2, False, folder, channels=channels)


@pytest.mark.parametrize("channels", [0, 1.5, "3"])
def test_no_number_of_channels(data_dir, channels):
    with pytest.raises(ValueError, match=f"channels={channels!r}"):
        data.load("gray", "test", 6, 2, False, data_dir, channels=channels)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_files(tmp_path, channels):
    pixels = FOUR[0] if channels == 4 else FOUR[0][..., :3]
    (tmp_path / "image.png").write_bytes(tf.io.encode_png(pixels).numpy())
    found = data.read_images(tmp_path / "image.png", 6, channels=channels)
    expected = data.preprocess(pixels, 6, channels=channels)
    np.testing.assert_array_equal(found, expected[None])
