"""Random changes to batches of training images, by Keras-CV inside tf.data.

Axes: B images in the batch, H and W height and width in pixels.
"""

import dataclasses

from keras_vmoe._extras import require
from keras_vmoe.data.tensorflow_runtime import import_tensorflow

PIXELS = (0, 255)
SOLARIZE_FROM = 128  # Of 3-Augment: pixels above are inverted.
BLUR = (5, 1.0)  # Of 3-Augment: size of the kernel, highest deviation.
ERASED_SIDE = (0.15, 0.55)  # Of the image's side; areas of 0.02 to 0.3.


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
        rand_augment: Magnitude of RandAugment in (0, 1]; 0 leaves it out.
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
        for name in ("rand_augment", "color_jitter", "erasing"):
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


def make_augment(augmentation, seed):
    """Makes the function that changes a batch.

    To be mapped one batch after the other: Keras-CV's layers draw from the
    state of generators, and only then is a run repeatable.

    Args:
        augmentation: An `Augmentation`; crops are made elsewhere, while images
            are decoded.
        seed: Non-negative integer.

    Returns:
        A function from `(images, labels)` to `(images, labels)`: `(B, H, W, 3)`
        pixels in [0, 255], uint8 or float32, and labels, which must be one-hot
        `(B, classes)` float32 if they are mixed. Images come back as float32.
    """
    tf = import_tensorflow()
    stages = _stages(augmentation, seed)
    mixers = _mixers(augmentation, seed)

    def augment(images, labels):
        # For the operations of Keras-CV that take no seed of their own.
        tf.compat.v1.set_random_seed(seed)
        images = tf.cast(images, tf.float32)
        for stage in stages:
            images = tf.cast(stage(images), tf.float32)
        if len(mixers) == 1:
            images, labels = mixers[0](images, labels)
        elif mixers:
            images, labels = tf.cond(
                tf.random.uniform((), seed=seed) < 0.5,
                lambda: mixers[0](images, labels),
                lambda: mixers[1](images, labels),
            )
        return tf.clip_by_value(images, *PIXELS), labels

    return augment if stages or mixers else None


def _stages(augmentation, seed):
    """Functions of batches of images, in order."""
    cv = require("keras_cv", "data").layers
    seeds = iter(range(seed + 1, seed + 100))  # 0 means no seed to Keras-CV.
    stages = []
    if augmentation.flip:
        stages.append(cv.RandomFlip("horizontal", seed=next(seeds)))
    if augmentation.rand_augment:
        stages.append(_rand_augment(cv, augmentation, next(seeds)))
    if augmentation.three_augment:
        stages.append(_three_augment(cv, next(seeds)))
    if augmentation.color_jitter:
        stages += _color_jitter(cv, augmentation.color_jitter, seeds)
    if augmentation.erasing:
        stages.append(_erasing(cv, augmentation.erasing, next(seeds)))
    return stages


def _rand_augment(cv, augmentation, seed):
    """RandAugment, one image after the other."""
    tf = import_tensorflow()
    layer = cv.RandAugment(
        PIXELS,
        augmentations_per_image=augmentation.rand_augment_layers,
        magnitude=augmentation.rand_augment,
        seed=seed,
    )

    for operation in layer.layers:
        if isinstance(operation, cv.Equalization):
            # It asks a tensor for its truth. Under the TensorFlow backend Keras
            # keeps AutoGraph, which makes that work, out of nested layers.
            equalize = tf.function(operation.equalize_channel)
            operation.equalize_channel = equalize

    def augment(images):
        # Keras-CV itself maps ten images at a time, and which of them draws
        # first is a matter of chance.
        return tf.map_fn(layer, images, parallel_iterations=1)

    return augment


def _three_augment(cv, seed):
    """Of each image one of three: grey, solarised, blurred."""
    tf = import_tensorflow()
    grey = cv.Grayscale(output_channels=3)
    solarize = cv.Solarization(PIXELS, threshold_factor=SOLARIZE_FROM)
    size, deviation = BLUR
    blur = cv.RandomGaussianBlur(size, (0.1, deviation), seed=seed)

    def augment(images):
        shape = (tf.shape(images)[0], 1, 1, 1)
        choice = tf.random.uniform(shape, 0, 3, tf.int32, seed=seed)
        changed = tf.where(choice == 0, grey(images), solarize(images))
        return tf.where(choice == 2, blur(images), changed)

    return augment


def _color_jitter(cv, strength, seeds):
    # Keras-CV's saturation of 0.5 changes nothing, 0 is grey, 1 the most.
    half = strength / 2
    return [
        cv.RandomBrightness(strength, PIXELS, seed=next(seeds)),
        cv.RandomContrast(PIXELS, strength, seed=next(seeds)),
        cv.RandomSaturation((0.5 - half, 0.5 + half), seed=next(seeds)),
    ]


def _erasing(cv, probability, seed):
    """Fills a rectangle of some of the images with noise."""
    tf = import_tensorflow()
    cutout = cv.RandomCutout(
        ERASED_SIDE, ERASED_SIDE, fill_mode="gaussian_noise", seed=seed
    )

    def augment(images):
        shape = (tf.shape(images)[0], 1, 1, 1)
        chosen = tf.random.uniform(shape, seed=seed) < probability
        return tf.where(chosen, cutout(images), images)

    return augment


def _mixers(augmentation, seed):
    """Functions of images and one-hot labels."""
    cv = require("keras_cv", "data").layers
    mixers = []
    if augmentation.mixup:
        mixers.append(_mixup(cv, augmentation.mixup, seed))
    if augmentation.cutmix:
        mixers.append(_cutmix(cv, augmentation.cutmix, seed))
    return mixers


def _mixup(cv, alpha, seed):
    layer = cv.MixUp(alpha, seed=seed)

    def mix(images, labels):
        batch = layer({"images": images, "labels": labels})
        return batch["images"], batch["labels"]

    return mix


def _cutmix(cv, alpha, seed):
    """CutMix, with labels by the area that was really pasted.

    Keras-CV 0.9 weights labels by a rectangle that may lie partly, or wholly,
    elsewhere. Here a fourth channel carries each image's number through the
    layer, and tells how much of which other image has come in.
    """
    tf = import_tensorflow()
    layer = cv.CutMix(alpha, seed=seed)

    def mix(images, labels):
        own = tf.cast(tf.range(tf.shape(images)[0]), tf.float32)
        own = tf.reshape(own, (-1, 1, 1, 1))
        marks = tf.ones_like(images[..., :1]) * own
        batch = {"images": tf.concat([images, marks], -1), "labels": labels}
        mixed = layer(batch)["images"]
        marks = mixed[..., 3:]
        pasted = tf.abs(marks - own) > 0.5
        share = tf.reduce_mean(tf.cast(pasted, tf.float32), axis=(1, 2, 3))
        other = tf.where(pasted, marks, 0.0)
        other = tf.cast(tf.reduce_max(other, axis=(1, 2, 3)), tf.int32)
        share = share[:, None]
        labels = (1 - share) * labels + share * tf.gather(labels, other)
        return mixed[..., :3], labels

    return mix
