"""What augmentation does to the pixels of each image.

The operations are Keras-CV's; what they are given is drawn here, from a seed.

Axes: B images in the batch, H and W height and width in pixels.
"""

import functools
import math

from keras_vmoe.data.tensorflow_runtime import import_tensorflow

PIXELS = (0, 255)
GREY = 127.5
SOLARIZE_FROM = 128  # Of 3-Augment: pixels above are inverted.
BLUR = (5, (0.1, 1.0))  # Of 3-Augment: size of the kernel, its deviation.
ERASED_AREA, ERASED_RATIO = (0.02, 1 / 3), 0.3  # Ratio of sides, to 1 / 0.3.
SPREAD = 0.05  # Deviation of RandAugment's magnitudes.
IDENTITY = 1 / 11  # Probability of RandAugment's operation that does nothing.
# Ends of RandAugment's ranges: of shear, of translation as a share of the side,
# of the change of colour, contrast and brightness.
SHEAR, TRANSLATION, ENHANCEMENT = 0.3, 0.45, 0.9


def uniform(images, seed, low=0.0, high=1.0):
    """A number for each image, `(B, 1, 1, 1)`."""
    tf = import_tensorflow()
    shape = (tf.shape(images)[0], 1, 1, 1)
    return tf.random.stateless_uniform(shape, seed, low, high)


def flip(images, seed):
    """Mirrors half of the images."""
    tf = import_tensorflow()
    chosen = tf.reshape(uniform(images, seed) < 0.5, (-1,))
    operations = [lambda x: x, lambda x: tf.reverse(x, [2])]
    return routed(operations, tf.cast(chosen, tf.int32), images)


def routed(operations, choices, images, *parameters):
    """Gives each image to the operation of its choice, and to no other.

    Args:
        operations: Functions of some of the images and their parameters.
        choices: `(B,)` int32.
        images: `(B, H, W, 3)`.
        *parameters: `(B, ...)` tensors.

    Returns:
        Images as they were.
    """
    tf = import_tensorflow()
    places, changed = [], []
    for i, operation in enumerate(operations):
        # Not tf.dynamic_partition: TensorFlow's shape inference takes all of
        # its parts to be equally long, and its optimizer then mixes them up.
        place = tf.cast(tf.where(choices == i)[:, 0], tf.int32)
        inputs = [tf.gather(x, place) for x in (images, *parameters)]
        # Not all operations take a batch of none.
        part = tf.cond(
            tf.size(place) > 0,
            functools.partial(operation, *inputs),
            functools.partial(tf.identity, inputs[0]),
        )
        places.append(place)
        changed.append(part)
    result = tf.dynamic_stitch(places, changed)
    return tf.ensure_shape(result, images.shape)


def rand_augment(operations, magnitude, images, seed):
    """One operation of RandAugment for each image."""
    tf = import_tensorflow()
    count = tf.shape(images)[0]
    seeds = tf.random.split(seed, 3)
    numbers = tf.random.stateless_uniform((count,), seeds[0])
    choice = numbers / (1 - IDENTITY) * len(operations)
    choice = tf.minimum(tf.cast(choice, tf.int32), len(operations))
    normal = tf.random.stateless_normal((count, 1, 1, 1), seeds[1])
    strength = tf.maximum(magnitude + SPREAD * normal, 0)
    sign = tf.sign(uniform(images, seeds[2], -1.0, 1.0))
    operations = [*operations, lambda images, *_: images]
    return routed(operations, choice, images, strength, sign)


def rand_augment_operations(cv):
    """RandAugment's operations on images, in the ranges of AutoAugment.

    Each takes images, a strength whose 1 is the end of its range, and a sign,
    `(B, 1, 1, 1)` both.
    """
    tf = import_tensorflow()
    stretch, equalize = cv.AutoContrast(PIXELS), cv.Equalization(PIXELS)
    solarize, color = cv.Solarization(PIXELS), cv.RandomColorDegeneration(1.0)
    contrast = cv.RandomContrast(PIXELS, 1.0)
    how = {"interpolation": "nearest"}  # As the Model Garden has it.
    shear = cv.RandomShear(1.0, 1.0, **how)
    translate = cv.RandomTranslation(1.0, 1.0, **how)

    def factor(strength, sign):
        # Beyond the end of the range there is no less than this.
        return tf.maximum(1 + ENHANCEMENT * strength * sign, 1 - ENHANCEMENT)

    def solarized(images, strength, sign):
        thresholds = PIXELS[1] * (1 - tf.minimum(strength, 1))
        changes = {"additions": 0.0, "thresholds": thresholds}
        return solarize.augment_images(images, changes)

    def sheared(direction):
        def change(images, strength, sign):
            amount = tf.reshape(SHEAR * strength * sign, (-1, 1))
            changes = {"shear_x": None, "shear_y": None, direction: amount}
            return shear.augment_images(images, changes)

        return change

    def translated(direction):
        def change(images, strength, sign):
            amount = tf.reshape(TRANSLATION * strength * sign, (-1, 1))
            names = ("height_translations", "width_translations")
            changes = dict.fromkeys(names, tf.zeros_like(amount))
            return translate.augment_images(
                images, changes | {direction: amount}
            )

        return change

    return [
        lambda images, *_: stretch.augment_images(images),
        lambda images, *_: equalize.augment_images(images),
        solarized,
        lambda images, *amount: color.augment_images(
            images, 1 - factor(*amount)
        ),
        lambda images, *amount: contrast.augment_images(
            images, factor(*amount)
        ),
        lambda images, *amount: tf.clip_by_value(
            images * factor(*amount), *PIXELS
        ),
        sheared("shear_x"),
        sheared("shear_y"),
        translated("width_translations"),
        translated("height_translations"),
    ]


