"""From decoded pixels to the model's input.

Axes: B images in the batch, H and W height and width in pixels.
"""

import os
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_vmoe._checks import is_integer
from keras_vmoe._preprocessing import Preprocessing
from keras_vmoe._typing import Tensor
from keras_vmoe.data.orientation import upright
from keras_vmoe.data.tensorflow_runtime import checked
from keras_vmoe.data.tensorflow_runtime import tf

WANTED = "An image file must be a readable PNG, JPEG, WebP, BMP or GIF. "
NO_IMAGE_MEND = "Convert the file, or leave it out."
STARTS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"RIFF")


def preprocess(
    image: Tensor,
    image_size: int | Sequence[int],
    channels: int | None = None,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
) -> Tensor:
    """Turns one decoded image into a model's input, as in evaluation.

    The image is converted to `channels`, resized to `image_size` (with
    antialiasing, without keeping the aspect ratio, and without a crop) and
    normalized.

    The dtype determines the scale of the pixels, as in `tf.image`: uint8 and
    other integers 0 to 255, uint16 0 to 65535, floats 0 to 1. Values outside
    are an error.

    Args:
        image: `(H, W, C)` array or tensor with 1 (gray), 2 (gray and alpha), 3
            (RGB), 4 (RGB and alpha) or more channels.
        image_size: Integer or pair `(height, width)`, in pixels.
        channels: Integer, channels of the result; None takes
            `preprocessing`'s.
        preprocessing: A `Preprocessing`, such as `model.preprocessing`; None
            means the default, to [-1, 1].

    Returns:
        float32 TensorFlow tensor `(height, width, channels)`.

    Raises:
        ValueError: The shape, the dtype, a pixel or `image_size` is invalid.
            Inside `tf.data` an invalid pixel raises
            `tf.errors.InvalidArgumentError` with the same message.

    Example:

    ```python
    import numpy as np
    from keras_vmoe import data

    gray = np.full((8, 8, 1), 255, "uint8")
    data.preprocess(gray, image_size=32)  # ones of shape (32, 32, 3)
    ```
    """
    size = check_image_size(image_size)
    wanted = Preprocessing.of(preprocessing, channels=channels)
    pixels = to_channels(tf.convert_to_tensor(image), size, wanted)
    return wanted.normalized(tf.cast(pixels, tf.float32))


def read_images(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    image_size: int | Sequence[int],
    test_crop: float | None = None,
    channels: int | None = None,
    exif_orientation: bool | None = None,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
) -> np.ndarray:
    """Reads image files into a batch, preprocessed as in evaluation.

    Args:
        paths: A path or a list of paths of PNG, JPEG, WebP, BMP or GIF files.
            For an animated GIF, the first frame is read.
        image_size: Integer or pair `(height, width)`, in pixels.
        test_crop, channels, exif_orientation: Values that are not None
            override those of `preprocessing`.
        preprocessing: A `Preprocessing`, such as `model.preprocessing`; None
            means the default, to [-1, 1].

    Returns:
        float32 NumPy array `(B, height, width, channels)`.

    Raises:
        FileNotFoundError: A file does not exist.
        OSError: A file cannot be read or decoded. The message has its path.
        ValueError: `paths` is empty, or `image_size` is invalid.

    Example:

    ```python
    import os
    import tempfile

    import tensorflow as tf
    from keras_vmoe import data

    path = os.path.join(tempfile.mkdtemp(), "black.png")
    tf.io.write_file(path, tf.io.encode_png(tf.zeros((8, 8, 1), tf.uint8)))
    data.read_images([path], image_size=32)  # -1 of shape (1, 32, 32, 3)
    ```
    """
    size = check_image_size(image_size)
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    paths = [os.fspath(path) for path in paths]
    if not paths:
        raise ValueError(
            "`paths` must name at least one image file. "
            f"Received: paths={paths}. Pass a path or a list of paths."
        )
    wanted = Preprocessing.of(
        preprocessing,
        test_crop=test_crop,
        channels=channels,
        exif_orientation=exif_orientation,
    )
    images = [_read_image(path, size, wanted) for path in paths]
    return np.asarray(wanted.normalized(tf.stack(images)))


def _read_image(path, size, wanted):
    content = b""
    try:
        with open(path, "rb") as file:
            content = file.read()
        return decoded(content, size, wanted)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"An image file must exist. Received: path={path!r}."
        ) from error
    except (OSError, tf.errors.InvalidArgumentError) as error:
        reason, mend = "it is none of these", NO_IMAGE_MEND
        if content.startswith(STARTS):
            reason = "its image is truncated or damaged"
            mend = "Replace the file, or leave it out."
            if wanted.channels == 4:
                reason += ", or has no fourth channel, which the model wants"
        reason = getattr(error, "strerror", None) or reason
        raise OSError(
            f"{WANTED}Received: path={path!r} ({reason}). {mend}"
        ) from error


