"""The EXIF orientation of JPEG, PNG and WebP files, read in a graph.

TensorFlow decodes pixels as stored, so photographs from phones lie on their
side. This module uses only its operations, and so runs in `tf.data` and in a
served graph alike. Damaged EXIF counts as none.
"""

from keras_vmoe.data.tensorflow_runtime import tf

TAG = 0x0112
# Marks before EXIF. In a JPEG it is in one of the first segments.
JPEG, PNG, WEBP = b"Exif\0\0", b"eXIf", b"EXIF"
SEGMENT = 2**16  # The longest EXIF of a JPEG, in bytes.


def upright(image, content):
    """Turns decoded pixels upright, according to the EXIF of their file.

    Args:
        image: `(H, W, C)` tensor, decoded from the file.
        content: Scalar string tensor or bytes, the file.

    Returns:
        `(H, W, C)` or `(W, H, C)` tensor.
    """
    number = orientation(content)

    def turned():
        swapped = tf.cond(
            number >= 5, lambda: tf.transpose(image, (1, 0, 2)), lambda: image
        )
        mirrored = [
            tf.reduce_any(number == numbers)
            for numbers in ([3, 4, 7, 8], [2, 3, 6, 7])
        ]
        # A slice with dynamic strides takes longer than decoding.
        return tf.raw_ops.Reverse(tensor=swapped, dims=[*mirrored, False])

    channels = image.shape[-1]
    image = tf.cond(number == 1, lambda: image, turned)
    return tf.ensure_shape(image, (None, None, channels))


def orientation(content):
    """Returns the EXIF orientation, 1 to 8, as int32; 1 without EXIF."""

    def after(content, mark):
        parts = tf.strings.split(content, mark, maxsplit=1)
        return tf.strings.substr(tf.concat([parts, [b""]], 0)[1], 0, SEGMENT)

    def of_webp():  # It has a length and, in some files, the mark of a JPEG.
        exif = tf.strings.join([after(content, WEBP), b"\0" * 4])
        exif = tf.strings.substr(exif, 4, SEGMENT)
        return tf.strings.regex_replace(exif, r"\AExif\x00\x00", b"")

    starts = tf.strings.substr(content, 0, 4)
    tiff = tf.case(
        [
            (
                tf.io.is_jpeg(content),
                lambda: after(tf.strings.substr(content, 0, 2 * SEGMENT), JPEG),
            ),
            (starts == b"\x89PNG", lambda: after(content, PNG)),
            (starts == b"RIFF", of_webp),
        ],
        lambda: tf.constant(b""),
    )
    is_exif = tf.strings.length(tiff) > 0
    return tf.cond(is_exif, lambda: _of_tiff(tiff), lambda: tf.constant(1))


def _of_tiff(tiff):
    """The orientation in the first directory of a TIFF file."""
    is_little = tf.strings.substr(tiff, 0, 4) == b"II*\0"
    is_big = tf.strings.substr(tiff, 0, 4) == b"MM\0*"
    # With zeros, an offset beyond the end of the file finds no entries.
    data = tf.io.decode_raw(tf.strings.join([tiff, b"\0" * 8]), tf.uint8)
    data = tf.cast(data, tf.int64)

    def number(digits):
        size = digits.shape[-1]
        powers = [256**i for i in range(size)]  # A reversed slice is logged.
        powers = tf.where(is_little, powers, powers[::-1])
        powers = tf.cast(powers, tf.int64)
        return tf.reduce_sum(digits * powers, -1)

    start = tf.minimum(number(tf.ensure_shape(data[4:8], 4)), SEGMENT)
    start = tf.minimum(start, tf.size(data, tf.int64) - 2)
    count = number(tf.ensure_shape(data[start : start + 2], 2))
    entries = data[start + 2 : start + 2 + 12 * count]
    entries = entries[: tf.size(entries) // 12 * 12]
    entries = tf.reshape(entries, (-1, 12))
    values = number(entries[:, 8:10])
    good = (number(entries[:, :2]) == TAG) & (values >= 1) & (values <= 8)
    found = tf.reduce_max(tf.where(good, values, 1))
    # Without entries, the maximum is the smallest integer.
    found = tf.where(is_little | is_big, tf.maximum(found, 1), 1)
    return tf.cast(found, tf.int32)