def three_augment(operations, images, seed):
    """Of each image one of three: grey, solarised, blurred."""
    tf = import_tensorflow()
    seeds = tf.random.split(seed, 2)
    choice = tf.random.stateless_uniform(
        (tf.shape(images)[0],), seeds[0], 0, len(operations), tf.int32
    )
    deviation = uniform(images, seeds[1], *BLUR[1])
    return routed(operations, choice, images, deviation)


def three_augment_operations(cv):
    """The operations of 3-Augment."""
    tf = import_tensorflow()
    grey = cv.Grayscale(output_channels=3)
    solarize = cv.Solarization(PIXELS)
    size, _ = BLUR
    blur = cv.RandomGaussianBlur(size, 1.0)

    def blurred(image, deviation):
        kernel = blur.get_kernel(tf.reshape(deviation, ()), size)
        kernels = (
            tf.reshape(kernel, (size, 1, 1, 1)),
            tf.reshape(kernel, (1, size, 1, 1)),
        )
        return blur.augment_image(image, kernels)

    def all_blurred(images, deviation):
        return tf.map_fn(
            lambda x: blurred(*x),
            (images, deviation),
            fn_output_signature=images.dtype,
        )

    changes = {"additions": 0.0, "thresholds": float(SOLARIZE_FROM)}
    return [
        lambda images, _: grey.augment_images(images),
        lambda images, _: solarize.augment_images(images, changes),
        all_blurred,
    ]


def color_jitter(cv, strength):
    """Brightness, contrast and saturation of each image."""
    tf = import_tensorflow()
    contrast = cv.RandomContrast(PIXELS, strength)
    saturation = cv.RandomColorDegeneration(1.0)

    def jitter(images, seed):
        seeds = tf.random.split(seed, 3)
        light, scale, color = (
            uniform(images, seeds[i], -strength, strength) for i in range(3)
        )
        images = tf.clip_by_value(images * (1 + light), *PIXELS)
        images = contrast.augment_images(images, 1 + scale)
        return saturation.augment_images(images, color)  # Towards grey, or on.

    return jitter


def rectangles(images, seed, heights, widths):
    """Whether a pixel is in its image's rectangle, `(B, H, W, 1)`.

    Centres are uniform over the image; what lies outside of it is cut off.

    Args:
        images: `(B, H, W, 3)`.
        seed: `(2,)`.
        heights, widths: `(B, 1, 1, 1)` sides, as shares of the image's.
    """
    tf = import_tensorflow()
    seeds = tf.random.split(seed, 2)
    inside = True
    for axis, share in ((1, heights), (2, widths)):
        size = tf.shape(images)[axis]
        center = uniform(images, seeds[axis - 1])
        shape = (1, -1, 1, 1) if axis == 1 else (1, 1, -1, 1)
        place = tf.reshape((tf.range(size, dtype=tf.int32)), shape)
        place = (tf.cast(place, tf.float32) + 0.5) / tf.cast(size, tf.float32)
        inside &= tf.abs(place - center) < share / 2
    return inside


def erase(probability, images, seed):
    """Fills a rectangle of some of the images with noise."""
    tf = import_tensorflow()
    seeds = tf.random.split(seed, 5)
    chosen = tf.reshape(uniform(images, seeds[0]) < probability, (-1,))
    area = uniform(images, seeds[1], *ERASED_AREA)
    limit = -math.log(ERASED_RATIO)
    ratio = tf.exp(uniform(images, seeds[2], -limit, limit))
    erased = rectangles(
        images, seeds[3], tf.sqrt(area * ratio), tf.sqrt(area / ratio)
    )

    def fill(images, erased):
        shape = tf.shape(images)
        noise = tf.random.stateless_normal(shape, seeds[4], GREY, GREY)
        return tf.where(erased, tf.clip_by_value(noise, *PIXELS), images)

    operations = [lambda images, _: images, fill]
    return routed(operations, tf.cast(chosen, tf.int32), images, erased)
