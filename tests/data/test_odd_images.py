"""Images that no camera makes: tiny, of four inks, of sixteen bits."""

import numpy as np
import PIL.Image
import pytest

from keras_vmoe import data


@pytest.fixture
def folder(tmp_path):
    """Images of 1 x 1 and 2 x 3 pixels, gray and of four inks."""
    for split in ("train", "test"):
        for label in "ab":
            (tmp_path / split / label).mkdir(parents=True)
        for i, (size, mode, kind) in enumerate(
            (((1, 1), "RGB", "jpg"), ((3, 2), "RGB", "png"),
             ((20, 30), "CMYK", "jpg"), ((1, 1), "CMYK", "jpg"),
             ((2, 3), "L", "png"), ((1, 9), "RGBA", "png"))
        ):  # fmt: skip
            image = PIL.Image.new("RGB", size, (255, 51, 0)).convert(mode)
            options = {"quality": 100} if kind == "jpg" else {}
            image.save(tmp_path / split / "ab"[i % 2] / f"{i}.{kind}",
                       **options)  # fmt: skip
    return tmp_path


@pytest.mark.parametrize("area", [(0.08, 1.0), (0.01, 0.02)])
def test_crops_of_tiny_images_and_of_four_inks(folder, area):
    """A crop has a pixel at the least, and one color stays one color."""
    augmentation = data.Augmentation(crop_area=area, flip=True)
    dataset = data.load(
        "image_folder", "train", 8, 6, True, folder, augmentation=augmentation
    )
    for _ in range(5):
        ((images, labels),) = dataset.as_numpy_iterator()
        assert images.shape == (6, 8, 8, 3) and sorted(labels) == [0, 0, 0] + [
            1, 1, 1
        ]  # fmt: skip
        assert_one_color(images)


def test_evaluation_of_tiny_images_and_of_four_inks(folder):
    dataset = data.load(
        "image_folder", "test", 8, 6, False, folder, test_crop=0.5
    )
    ((images, _),) = dataset.as_numpy_iterator()
    assert_one_color(images)


def assert_one_color(images):
    """The orange of the fixture, or its gray."""
    pixels = (images + 1) * 127.5
    gray = round(0.299 * 255 + 0.587 * 51)
    for image in pixels:
        color = [255, 51, 0]
        if np.ptp(image[0, 0]) < 9:
            color = [gray, gray, gray]
        np.testing.assert_allclose(image, np.tile(color, (8, 8, 1)), atol=4)


@pytest.mark.parametrize("level", [0, 128, 40_000, 65_535])
def test_read_images_of_sixteen_bits(tmp_path, level):
    """As a dataset of such images: the scale ends at 65535."""
    image = PIL.Image.fromarray(np.full((4, 5), level, "uint16"))
    image.save(tmp_path / "deep.png")
    found = data.read_images(tmp_path / "deep.png", 4)
    expected = level / 65_535 * 2 - 1
    np.testing.assert_allclose(found, expected, atol=1 / 127.5)
