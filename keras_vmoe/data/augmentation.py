"""Random changes to batches of training images, inside tf.data.

What is drawn is a function of a seed, and so an epoch can be repeated, read in
parallel and entered in the middle. What is done to pixels is Keras-CV's.

Axes: B images in the batch, H and W height and width in pixels.
"""

import dataclasses
import functools
import math

from keras_vmoe._extras import require
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


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What happens to training images, in this order.

    Attributes:
        repeats: Copies of each image in an epoch's order, side by side, each
            changed in a way of its own; an epoch then sees `1 / repeats` of
            the images (repeated augmentation).
        crop_area: Share of the image's area that a random crop keeps, lowest
            and highest; its sides have a ratio of 3/4 to 4/3. null resizes the
            whole image.
        crop_padding: Pixels of black padding before a random crop to the size
            of the image.
        flip: Whether to mirror half of the images.
        rand_augment: Magnitude of RandAugment, where 1 (often written 10) is
            the end of AutoAugment's ranges, up to 2; 0 leaves it out.
        rand_augment_layers: Operations of RandAugment per image.
        three_augment: Whether each image is made grey, solarised or blurred.
        color_jitter: Largest change of brightness, contrast and saturation, as
            a share; 0 leaves it out.
        erasing: Probability of erasing a rectangle of an image.
        mixup: Alpha of MixUp; 0 leaves it out.
        cutmix: Alpha of CutMix; 0 leaves it out. With both each batch gets one
            of them, by chance.
    """

    repeats: int = 1
    crop_area: tuple[float, float] | None = None
    crop_padding: int = 0
    flip: bool = False
    rand_augment: float = 0.0
    rand_augment_layers: int = 2
    three_augment: bool = False
    color_jitter: float = 0.0
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self):
        for name in ("repeats", "rand_augment_layers"):
            self._check(name, 1, None)
        for name in ("crop_padding", "mixup", "cutmix"):
            self._check(name, 0, None)
        self._check("rand_augment", 0, 2)
        for name in ("color_jitter", "erasing"):
            self._check(name, 0, 1)
        if self.crop_area is not None:
            low, high = self.crop_area
            if not 0 < low <= high <= 1:
                raise ValueError(
                    "`crop_area` must be two shares of the area in (0, 1], the "
                    f"lower one first. Received: crop_area={self.crop_area}. "
                    "Inception's crop has (0.08, 1.0)."
                )

    def _check(self, name, low, high):
        value = getattr(self, name)
        good = isinstance(value, (int, float)) and value >= low
        if not good or (high is not None and value > high):
            limits = f"at least {low}" + (f", at most {high}" if high else "")
            raise ValueError(
                f"`{name}` must be a number of {limits}. "
                f"Received: {name}={value!r}. "
                f"The default is {getattr(type(self), name)}."
            )

    @property
    def mixes(self):
        """Whether labels are mixed, and so must be one-hot."""
        return self.mixup > 0 or self.cutmix > 0


def make_augment(augmentation):
    """Makes the function that changes a batch.

    Args:
        augmentation: An `Augmentation`; crops are made elsewhere, while images
            are decoded.

    Returns:
        None if nothing is to be changed, else a function from `(images, labels,
        seed)` to `(images, labels)`: `(B, H, W, 3)` pixels in [0, 255], uint8
        or float32; labels, which must be one-hot `(B, classes)` float32 if they
        are mixed; and `(2,)` int64, of which the result is a function. Images
        come back as float32. It is traced once, in however many pipelines.
    """
    stages, mixers = _stages(augmentation), _mixers(augmentation)
    return _traced(augmentation) if stages or mixers else None


@functools.cache
def _traced(settings):
    """The function of an `Augmentation`, one for all pipelines."""
    tf = import_tensorflow()
    stages, mixers = _stages(settings), _mixers(settings)

    @tf.function(reduce_retracing=True)
    def augment(images, labels, seed):
        seeds = tf.random.split(tf.cast(seed, tf.int64), len(stages) + 2)
        images = tf.cast(images, tf.float32)
        for i, stage in enumerate(stages):
            images = stage(images, seeds[i])
        if len(mixers) == 1:
            images, labels = mixers[0](images, labels, seeds[-1])
        elif mixers:
            images, labels = tf.cond(
                tf.random.stateless_uniform((), seeds[-2]) < 0.5,
                lambda: mixers[0](images, labels, seeds[-1]),
                lambda: mixers[1](images, labels, seeds[-1]),
            )
        return tf.clip_by_value(images, *PIXELS), labels

    return augment


def _stages(settings):
    """Functions of `(images, seed)`, in order."""
    cv = require("keras_cv", "data").layers
    stages = []
    if settings.flip:
        stages.append(_flip)
    if settings.rand_augment:
        stage = functools.partial(
            _rand_augment, _operations(cv), settings.rand_augment
        )
        stages += [stage] * settings.rand_augment_layers
    if settings.three_augment:
        stages.append(functools.partial(_three_augment, _three(cv)))
    if settings.color_jitter:
        stages.append(_color_jitter(cv, settings.color_jitter))
    if settings.erasing:
        stages.append(functools.partial(_erase, settings.erasing))
    return stages


def _uniform(images, seed, low=0.0, high=1.0):
    """A number for each image, `(B, 1, 1, 1)`."""
    tf = import_tensorflow()
    shape = (tf.shape(images)[0], 1, 1, 1)
    return tf.random.stateless_uniform(shape, seed, low, high)


def _flip(images, seed):
    tf = import_tensorflow()
    chosen = tf.reshape(_uniform(images, seed) < 0.5, (-1,))
    operations = [lambda x: x, lambda x: tf.reverse(x, [2])]
    return _routed(operations, tf.cast(chosen, tf.int32), images)


def _routed(operations, choices, images, *parameters):
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


def _rand_augment(operations, magnitude, images, seed):
    """One operation of RandAugment for each image."""
    tf = import_tensorflow()
    count = tf.shape(images)[0]
    seeds = tf.random.split(seed, 3)
    numbers = tf.random.stateless_uniform((count,), seeds[0])
    choice = numbers / (1 - IDENTITY) * len(operations)
    choice = tf.minimum(tf.cast(choice, tf.int32), len(operations))
    normal = tf.random.stateless_normal((count, 1, 1, 1), seeds[1])
    strength = tf.maximum(magnitude + SPREAD * normal, 0)
    sign = tf.sign(_uniform(images, seeds[2], -1.0, 1.0))
    operations = [*operations, lambda images, *_: images]
    return _routed(operations, choice, images, strength, sign)


def _operations(cv):
    """RandAugment's operations on images, in the ranges of AutoAugment.

    Each takes images, a strength whose 1 is the end of its range, and a sign,
    `(B, 1, 1, 1)` both.
    """
    tf = import_tensorflow()
    stretch, equalize = cv.AutoContrast(PIXELS), cv.Equalization(PIXELS)
    solarize, color = cv.Solarization(PIXELS), cv.RandomColorDegeneration(1.0)
    contrast = cv.RandomContrast(PIXELS, 1.0)
    shear, translate = cv.RandomShear(1.0, 1.0), cv.RandomTranslation(1.0, 1.0)

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
        lambda images, strength, sign: color.augment_images(
            images, ENHANCEMENT * strength * sign
        ),
        lambda images, strength, sign: contrast.augment_images(
            images, 1 + ENHANCEMENT * strength * sign
        ),
        lambda images, strength, sign: tf.clip_by_value(
            images * (1 + ENHANCEMENT * strength * sign), *PIXELS
        ),
        sheared("shear_x"),
        sheared("shear_y"),
        translated("width_translations"),
        translated("height_translations"),
    ]


def _three_augment(operations, images, seed):
    """Of each image one of three: grey, solarised, blurred."""
    tf = import_tensorflow()
    seeds = tf.random.split(seed, 2)
    choice = tf.random.stateless_uniform(
        (tf.shape(images)[0],), seeds[0], 0, len(operations), tf.int32
    )
    deviation = _uniform(images, seeds[1], *BLUR[1])
    return _routed(operations, choice, images, deviation)


def _three(cv):
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


def _color_jitter(cv, strength):
    """Brightness, contrast and saturation of each image."""
    tf = import_tensorflow()
    brightness = cv.RandomBrightness(strength, PIXELS)
    contrast = cv.RandomContrast(PIXELS, strength)
    saturation = cv.RandomColorDegeneration(1.0)

    def jitter(images, seed):
        seeds = tf.random.split(seed, 3)
        shift, scale, color = (
            _uniform(images, seeds[i], -strength, strength) for i in range(3)
        )
        images = brightness.augment_images(images, PIXELS[1] * shift)
        images = contrast.augment_images(images, 1 + scale)
        return saturation.augment_images(images, color)  # Towards grey, or on.

    return jitter


def _rectangles(images, seed, heights, widths):
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
        center = _uniform(images, seeds[axis - 1])
        shape = (1, -1, 1, 1) if axis == 1 else (1, 1, -1, 1)
        place = tf.reshape((tf.range(size, dtype=tf.int32)), shape)
        place = (tf.cast(place, tf.float32) + 0.5) / tf.cast(size, tf.float32)
        inside &= tf.abs(place - center) < share / 2
    return inside


def _erase(probability, images, seed):
    """Fills a rectangle of some of the images with noise."""
    tf = import_tensorflow()
    seeds = tf.random.split(seed, 5)
    chosen = tf.reshape(_uniform(images, seeds[0]) < probability, (-1,))
    area = _uniform(images, seeds[1], *ERASED_AREA)
    limit = -math.log(ERASED_RATIO)
    ratio = tf.exp(_uniform(images, seeds[2], -limit, limit))
    erased = _rectangles(
        images, seeds[3], tf.sqrt(area * ratio), tf.sqrt(area / ratio)
    )

    def fill(images, erased):
        shape = tf.shape(images)
        noise = tf.random.stateless_normal(shape, seeds[4], GREY, GREY)
        return tf.where(erased, tf.clip_by_value(noise, *PIXELS), images)

    operations = [lambda images, _: images, fill]
    return _routed(operations, tf.cast(chosen, tf.int32), images, erased)


def _mixers(settings):
    """Functions of images, one-hot labels and a seed."""
    mixers = []
    if settings.mixup:
        mixers.append(functools.partial(_mixup, settings.mixup))
    if settings.cutmix:
        mixers.append(functools.partial(_cutmix, settings.cutmix))
    return mixers


def _partners(images, labels, seed, alpha):
    """Another image for each, its label, and a share by Beta(alpha, alpha)."""
    tf = import_tensorflow()
    seeds = tf.random.split(seed, 3)
    count = tf.shape(images)[0]
    order = tf.argsort(tf.random.stateless_uniform((count,), seeds[0]))
    mine, other = (
        tf.random.stateless_gamma((count, 1, 1, 1), seeds[i], alpha)
        for i in (1, 2)
    )
    share = tf.math.divide_no_nan(mine, mine + other)
    return tf.gather(images, order), tf.gather(labels, order), share


def _mixup(alpha, images, labels, seed):
    """MixUp ([Zhang et al., 2018](https://arxiv.org/abs/1710.09412))."""
    others, their_labels, share = _partners(images, labels, seed, alpha)
    images = share * images + (1 - share) * others
    share = share[:, :, 0, 0]
    return images, share * labels + (1 - share) * their_labels


def _cutmix(alpha, images, labels, seed):
    """CutMix ([Yun et al., 2019](https://arxiv.org/abs/1905.04899)).

    The label's share is the area that is really pasted.
    """
    tf = import_tensorflow()
    seeds = tf.random.split(seed, 2)
    others, their_labels, share = _partners(images, labels, seeds[0], alpha)
    side = tf.sqrt(share)
    pasted = _rectangles(images, seeds[1], side, side)
    images = tf.where(pasted, others, images)
    share = tf.reduce_mean(tf.cast(pasted, tf.float32), (1, 2, 3))[:, None]
    return images, (1 - share) * labels + share * their_labels