def decoded(content, size, preprocessing):
    """Decodes an image to pixels, as in evaluation.

    Args:
        content: Scalar string tensor or bytes.
        size: `(H, W)`.
        preprocessing: A `Preprocessing`.

    Returns:
        `(H, W, C)` float32 tensor in [0, 255].
    """
    stored = 4 if preprocessing.channels == 4 else 3
    image = tf.io.decode_image(content, stored, expand_animations=False)
    image = tf.ensure_shape(image, (None, None, stored))
    if preprocessing.exif_orientation:
        image = upright(image, content)
    if preprocessing.test_crop is not None:
        image = center_crop(image, size, preprocessing.test_crop)
    pixels = to_channels(image, tuple(size), preprocessing)
    return tf.cast(pixels, tf.float32)


def decoder_of(feature, channels=None):
    """Returns the function that decodes images of a TFDS feature to pixels.

    The pixels have the feature's channels, unless `channels` is given.

    The content of a file counts, not its name: the first frame of an animation
    is read even if the file is named a JPEG. TFDS's own decoder does not.
    """

    def decode(content):
        stored = channels or feature.shape[-1]
        image = tf.io.decode_image(
            content, stored or 0, expand_animations=False
        )
        return tf.ensure_shape(image, (*feature.shape[:2], stored))

    return decode if feature.np_dtype == np.uint8 else feature.decode_example


def named_if_none(content, path):
    """Returns a file's content, or an error with its path if it is no image.

    TensorFlow's decoder does not know the path.
    """
    is_image = [tf.strings.substr(content, 0, len(x)) == x for x in STARTS]
    message = (
        f"{WANTED}Received: path={{shown}}, which holds none. {NO_IMAGE_MEND}"
    )
    return checked(content, tf.reduce_any(is_image), message, path)


def to_channels(image, size, preprocessing, fast=False):
    """Maps a decoded image to pixels `(*size, channels)` in [0, 255].

    As `preprocess` does, or with a `fast` resize where one exists. The result
    is uint8 if no pixel was computed, otherwise float32.
    """
    channels = preprocessing.channels
    stored = image.shape[-1] if image.shape.rank == 3 else None
    converts = channels in (1, 3) and stored in (1, 2, 3, 4)
    if stored is None or not (converts or stored == channels):
        raise ValueError(
            "An image must have the shape (H, W, C): 1 to 4 channels for gray "
            "or RGB, otherwise exactly `channels`. "
            f"Received: image.shape={tuple(image.shape)}, channels={channels}. "
            "Set `channels`."
        )
    # Alpha and copies of gray would only slow down the resize.
    if stored != channels:
        image = image[..., : 3 if stored > 2 else 1]
    image = _to_pixels(image)
    if channels == 1 and stored > 2:
        # In floats: on bytes TensorFlow truncates the result.
        image = tf.image.rgb_to_grayscale(tf.cast(image, tf.float32))
    if tuple(image.shape[:2]) != size:
        is_fast = fast and preprocessing.interpolation == "bilinear"
        resize = resize_by_area if is_fast else _resize
        image = resize(image, size, preprocessing.interpolation)
    gray = image.shape[-1] == 1
    return tf.repeat(image, 3, axis=-1) if gray and channels == 3 else image


def _resize(image, size, interpolation):
    image = tf.image.resize(image, size, interpolation, antialias=True)
    if interpolation == "bilinear":
        return image
    return tf.clip_by_value(image, 0, 255)  # Bicubic weights overshoot.


def resize_by_area(image, size, interpolation="bilinear"):
    """Resizes training images: fast, and close to evaluation's resize.

    If both sides shrink, a new pixel is the mean of the area it covers. This
    takes a quarter of the time of the antialiased resize, whose kernel is twice
    as wide. On photographs that shrink by 1 to 4, the two agree to a PSNR of
    34 to 60 dB. If no side shrinks, plain bilinear interpolation gives the same
    pixels in a quarter of the time.
    """
    sides = tf.shape(image)[:2]
    grows, shrinks = (tf.reduce_all(x) for x in (sides <= size, sides >= size))

    def resized(method):
        return lambda: tf.image.resize(image, size, method)

    return tf.case(
        [(grows, resized("bilinear")), (shrinks, resized("area"))],
        lambda: _resize(image, size, interpolation),
    )


