"""The augmentation operations on the pixels of one image.

Every function takes a uint8 image and random numbers from [0, 1). Pixels are
rounded after each operation, as in the papers' code, which works on Pillow
images.

Axes: H and W height and width in pixels.
"""

import functools
import math

import numpy as np

from keras_vmoe.data import colors
from keras_vmoe.data.tensorflow_runtime import tf

GRAY = 127.5
SOLARIZE_FROM = 128.0  # 3-Augment inverts pixels above.
BLUR = (5, (0.1, 1.0))  # 3-Augment's kernel size and its deviation.
ERASED_AREA, ERASED_RATIO = (0.02, 1 / 3), 0.3  # Ratio of sides, to 1 / 0.3.
SPREAD = 0.05  # Deviation of RandAugment's magnitudes.
# Ends of RandAugment's ranges: shear, translation as a share of the side, and
# change of color, contrast or brightness.
SHEAR, TRANSLATION, ENHANCEMENT = 0.3, 0.45, 0.9


def between(number, low, high):
    """Maps a number from [0, 1) to [low, high)."""
    return low + number * (high - low)


def flip(image, chance):
    """Mirrors half of the images."""
    return tf.cond(chance < 0.5, lambda: tf.reverse(image, [1]), lambda: image)


def chosen(operations, chance, image, *parameters):
    """Applies one of the operations to an image, each equally likely."""
    count = len(operations)
    choice = tf.minimum(tf.cast(chance * count, tf.int32), count - 1)
    return tf.switch_case(
        choice,
        [functools.partial(f, image, *parameters) for f in operations],
    )


def rand_augment(magnitude, image, chance, spread, sign):
    """Applies one operation of RandAugment."""
    strength = tf.maximum(magnitude + SPREAD * tf.math.ndtri(spread), 0)
    amount = strength * tf.where(sign < 0.5, -1.0, 1.0)
    return chosen(RAND_AUGMENT, chance, image, amount)


def _factor(amount):
    # Bounded below, even beyond the end of the range.
    return tf.maximum(1 + ENHANCEMENT * amount, 1 - ENHANCEMENT)


def _solarized(image, amount):
    return colors.solarized(image, 255 * (1 - tf.minimum(tf.abs(amount), 1)))


def _sheared(image, amount, axis):
    shift = -amount * (SHEAR * np.arange(image.shape[axis], dtype="float32"))
    return (
        moved(image, down=shift) if axis else moved(image, None, shift[:, None])
    )


# RandAugment's operations on an image, in AutoAugment's ranges. Amounts of 1
# and -1 are the ends of the range. The last operation does nothing.
RAND_AUGMENT = (
    lambda image, _: colors.stretched(image),
    lambda image, _: colors.equalized(image),
    _solarized,
    lambda image, x: colors.recolored(image, colors.saturation(_factor(x))),
    lambda image, x: colors.contrasted(image, _factor(x)),
    lambda image, x: colors.recolored(image, _factor(x) * colors.SAME),
    functools.partial(_sheared, axis=0),
    functools.partial(_sheared, axis=1),
    lambda image, x: moved(image, right=x * TRANSLATION * image.shape[1]),
    lambda image, x: moved(image, down=x * TRANSLATION * image.shape[0]),
    lambda image, _: image,
)


def moved(image, down=None, right=None):
    """Shifts the pixels of an image, mirrored at its edges.

    Args:
        image: `(H, W, 3)`.
        down, right: Shift in pixels, to be rounded: a number, `(H, 1)` or
            `(W,)`; None for 0.
    """
    height, width, _ = image.shape

    def source(places, shift, size):
        if shift is None:
            return places
        places = places - tf.cast(tf.round(shift), tf.int32)
        # Mirrored at either end, once; what is farther stays at the end.
        places = tf.maximum(places, -1 - places)
        places = tf.minimum(places, 2 * size - 1 - places)
        return tf.maximum(places, 0)

    rows = source(np.arange(height, dtype="int32")[:, None], down, height)
    columns = source(np.arange(width, dtype="int32"), right, width)
    # One gather of whole pixels takes a third of the time of
    # ImageProjectiveTransformV3.
    pixels = tf.gather(tf.reshape(image, (-1, 3)), rows * width + columns)
    return tf.ensure_shape(pixels, image.shape)


def three_augment(cv, image, chance, deviation):
    """Applies one of three: gray, solarize, or Keras-CV's blur."""
    deviation = between(deviation, *BLUR[1])
    return chosen(three_augment_operations(cv), chance, image, deviation)


def three_augment_operations(cv):
    """Returns 3-Augment's operations on an image and a deviation."""
    size, _ = BLUR
    blur = cv.RandomGaussianBlur(size, 1.0)

    def blurred(image, deviation):
        kernel = blur.get_kernel(deviation, size)[:, None, None, None]
        kernels = kernel, tf.transpose(kernel, (1, 0, 2, 3))
        image = blur.augment_image(tf.cast(image, tf.float32), kernels)
        return rounded(image)

    return [
        lambda image, _: colors.recolored(image, colors.saturation(0.0)),
        lambda image, _: colors.solarized(image, SOLARIZE_FROM),
        blurred,
    ]


def color_jitter(strength, image, *numbers):
    """Scales brightness, contrast and saturation by 1 +- strength at most."""
    factors = (between(x, 1 - strength, 1 + strength) for x in numbers)
    return colors.jittered(image, *factors)


def span(center, share, size):
    """Returns the first pixel inside a rectangle and the first after it.

    Args:
        center: Tensor of numbers in [0, 1), on one axis.
        share: Length as a share of the image's, of the same shape.
        size: The image's length in pixels.
    """
    ends = ((center - share / 2) * size, (center + share / 2) * size)
    return [
        tf.cast(tf.clip_by_value(tf.round(x), 0, size), tf.int32) for x in ends
    ]


def erase(probability, image, chance, area, ratio, row, column, noise):
    """Fills a rectangle of some images with noise."""
    area = between(area, *ERASED_AREA)
    limit = -math.log(ERASED_RATIO)
    ratio = tf.exp(between(ratio, -limit, limit))
    height, width, channels = image.shape
    top, bottom = span(row, tf.sqrt(area * ratio), height)
    left, right = span(column, tf.sqrt(area / ratio), width)

    def erased():
        seed = tf.cast(tf.stack([noise, 0.0]) * 2**24, tf.int32)
        shape = tf.stack([bottom - top, right - left, channels])
        filling = tf.random.stateless_normal(shape, seed, GRAY, GRAY)
        rows = image[top:bottom]
        rows = [rows[:, :left], rounded(filling), rows[:, right:]]
        parts = [image[:top], tf.concat(rows, 1), image[bottom:]]
        return tf.ensure_shape(tf.concat(parts, 0), image.shape)

    return tf.cond(chance < probability, erased, lambda: image)


def rounded(image):
    """Clips to [0, 255] and rounds to uint8."""
    if image.dtype == tf.uint8:
        return image
    return tf.saturate_cast(image + 0.5, tf.uint8)
