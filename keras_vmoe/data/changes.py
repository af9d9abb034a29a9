"""The operations of augmentation on the pixels of one image.

Every function takes a uint8 image and the numbers that were drawn from [0, 1)
for it. Pixels are rounded after each operation, as in the papers' code, which
works on Pillow's images.

Axes: H and W height and width in pixels.
"""

import functools
import math

import numpy as np

from keras_vmoe.data import colors
from keras_vmoe.data.tensorflow_runtime import import_tensorflow

GREY = 127.5
SOLARIZE_FROM = 128.0  # Of 3-Augment: pixels above are inverted.
BLUR = (5, (0.1, 1.0))  # Of 3-Augment: size of the kernel, its deviation.
ERASED_AREA, ERASED_RATIO = (0.02, 1 / 3), 0.3  # Ratio of sides, to 1 / 0.3.
SPREAD = 0.05  # Deviation of RandAugment's magnitudes.
# Ends of RandAugment's ranges: of shear, of translation as a share of the side,
# of the change of colour, contrast and brightness.
SHEAR, TRANSLATION, ENHANCEMENT = 0.3, 0.45, 0.9


def between(number, low, high):
    """Maps a number from [0, 1) to [low, high)."""
    return low + number * (high - low)


def flip(image, chance):
    """Mirrors half of the images."""
    tf = import_tensorflow()
    return tf.cond(chance < 0.5, lambda: tf.reverse(image, [1]), lambda: image)


def chosen(operations, chance, image, *parameters):
    """Gives an image to one of the operations, each equally likely."""
    tf = import_tensorflow()
    count = len(operations)
    choice = tf.minimum(tf.cast(chance * count, tf.int32), count - 1)
    return tf.switch_case(
        choice,
        [functools.partial(f, image, *parameters) for f in operations],
    )


def rand_augment(magnitude, image, chance, spread, sign):
    """One operation of RandAugment."""
    tf = import_tensorflow()
    strength = tf.maximum(magnitude + SPREAD * tf.math.ndtri(spread), 0)
    sign = tf.where(sign < 0.5, -1.0, 1.0)
    return chosen(rand_augment_operations(), chance, image, strength, sign)


def rand_augment_operations():
    """RandAugment's operations, in the ranges of AutoAugment.

    Each takes an image, a strength whose 1 is the end of its range, and a sign.
    The last one does nothing.
    """
    tf = import_tensorflow()

    def factor(strength, sign):
        # Never less, even beyond the end of the range.
        return tf.maximum(1 + ENHANCEMENT * strength * sign, 1 - ENHANCEMENT)

    def solarize(image, strength, sign):
        return colors.solarized(image, 255 * (1 - tf.minimum(strength, 1)))

    def color(image, *amount):
        return colors.recolored(image, colors.saturation(factor(*amount)))

    def contrast(image, *amount):
        return colors.contrasted(image, factor(*amount))

    def brighten(image, *amount):
        return colors.recolored(image, colors.brightness(factor(*amount)))

    def shear_x(image, strength, sign):
        rows = SHEAR * np.arange(image.shape[0], dtype="float32")[:, None]
        return moved(image, right=-strength * sign * rows)

    def shear_y(image, strength, sign):
        columns = SHEAR * np.arange(image.shape[1], dtype="float32")
        return moved(image, down=-strength * sign * columns)

    def translate_x(image, strength, sign):
        return moved(
            image, right=strength * sign * TRANSLATION * image.shape[1]
        )

    def translate_y(image, strength, sign):
        return moved(image, down=strength * sign * TRANSLATION * image.shape[0])

    return [
        lambda image, *_: colors.stretched(image),
        lambda image, *_: colors.equalized(image),
        solarize,
        color,
        contrast,
        brighten,
        shear_x,
        shear_y,
        translate_x,
        translate_y,
        lambda image, *_: image,
    ]


def moved(image, down=None, right=None):
    """Shifts pixels, to whole ones; the image is mirrored at its edges.

    Args:
        image: `(H, W, 3)`.
        down, right: By how many pixels: a number, `(H, 1)` or `(W,)`; None is
            not at all.
    """
    tf = import_tensorflow()
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
    """One of three: grey, solarised, blurred by Keras-CV's layer."""
    deviation = between(deviation, *BLUR[1])
    return chosen(three_augment_operations(cv), chance, image, deviation)


def three_augment_operations(cv):
    """The operations of 3-Augment on an image and a deviation."""
    tf = import_tensorflow()
    size, _ = BLUR
    blur = cv.RandomGaussianBlur(size, 1.0)

    def blurred(image, deviation):
        kernel = blur.get_kernel(deviation, size)
        kernels = (
            tf.reshape(kernel, (size, 1, 1, 1)),
            tf.reshape(kernel, (1, size, 1, 1)),
        )
        image = blur.augment_image(tf.cast(image, tf.float32), kernels)
        return rounded(image)

    return [
        lambda image, _: colors.recolored(image, colors.saturation(0.0)),
        lambda image, _: colors.solarized(image, SOLARIZE_FROM),
        blurred,
    ]


def color_jitter(strength, image, *numbers):
    """Brightness, contrast and saturation by 1 - strength to 1 + strength."""
    factors = (between(x, 1 - strength, 1 + strength) for x in numbers)
    return colors.jittered(image, *factors)


def span(center, share, size):
    """Where a rectangle begins and ends on one axis, cut off at the image's.

    Args:
        center: Tensor of numbers in [0, 1).
        share: Its length as a share of the image's, of the same shape.
        size: The image's length in pixels.

    Returns:
        Two int32 tensors, the first pixel inside and the first behind.
    """
    tf = import_tensorflow()
    ends = ((center - share / 2) * size, (center + share / 2) * size)
    return [
        tf.cast(tf.clip_by_value(tf.round(x), 0, size), tf.int32) for x in ends
    ]


def erase(probability, image, chance, area, ratio, row, column, noise):
    """Fills a rectangle of some of the images with noise."""
    tf = import_tensorflow()
    area = between(area, *ERASED_AREA)
    limit = -math.log(ERASED_RATIO)
    ratio = tf.exp(between(ratio, -limit, limit))
    height, width, channels = image.shape
    top, bottom = span(row, tf.sqrt(area * ratio), height)
    left, right = span(column, tf.sqrt(area / ratio), width)

    def erased():
        seed = tf.cast(tf.stack([noise, 0.0]) * 2**24, tf.int32)
        shape = tf.stack([bottom - top, right - left, channels])
        filling = tf.random.stateless_normal(shape, seed, GREY, GREY)
        rows = image[top:bottom]
        rows = [rows[:, :left], rounded(filling), rows[:, right:]]
        parts = [image[:top], tf.concat(rows, 1), image[bottom:]]
        return tf.ensure_shape(tf.concat(parts, 0), image.shape)

    return tf.cond(chance < probability, erased, lambda: image)


def rounded(image):
    """Clips to [0, 255] and rounds to uint8."""
    tf = import_tensorflow()
    if image.dtype == tf.uint8:
        return image
    return tf.saturate_cast(image + 0.5, tf.uint8)
