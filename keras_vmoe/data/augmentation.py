"""Random changes to batches of training images, inside tf.data.

What is drawn is a function of a seed, and so an epoch can be repeated, read in
parallel and entered in the middle. What is done to pixels is Keras-CV's.

Axes: B images in the batch, H and W height and width in pixels.
"""

import dataclasses
import functools

from keras_vmoe._extras import require
from keras_vmoe.data import changes
from keras_vmoe.data import mixing
from keras_vmoe.data.tensorflow_runtime import import_tensorflow


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
            object.__setattr__(self, "crop_area", tuple(self.crop_area))
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


@functools.cache
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
        come back as float32. The same for equal settings, so that it is traced
        once, in however many pipelines.
    """
    tf = import_tensorflow()
    stages, mixers = _stages(augmentation), _mixers(augmentation)
    if not stages and not mixers:
        return None

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
        return tf.clip_by_value(images, *changes.PIXELS), labels

    return augment


def _stages(settings):
    """Functions of `(images, seed)`, in order."""
    cv = require("keras_cv", "data").layers
    stages = []
    if settings.flip:
        stages.append(changes.flip)
    if settings.rand_augment:
        stage = functools.partial(
            changes.rand_augment,
            changes.rand_augment_operations(cv),
            settings.rand_augment,
        )
        stages += [stage] * settings.rand_augment_layers
    if settings.three_augment:
        stages.append(
            functools.partial(
                changes.three_augment, changes.three_augment_operations(cv)
            )
        )
    if settings.color_jitter:
        stages.append(changes.color_jitter(cv, settings.color_jitter))
    if settings.erasing:
        stages.append(functools.partial(changes.erase, settings.erasing))
    return stages


def _mixers(settings):
    """Functions of images, one-hot labels and a seed."""
    mixers = []
    if settings.mixup:
        mixers.append(functools.partial(mixing.mixup, settings.mixup))
    if settings.cutmix:
        mixers.append(functools.partial(mixing.cutmix, settings.cutmix))
    return mixers
