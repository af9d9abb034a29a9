"""From pixels, or untrusted image files, to a model's input, also in a graph.

Axes: B images in the batch, H and W height and width in pixels, C channels.
"""

import dataclasses

import numpy as np

from keras_vmoe._checks import check_shares
from keras_vmoe._checks import check_sizes
from keras_vmoe._checks import is_number
from keras_vmoe.data.images import decoded
from keras_vmoe.data.tensorflow_runtime import tf

MAX_PIXELS = 2**25  # 100 MB of decoded RGB.
# How a PNG begins; its size is in the chunk that must come first.
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
JPEG_SCAN, USUAL_SCANS = b"\xff\xda", 10


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """From pixels to the model's input: `(pixels - mean) / std`.

    The defaults are those of `data.preprocess`, with which this package trains.

    Attributes:
        mean: Mean subtracted from pixels in [0, 255]: a number, or one for each
            channel.
        std: Standard deviation by which the difference is divided: a number
            above 0, or one for each channel.
        test_crop: Share of the shorter side that the centre crop of encoded
            images keeps; None resizes whole images. See `data.load`.
        max_pixels: Encoded images of more pixels are not decoded.
        exif_orientation: Whether encoded images are turned upright, see
            `data.load`.

    Example:

    >>> imagenet = Preprocessing(
    ...     mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
    """

    mean: float | tuple[float, ...] = 127.5
    std: float | tuple[float, ...] = 127.5
    test_crop: float | None = None
    max_pixels: int = MAX_PIXELS
    exif_orientation: bool = True

    def __post_init__(self):
        for name in ("mean", "std"):
            value = getattr(self, name)
            values = value if isinstance(value, (list, tuple)) else (value,)
            good = len(values) > 0 and all(map(is_number, values))
            if not good or (name == "std" and min(values) <= 0):
                words = "numbers above 0" if name == "std" else "numbers"
                raise ValueError(
                    f"`{name}` must be {words} on the scale of 0 to 255, one "
                    f"or one for each channel. Received: {name}={value!r}."
                )
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(values))
        check_shares(test_crop=self.test_crop)
        check_sizes(max_pixels=self.max_pixels)


def normalized(pixels, preprocessing):
    """Float32 pixels `(B, H, W, C)` in [0, 255] as the model's input."""
    mean = np.asarray(preprocessing.mean, "float32")
    std = np.asarray(preprocessing.std, "float32")
    return pixels / std - mean / std


def decoded_or_nan(content, shape, preprocessing):
    """As `decoded`; NaN for what is no JPEG or PNG, or of too many pixels.

    An invalid file must not fail the request: a server may have put images of
    other clients into the same batch.
    """

    def decode(content):
        fits = _check_pixels(content, preprocessing.max_pixels)
        with tf.control_dependencies([fits]):
            return decoded(
                tf.identity(content),
                shape,
                preprocessing.test_crop,
                preprocessing.exif_orientation,
            )

    one = tf.data.Dataset.from_tensors(content)
    one = one.map(decode).ignore_errors()
    nan = tf.data.Dataset.from_tensors(tf.fill(shape, float("nan")))
    return one.concatenate(nan).take(1).get_single_element()


def _check_pixels(content, limit):
    """Fails unless this begins like a JPEG or PNG of at most so many pixels.

    Read from the file's header: a few bytes can ask for gigabytes of pixels. A
    JPEG may also encode all of its pixels in many scans: one of more scans than
    usual may have the fewer pixels.
    """

    def of_jpeg():
        sides = tf.cast(tf.image.extract_jpeg_shape(content), tf.int64)[:2]
        scans = tf.size(tf.strings.split(content, JPEG_SCAN), tf.int64) - 1
        times = tf.maximum(-(-scans // USUAL_SCANS), 1)
        return tf.stack([sides[0], sides[1] * times])

    def of_png():
        head = tf.io.decode_raw(tf.strings.substr(content, 16, 8), tf.uint8)
        numbers = tf.reshape(tf.cast(head, tf.int64), (2, 4))
        return tf.reduce_sum(numbers * [2**24, 2**16, 2**8, 1], axis=-1)

    is_png = tf.equal(tf.strings.substr(content, 0, len(PNG)), PNG)
    is_jpeg = tf.io.is_jpeg(content)
    sides = tf.cond(is_png, of_png, of_jpeg)
    # Each side as well: the product of two could overflow.
    fits = tf.reduce_all(sides <= limit) & (tf.reduce_prod(sides) <= limit)
    return tf.debugging.Assert(
        (is_png | is_jpeg) & fits,
        ["Expected a JPEG or PNG of at most", limit, "pixels."],
    )
