"""The one definition of preprocessing, eagerly and inside `tf.data`."""

import io

import numpy as np
import PIL.Image
import pytest
import sklearn.datasets
import tensorflow as tf

from keras_vmoe import data
from keras_vmoe.data import images as images_lib


def eagerly(function, image):
    return function(image)


@pytest.fixture(params=["eager", "tf.data"])
def run(request, in_tf_data):
    return eagerly if request.param == "eager" else in_tf_data


# One pixel, the same in every type; 51 of 255 is -0.6 on the model's scale.
@pytest.mark.parametrize(
    "pixel, dtype",
    [
        (51, "uint8"),
        (51, "int32"),
        (51, "int64"),
        (51 * 257, "uint16"),
        (0.2, "float32"),
        (0.2, "float64"),
        (0.2, "float16"),
    ],
)
def test_preprocess_reads_the_scale_from_the_type(run, pixel, dtype):
    image = np.full((4, 4, 3), pixel, dtype)
    result = run(lambda x: data.preprocess(x, 4), image)
    assert result.dtype == tf.float32
    assert result.shape == (4, 4, 3)
    np.testing.assert_allclose(result, np.full((4, 4, 3), -0.6), atol=1e-3)


@pytest.mark.parametrize(
    "channels, expected",
    [
        ([51], [51, 51, 51]),
        ([51, 7], [51, 51, 51]),
        ([51, 102, 204], [51, 102, 204]),
        ([51, 102, 204, 7], [51, 102, 204]),
    ],
)
def test_preprocess_makes_rgb(run, channels, expected):
    image = np.tile(np.array(channels, "uint8"), (2, 2, 1))
    result = run(lambda x: data.preprocess(x, (4, 6)), image)
    assert result.shape == (4, 6, 3)
    expected = np.tile(np.array(expected) / 127.5 - 1, (4, 6, 1))
    np.testing.assert_allclose(result, expected, atol=1e-6)


def test_preprocess_of_the_same_size_changes_no_pixel(run):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), "uint8")
    result = run(lambda x: data.preprocess(x, (5, 7)), image)
    np.testing.assert_allclose(result, image / 127.5 - 1, atol=1e-6)


def slow_resize(row, size):
    """Antialiased bilinear by its definition: a tent as wide as a new pixel."""
    scale = max(len(row) / size, 1)
    result = []
    for i in range(size):
        center = (i + 0.5) * len(row) / size - 0.5
        distance = np.abs(np.arange(len(row)) - center) / scale
        weights = np.maximum(0, 1 - distance)
        result.append(np.sum(weights * row) / np.sum(weights))
    return np.array(result)


@pytest.mark.parametrize("size", [3, 4, 6, 18])
def test_preprocess_resizes_with_antialiasing(run, size):
    row = np.array([0, 255, 0, 255, 10, 200, 90, 0, 255], "uint8")
    image = np.tile(row[None, :, None], (2, 1, 1))
    result = run(lambda x: data.preprocess(x, (2, size)), image)
    expected = slow_resize(row.astype(float), size) / 127.5 - 1
    for y in range(2):
        np.testing.assert_allclose(result[y, :, 0], expected, atol=1e-5)


PHOTOGRAPHS = sklearn.datasets.load_sample_images().images


def difference(image, size):
    """PSNR of the resize of training against that of evaluation, in dB."""
    fast = images_lib.resize_by_area(image, size)
    assert fast.dtype == tf.float32 and fast.shape == (*size, 3)
    slow = tf.image.resize(image, size, antialias=True)
    error = np.mean((fast.numpy() - slow.numpy()) ** 2)
    return 10 * np.log10(255**2 / max(error, 1e-12))


@pytest.mark.parametrize("photograph", PHOTOGRAPHS, ids=["china", "flower"])
@pytest.mark.parametrize(
    ("shape", "psnr"),
    [((235, 235), 54), ((375, 500), 37), ((427, 640), 36), ((427, 427), 36)],
)
def test_training_shrinks_nearly_as_evaluation(photograph, shape, psnr):
    image = photograph[: shape[0], : shape[1]]
    assert difference(image, (224, 224)) > psnr
    assert difference(image, (112, 112)) > 36


