"""Image files from clients: decoded in a graph, or refused."""

from keras_vmoe.data.images import decoded
from keras_vmoe.data.tensorflow_runtime import tf

MAX_PIXELS = 2**25  # 100 MB of decoded RGB.
# Start of a PNG. The chunk that must come first holds its size.
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
JPEG_SCAN, USUAL_SCANS = b"\xff\xda", 10


def decoded_or_nan(content, size, preprocessing, max_pixels=MAX_PIXELS):
    """As `decoded`; NaN unless it is a JPEG or PNG within `max_pixels`.

    An invalid file must not fail the request: the server may have batched it
    with images of other clients.
    """

    def decode(content):
        fits = _check_pixels(content, max_pixels)
        with tf.control_dependencies([fits]):
            return decoded(tf.identity(content), size, preprocessing)

    one = tf.data.Dataset.from_tensors(content)
    one = one.map(decode).ignore_errors()
    shape = (*size, preprocessing.channels)
    nan = tf.data.Dataset.from_tensors(tf.fill(shape, float("nan")))
    return one.concatenate(nan).take(1).get_single_element()


def _check_pixels(content, limit):
    """Fails unless the header is a JPEG's or PNG's within `limit` pixels.

    A few bytes can ask for gigabytes of pixels, so the header is checked first.
    A JPEG may also encode all of its pixels in many scans: the more scans
    beyond the usual number, the fewer pixels it may have.
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
    # Each side as well: their product could overflow.
    fits = tf.reduce_all(sides <= limit) & (tf.reduce_prod(sides) <= limit)
    return tf.debugging.Assert(
        (is_png | is_jpeg) & fits,
        ["Expected a JPEG or PNG of at most", limit, "pixels."],
    )