def _to_pixels(image):
    """Maps pixels of any dtype to the scale 0 to 255, uint8 or float32."""
    if image.dtype == tf.uint8:
        return image
    if image.dtype == tf.uint16:
        return tf.cast(image, tf.float32) / 257.0
    if image.dtype.is_integer:
        return _checked_pixels(image, 255)
    if image.dtype.is_floating:
        return 255.0 * _checked_pixels(image, 1)
    raise ValueError(
        "An image must hold integers in [0, 255], 16-bit integers in "
        "[0, 65535] or floats in [0, 1]. "
        f"Received: image.dtype={image.dtype.name}. Cast it to uint8."
    )


def _checked_pixels(image, highest):
    pixels = tf.cast(image, tf.float32)
    slack = 5e-4 * highest  # For rounding errors.
    # Written so that NaN fails.
    inside = (pixels >= -slack) & (pixels <= highest + slack)
    message = (
        f"Pixels of type {image.dtype.name} must lie in [0, {highest}]. "
        "Received: lowest and highest pixel={shown}. "
        "Cast pixels in [0, 255] to uint8, or rescale them."
    )
    ends = tf.stack([tf.reduce_min(pixels), tf.reduce_max(pixels)])
    return checked(pixels, tf.reduce_all(inside), message, ends)


def random_crop(image, padding, seed):
    """Pads an image with black and crops it at random to its own size.

    All `2 * padding + 1` offsets per side are equally likely.
    """
    padded = tf.pad(image, [[padding, padding], [padding, padding], [0, 0]])
    offset = tf.random.stateless_uniform(
        (2,), seed, minval=0, maxval=2 * padding + 1, dtype=tf.int32
    )
    return tf.slice(padded, [*tf.unstack(offset), 0], image.shape)


def decode_and_crop(image, decode, area, seed):
    """Decodes a random window of an image (the crop of Inception).

    For a JPEG, only the window is decoded. Its aspect ratio is 3/4 to 4/3 if
    the image has room for it.

    Args:
        image: Encoded bytes, or `(H, W, channels)` pixels.
        decode: Function from the bytes to pixels; None for pixels.
        area: Lowest and highest share of the image's area in the window.
        seed: Pair of integers that determines the window.

    Reference:
        [Szegedy et al., 2015](https://arxiv.org/abs/1409.4842), section 6.
    """

    def window(shape):
        begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
            shape,
            tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
            seed,
            min_object_covered=0.0,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=area,
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        return begin[:2], size[:2]

    def crop(pixels):
        return _window(pixels, *window(tf.shape(pixels)))

    if decode is None:
        return crop(image)

    def crop_jpeg():
        corners = tf.concat(window(tf.image.extract_jpeg_shape(image)), 0)
        return tf.image.decode_and_crop_jpeg(image, corners, channels)

    pixels = decode(image)
    channels = pixels.shape[-1]
    if pixels.dtype != tf.uint8 or channels not in (1, 3):
        return crop(pixels)  # No JPEG has 16 bits or alpha.
    return tf.cond(tf.io.is_jpeg(image), crop_jpeg, lambda: crop(decode(image)))


def center_crop(image, size, share):
    """Crops the center of an image, as in evaluation.

    The crop has the aspect ratio of `size`. Its sides are this share of those
    of the largest such window.
    """
    sides = tf.cast(tf.shape(image)[:2], tf.float32)
    wanted = tf.constant(size, tf.float32)
    scale = share * tf.reduce_min(sides / wanted)
    window = tf.maximum(tf.cast(tf.round(wanted * scale), tf.int32), 1)
    return _window(image, (tf.shape(image)[:2] - window) // 2, window)


def _window(image, begin, size):
    """A window of an image, with a static number of channels."""
    window = tf.slice(image, tf.pad(begin, [[0, 1]]), [*tf.unstack(size), -1])
    return tf.ensure_shape(window, (None, None, image.shape[-1]))


def check_image_size(image_size):
    """Returns `(height, width)` of an integer or a pair of integers."""
    pair = image_size if np.ndim(image_size) else (image_size, image_size)
    if len(pair) != 2 or not all(is_integer(x) and x > 0 for x in pair):
        raise ValueError(
            "`image_size` must be a positive integer or a pair (height, "
            f"width), in pixels. Received: image_size={image_size}. "
            "Pass for example image_size=224 or image_size=(192, 256)."
        )
    return tuple(map(int, pair))