@pytest.mark.parametrize(
    "size", [(60, 50), (90, 50), (60, 77), (90, 20), (20, 77)]
)
def test_training_enlarges_as_evaluation(size):
    """And takes evaluation's resize where one side grows and one shrinks."""
    assert difference(PHOTOGRAPHS[0][:60, :50], size) > 90


@pytest.mark.parametrize("factor", [2, 3])
def test_training_shrinks_to_means(run, factor):
    image = np.random.default_rng(0).integers(0, 256, (12, 18, 3), "uint8")
    size = (12 // factor, 18 // factor)
    result = run(lambda x: images_lib.resize_by_area(x, size), image)
    blocks = image.reshape(size[0], factor, size[1], factor, 3)
    np.testing.assert_allclose(result, blocks.mean((1, 3)), rtol=1e-5)


@pytest.mark.parametrize(
    "image, words",
    [
        (np.full((2, 2, 1), 255.0), r"float64 must lie in \[0, 1\].*\[255"),
        (np.full((2, 2, 1), np.nan), r"float64 must lie in \[0, 1\].*nan"),
        (np.full((2, 2, 1), 256), r"int64 must lie in \[0, 255\].*256"),
        (np.full((2, 2, 1), -1), r"int64 must lie in \[0, 255\].*-1"),
    ],
)
def test_preprocess_refuses_pixels_off_the_scale(run, image, words):
    # Inside `tf.data` there is no ValueError.
    errors = (ValueError, tf.errors.InvalidArgumentError)
    with pytest.raises(errors, match=words) as caught:
        run(lambda x: data.preprocess(x, 2), image)
    assert isinstance(caught.value, ValueError) == (run is eagerly)
    assert "Received: lowest and highest pixel=" in str(caught.value)
    assert "to uint8" in str(caught.value)


@pytest.mark.parametrize(
    "image, words",
    [
        (np.zeros((2, 2), "uint8"), r"image\.shape=\(2, 2\)"),
        (np.zeros((1, 2, 2, 3), "uint8"), r"image\.shape=\(1, 2, 2, 3\)"),
        (
            np.zeros((2, 2, 5), "uint8"),
            r"image\.shape=\(2, 2, 5\), channels=3",
        ),
        (np.zeros((2, 2, 1), "bool"), r"image\.dtype=bool"),
    ],
)
def test_preprocess_refuses_what_is_no_image(image, words):
    with pytest.raises(ValueError, match=f"Received: {words}"):
        data.preprocess(image, 2)


@pytest.mark.parametrize(
    "image_size", [0, -1, 2.5, "8", None, (8,), (8, 8, 3), (8, 0)]
)
def test_image_size_must_be_positive_integers(image_size):
    words = r"`image_size` must be a positive integer.*Received: image_size="
    with pytest.raises(ValueError, match=words) as caught:
        data.preprocess(np.zeros((2, 2, 3), "uint8"), image_size)
    assert f"image_size={image_size}." in str(caught.value)


# random_crop


def slow_windows(image, padding):
    """All crops of the padded image, by the offset of their corner."""
    height, width, _ = image.shape
    padded = np.pad(image, [(padding, padding), (padding, padding), (0, 0)])
    return {
        (y, x): padded[y : y + height, x : x + width]
        for y in range(2 * padding + 1)
        for x in range(2 * padding + 1)
    }


def offset_of(crop, image, padding):
    """Finds the offset of a crop; fails unless it is exactly one."""
    windows = slow_windows(image, padding).items()
    offsets = [offset for offset, w in windows if np.array_equal(w, crop)]
    assert len(offsets) == 1
    return offsets[0]


def test_random_crop_takes_every_window_equally_often():
    image = np.random.default_rng(0).random((5, 6, 3))
    image = tf.constant(image + 1, tf.float32)
    counts = {offset: 0 for offset in slow_windows(image, 2)}
    for seed in range(1000):
        crop = images_lib.random_crop(image, 2, [seed, 0])
        assert crop.shape == image.shape
        counts[offset_of(crop.numpy(), image.numpy(), 2)] += 1
    # 25 windows, 40 expected, standard deviation 6.2.
    assert min(counts.values()) > 15
    assert max(counts.values()) < 70


def test_random_crop_repeats_for_the_same_seed():
    image = tf.random.stateless_uniform((9, 9, 3), [1, 2])
    crops = [images_lib.random_crop(image, 4, [3, 4]) for _ in range(2)]
    np.testing.assert_array_equal(*crops)


# read_images


def encode(image, image_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "mode, image_format, tolerance",
    [
        ("RGB", "PNG", 0),
        ("RGBA", "PNG", 0),
        ("P", "PNG", 0),
        ("RGB", "BMP", 0),
        ("RGB", "GIF", 0),
        ("RGB", "JPEG", 3),
        ("CMYK", "JPEG", 3),
    ],
)
def test_read_images_reads_each_format(tmp_path, mode, image_format, tolerance):
    path = tmp_path / "image"
    image = PIL.Image.new("RGB", (4, 4), (255, 51, 0)).convert(mode)
    options = {"quality": 100} if image_format == "JPEG" else {}
    path.write_bytes(encode(image, image_format, **options))
    result = data.read_images(path, (4, 6))
    assert result.dtype == np.float32
    assert result.shape == (1, 4, 6, 3)
    pixels = np.tile([255, 51, 0], (1, 4, 6, 1))
    atol = max(tolerance / 127.5, 1e-6)
    np.testing.assert_allclose(result, pixels / 127.5 - 1, atol=atol)


def test_read_images_takes_the_first_frame_of_a_gif(tmp_path):
    frames = [PIL.Image.new("RGB", (4, 4), (level, 0, 0)) for level in (0, 255)]
    options = {"save_all": True, "append_images": frames[1:]}
    path = tmp_path / "animated.gif"
    path.write_bytes(encode(frames[0], "GIF", **options))
    np.testing.assert_array_equal(data.read_images([path], 4), -1)


def test_read_images_keeps_the_order_of_the_paths(tmp_path):
    paths = []
    for level in (204, 51):
        path = tmp_path / f"{level}.png"
        path.write_bytes(encode(PIL.Image.new("L", (3, 5), level), "PNG"))
        paths.append(str(path))
    result = data.read_images(paths, 4)
    assert result.shape == (2, 4, 4, 3)
    np.testing.assert_allclose(result[:, 0, 0, 0], [0.6, -0.6], atol=1e-6)


def test_read_images_names_the_missing_file(tmp_path):
    path = str(tmp_path / "nowhere.png")
    with pytest.raises(FileNotFoundError, match="must exist") as caught:
        data.read_images([path], 4)
    assert f"Received: path={path!r}." in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is none of these"),
        (b"not an image", "is none of these"),
        (b"\x89PNG\r\n\x1a\n", "truncated or damaged"),
        (tf.io.encode_jpeg(np.zeros((9, 9, 3), "uint8")).numpy()[:-99],
         "truncated or damaged"),
    ],
)  # fmt: skip
def test_read_images_names_the_unreadable_file(tmp_path, content, reason):
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    words = "must be a readable PNG, JPEG, WebP, BMP or GIF"
    with pytest.raises(OSError, match=words) as caught:
        data.read_images([path], 4)
    assert f"Received: path={str(path)!r}" in str(caught.value)
    assert reason in str(caught.value)
    assert "leave it out" in str(caught.value)


def test_read_images_refuses_a_folder(tmp_path):
    with pytest.raises(OSError, match=r"Received: path=.*directory"):
        data.read_images(tmp_path, 4)


def test_read_images_refuses_an_empty_list():
    with pytest.raises(ValueError, match=r"Received: paths=\[\]"):
        data.read_images([], 4)
