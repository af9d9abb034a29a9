"""How a model wants its images, as a value."""

import numpy as np
import PIL.Image
import pytest

from keras_vmoe import data

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@pytest.fixture
def folder(tmp_path):
    """Four photographs of noise, 40 x 30, in two classes."""
    generator = np.random.default_rng(0)
    for i in range(4):
        path = tmp_path / "images" / "test" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = generator.integers(0, 256, (40, 30, 3), "uint8")
        PIL.Image.fromarray(noise).save(path)
    return tmp_path / "images"


def images_of(folder, training=False, **settings):
    dataset = data.load(
        "image_folder", "test", 20, 4, training, folder, **settings
    )
    return next(iter(dataset.as_numpy_iterator()))[0]


def test_mean_and_deviation(folder):
    paths = sorted(folder.rglob("*.png"))
    plain = (images_of(folder) + 1) * 127.5
    imagenet = data.Preprocessing.imagenet()
    expected = (plain - MEAN) / STD
    for found in (
        images_of(folder, preprocessing=imagenet),
        data.read_images(paths, 20, preprocessing=imagenet),
        np.stack([
            data.preprocess(PIL.Image.open(x), 20, preprocessing=imagenet)
            for x in paths
        ]),
        imagenet.normalized(plain),
    ):  # fmt: skip
        order = np.argsort(found[:, 0, 0, 0])
        wanted = expected[np.argsort(expected[:, 0, 0, 0])]
        np.testing.assert_allclose(found[order], wanted, atol=1e-5)
    trained = images_of(folder, training=True, preprocessing=imagenet)
    assert trained.max() > 1.5 and trained.min() < -1.5


def test_what_is_given_beside_it_takes_its_place(folder):
    wanted = data.Preprocessing(mean=0, std=255, test_crop=0.5)
    cropped = images_of(folder, preprocessing=wanted)
    whole = images_of(folder, preprocessing=wanted, test_crop=1.0)
    assert np.abs(cropped - whole).max() > 0.1
    other = data.Preprocessing(mean=0, std=255)
    found = images_of(folder, preprocessing=other, test_crop=0.5)
    np.testing.assert_array_equal(found, cropped)
    gray = images_of(folder, preprocessing=wanted, channels=1)
    assert gray.shape == (4, 20, 20, 1)
    assert data.Preprocessing.of(wanted, channels=1).channels == 1


def test_bicubic_is_pillows(folder):
    wanted = data.Preprocessing(0, 1, interpolation="bicubic")
    (path, *_) = sorted(folder.rglob("*.png"))
    (found,) = data.read_images(path, 20, preprocessing=wanted)
    expected = PIL.Image.open(path).resize((20, 20), PIL.Image.BICUBIC)
    assert np.abs(found - np.asarray(expected, "float32")).mean() < 1.0
    assert found.min() >= 0 and found.max() <= 255
    trained = images_of(folder, training=True, preprocessing=wanted)
    assert trained.min() >= 0 and trained.max() <= 255


def test_one_number_of_all_channels_is_that_number():
    value = data.Preprocessing(mean=[1, 1, 1], std=np.float32([2, 4, 8]))
    assert value.mean == 1 and value.std == (2.0, 4.0, 8.0)
    assert value == data.Preprocessing(1, (2, 4, 8))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mean": "a"}, "`mean` must be numbers on .*mean='a' for images of 3"),
        ({"mean": (1, 2)}, r"one for each channel. Received: mean=\(1, 2\)"),
        ({"mean": float("nan")}, "mean=nan"),
        ({"mean": ()}, r"mean=\(\)"),
        ({"std": (1, 0, 1)}, r"numbers from 1 on .*std=\(1, 0, 1\)"),
        ({"std": 0}, "std=0"),
        ({"std": (1, 2, 3), "channels": 1}, "for images of 1 channel"),
        ({"test_crop": 2}, "test_crop=2"),
        ({"channels": 0}, "channels=0"),
        ({"interpolation": "cubic"}, "cubic'. Did you mean 'bicubic'"),
        ({"exif_orientation": "no"}, "exif_orientation='no'"),
    ],
)
def test_bad_values(settings, words):
    with pytest.raises(ValueError, match=words):
        data.Preprocessing(**settings)
    with pytest.raises(ValueError, match=words):
        data.Preprocessing.of(settings)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("imagenet", "such as data.Preprocessing.imagenet.*='imagenet'"),
        ({"maen": 1}, "Did you mean 'mean'"),
    ],
)
def test_what_is_none(folder, value, words):
    with pytest.raises(ValueError, match=words):
        images_of(folder, preprocessing=value)
