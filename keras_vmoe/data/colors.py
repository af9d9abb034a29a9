"""Changes of an image's colors, pixel by pixel.

If Keras-CV has the same operation, the tests use it as the slow reference: on
one image of 224 pixels these are two to four times as fast. Constants are in
NumPy: a node of TensorFlow's graph costs time even if it is not chosen.

Axes: H and W height and width in pixels. Images are uint8.
"""

import math

import numpy as np

from keras_vmoe.data.tensorflow_runtime import tf

SAME = np.eye(3, dtype="float32")  # The matrix of no change.
# The matrix that makes gray, as tf.image does.
GRAY = np.repeat(np.array([[0.2989], [0.587], [0.114]], "float32"), 3, axis=1)
LEVELS = 256


def recolored(image, matrix, offset=0.0):
    """Maps each pixel's color affinely, then rounds and clips.

    Args:
        image: `(H, W, 3)` uint8.
        matrix: `(3, 3)`, from the old channels to the new.
        offset: `(3,)` or a number, added to the new channels.

    Returns:
        uint8 of the same shape.
    """
    height, width, _ = image.shape
    # Four pixels per row of the product: TensorFlow takes 0.07 ms for this, but
    # 0.15 ms for rows of three numbers.
    group = math.gcd(height * width, 4)
    diagonal = np.eye(group, dtype="float32").reshape(group, 1, group, 1)
    blocks = diagonal * tf.reshape(matrix, (1, 3, 1, 3))
    rows = tf.cast(tf.reshape(image, (-1, 3 * group)), tf.float32)
    rows = rows @ tf.reshape(blocks, (3 * group, 3 * group))
    # Added row by row: three numbers are slow to broadcast.
    offset = tf.broadcast_to(offset + 0.5, (width, 3))  # Rounds.
    values = tf.reshape(rows, (height, -1)) + tf.reshape(offset, (-1,))
    return tf.reshape(tf.saturate_cast(values, tf.uint8), image.shape)


def channel_means(image):
    """Means of the channels, `(3,)` float32."""
    return _over_pixels(tf.reduce_mean, tf.cast(image, tf.float32))


def _over_pixels(reduce, image):
    """Reduces all axes but the channels."""
    # Rows first: TensorFlow is slow where only three numbers are left.
    row = reduce(tf.reshape(image, (image.shape[0], -1)), 0)
    return reduce(tf.reshape(row, (-1, 3)), 0)


def saturation(factor):
    """Returns the matrix that changes saturation; 0 is gray, 1 no change."""
    return factor * (SAME - GRAY) + GRAY


def contrasted(image, factor):
    """Changes contrast around the mean of each channel; 1 is no change."""
    offset = (1 - factor) * channel_means(image)
    return recolored(image, factor * SAME, offset)


def jittered(image, light, contrast, color):
    """Changes brightness, contrast and saturation, in this order, at once.

    One affine map, clipped once at the end, not three times. 1 is no change.
    """
    means = light * channel_means(image)
    matrix = saturation(color)
    offset = tf.linalg.matvec(matrix, (1 - contrast) * means, transpose_a=True)
    return recolored(image, light * contrast * matrix, offset)


def stretched(image):
    """Stretches each channel to 0 to 255 (AutoContrast)."""
    low, high = (
        tf.cast(_over_pixels(reduce, image), tf.float32)
        for reduce in (tf.reduce_min, tf.reduce_max)
    )
    is_flat = low == high
    scale = tf.where(is_flat, 1.0, 255 / (high - low))
    offset = tf.where(is_flat, 0.0, -low * scale)
    return recolored(image, scale * SAME, offset)


def solarized(image, threshold):
    """Inverts all pixels at or above a threshold in [0, 255]."""
    # Eight times as fast as `tf.where`: 255 - x flips all bits of x.
    bright = image >= tf.cast(tf.math.ceil(threshold), tf.uint8)
    return tf.bitwise.bitwise_xor(image, 255 * tf.cast(bright, tf.uint8))


def equalized(image):
    """Maps each channel so that all levels are equally frequent."""
    height, width, _ = image.shape
    # One histogram and one table for the three channels, one after another.
    channels = np.tile(LEVELS * np.arange(3, dtype="int32"), width)
    flat = tf.cast(tf.reshape(image, (height, -1)), tf.int32) + channels
    counts = tf.raw_ops.Bincount(
        arr=flat, size=3 * LEVELS, weights=tf.constant([], tf.int32)
    )
    table = tf.reshape(_equalizing(tf.reshape(counts, (3, LEVELS))), (-1,))
    return tf.reshape(
        tf.gather_nd(table, tf.expand_dims(flat, -1)), image.shape
    )


def _equalizing(counts):
    """From histograms `(3, 256)` to the new levels, uint8."""
    total = tf.reduce_sum(counts, 1, keepdims=True)
    # Like Keras-CV, which leaves out the rarest level; Pillow the highest.
    used = tf.where(counts == 0, total, counts)
    step = (total - tf.reduce_min(used, 1, keepdims=True)) // (LEVELS - 1)
    below = tf.cumsum(counts, 1, exclusive=True)
    levels = (below + step // 2) // tf.maximum(step, 1)
    unchanged = np.arange(LEVELS, dtype="int32")
    levels = tf.where(step == 0, unchanged, tf.minimum(levels, LEVELS - 1))
    return tf.cast(levels, tf.uint8)
