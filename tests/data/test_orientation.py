"""The orientation that EXIF notes is applied as Pillow applies it."""

import io
import itertools

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest

from keras_vmoe import data
from keras_vmoe.data.orientation import orientation
from keras_vmoe.data.untrusted import decoded_or_nan

# Blocks of 16 x 16 pixels, no two alike, survive JPEG.
BLOCKS = np.random.default_rng(0).integers(0, 256, (2, 3, 3), "uint8")
PIXELS = BLOCKS.repeat(16, 0).repeat(16, 1)


def encoded(kind, number, order=">"):
    exif = PIL.Image.Exif()
    exif.endian = order
    exif[0x010F], exif[0x0112] = "maker", number
    file = io.BytesIO()
    options = {"lossless": True} if kind == "webp" else {}
    PIL.Image.fromarray(PIXELS).save(file, kind, exif=exif, **options)
    return file.getvalue()


def centers(images):
    """Of each block: a random crop may leave out a row of pixels."""
    return images[:, 8::16, 8::16]


KINDS = ["jpeg", "png", "webp"]


@pytest.mark.parametrize("numbers", [(1, 2, 3, 4), (5, 6, 7, 8)])
def test_orientations_are_pillows(tmp_path, numbers):
    """In prediction, evaluation and training, and as served."""
    paths, uprights = [], []
    for number, kind in itertools.product(numbers, KINDS):
        content = encoded(kind, number, "<>"[number % 2])
        path = tmp_path / f"{number}{kind}" / f"a.{kind}"
        path.parent.mkdir()
        path.write_bytes(content)
        picture = PIL.Image.open(path)
        paths.append(path)
        uprights.append(np.asarray(PIL.ImageOps.exif_transpose(picture)))
    size = uprights[0].shape[:2]

    def read(size, **options):
        yield data.read_images(paths, size, **options)
        for training in (False, True):
            crop = data.Augmentation(crop_area=(1, 1))
            loaded = data.load(
                "image_folder", "train", size, 12, training, tmp_path,
                augmentation=crop, **options,
            )  # fmt: skip
            ((images, labels),) = loaded.as_numpy_iterator()
            yield images[np.argsort(labels)]

    for images in read(size):
        expected = np.stack(uprights) / 127.5 - 1
        np.testing.assert_allclose(centers(images), centers(expected), atol=0.1)
    for images in read(PIXELS.shape[:2], exif_orientation=False):
        expected = np.stack([PIXELS] * 12) / 127.5 - 1
        np.testing.assert_allclose(centers(images), centers(expected), atol=0.1)
    for path, upright in zip(paths[:2], uprights, strict=False):
        content = path.read_bytes()
        served = decoded_or_nan(content, size, data.Preprocessing())
        np.testing.assert_allclose(served, upright, atol=12)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_exif_is_harmless(kind):
    """Each byte of it changed, and the file cut short anywhere in it."""
    content = encoded(kind, 6)
    start = content.index(b"MM\0*")
    for place in (*range(start, start + 22), start + 30):
        damaged = content[:place] + b"\xff" + content[place + 1 :]
        for file in (damaged, content[:place]):
            # Neither little nor big: none at all.
            highest = 1 if place < start + 4 else 8
            assert 1 <= orientation(file) <= highest
    number = start + 8  # Of the entries: of the two, the first.
    assert orientation(content[:number] + b"\0\1" + content[number + 2 :]) == 1
    for nothing in (b"", b"\xff\xd8\xff", b"RIFF", b"\x89PNG"):
        assert orientation(nothing) == 1


def test_exif_behind_a_long_segment():
    content = encoded("jpeg", 8)
    longest = b"\xff\xe2\xff\xff" + bytes(2**16 - 3)
    assert orientation(content[:2] + longest + content[2:]) == 8


def test_webp_with_the_mark_of_a_jpeg():
    content = encoded("webp", 8)
    start = content.index(b"MM\0*")
    marked = content[:start] + b"Exif\0\0" + content[start:]
    assert orientation(content) == orientation(marked) == 8
