"""Augmentation of training images, inside tf.data.

Random numbers are a function of a seed, so an epoch can be repeated and read in
parallel. Images are augmented one by one, right after decoding. Mixing works on
batches.

Axes: B images in the batch, H and W height and width in pixels.
"""

import dataclasses
import functools
import itertools

from keras_vmoe._checks import check_not_negative
from keras_vmoe._checks import check_sizes
from keras_vmoe._checks import is_number
from keras_vmoe._extras import require
from keras_vmoe.data import changes
from keras_vmoe.data import mixing
from keras_vmoe.data.tensorflow_runtime import tf

LIMITS = {"rand_augment": 2, "color_jitter": 1, "erasing": 1}


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Augmentation of training images, in this order.

    Attributes:
        repeats: Copies of each image in an epoch, side by side and augmented
            differently; an epoch then sees `1 / repeats` of the images
            (repeated augmentation).
        crop_area: Share of the image's area that a random crop keeps, lowest
            and highest; its aspect ratio is 3/4 to 4/3. null resizes the whole
            image.
        crop_padding: Pixels of black padding before a random crop to the size
            of the image.
        flip: Whether to mirror half of the images.
        rand_augment: Magnitude of RandAugment, up to 2, where 1 (often written
            10) is the end of AutoAugment's ranges; 0 leaves it out.
        rand_augment_layers: Operations of RandAugment per image.
        three_augment: Whether to turn each image gray, solarize or blur it.
        color_jitter: Largest relative change of brightness, contrast and
            saturation; 0 leaves it out.
        erasing: Probability of erasing a rectangle of an image.
        mixup: Alpha of MixUp; 0 leaves it out.
        cutmix: Alpha of CutMix; 0 leaves it out. With both, each batch gets
            one of them at random.
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

    def __post_init__(self) -> None:
        check_sizes(
            repeats=self.repeats, rand_augment_layers=self.rand_augment_layers
        )
        check_sizes(0, crop_padding=self.crop_padding)
        check_not_negative(mixup=self.mixup, cutmix=self.cutmix)
        for name, highest in LIMITS.items():
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value <= highest:
                raise ValueError(
                    f"`{name}` must be a number in [0, {highest}]. "
                    f"Received: {name}={value!r}."
                )
        if self.crop_area is not None:
            object.__setattr__(self, "crop_area", tuple(self.crop_area))
            low, high = self.crop_area
            if not 0 < low <= high <= 1:
                raise ValueError(
                    "`crop_area` must be two shares of the area in (0, 1], the "
                    f"lower one first. Received: crop_area={self.crop_area}. "
                    "Inception's crop has (0.08, 1.0)."
                )

    def check_channels(self, channels: int) -> None:
        """Raises if color augmentation is set but the images are not RGB."""
        names = ("rand_augment", "three_augment", "color_jitter")
        of_colors = [name for name in names if getattr(self, name)]
        if of_colors and channels != 3:
            raise ValueError(
                f"{', '.join(of_colors)} must be given RGB images. "
                f"Received: channels={channels}. Leave them out, or load the "
                "images with channels=3."
            )

    @property
    def mixes(self) -> bool:
        """Whether labels are mixed, and must therefore be one-hot."""
        return self.mixup > 0 or self.cutmix > 0


@functools.cache
def make_change(augmentation):
    """Returns the function that augments one image, without crops; or None.

    It maps `(H, W, channels)` pixels in [0, 255] with a static shape, and a
    `(2,)` int64 seed, to uint8 pixels. Equal settings share one function, which
    is traced once for all pipelines.
    """
    stages = _stages(augmentation)
    if not stages:
        return None
    count = sum(n for n, _ in stages)

    @tf.function(autograph=False)
    def change(image, seed):
        # One draw, as it costs as much as an operation on 224 x 224 pixels.
        numbers = tf.random.stateless_uniform((count,), seed)
        numbers = iter(tf.unstack(numbers))
        image = changes.rounded(image)
        for n, stage in stages:
            image = stage(image, *itertools.islice(numbers, n))
        return image

    return change


@functools.cache
def make_mix(augmentation):
    """Returns the function that mixes a batch's images and labels; or None.

    It maps `(B, H, W, channels)` pixels in [0, 255], one-hot float32 labels
    `(B, classes)` and a `(2,)` int64 seed to float32 images and labels. Equal
    settings share one function.
    """
    mixers = []
    if augmentation.mixup:
        mixers.append(functools.partial(mixing.mixup, augmentation.mixup))
    if augmentation.cutmix:
        mixers.append(functools.partial(mixing.cutmix, augmentation.cutmix))
    if not mixers:
        return None

    @tf.function(autograph=False, reduce_retracing=True)
    def mix(images, labels, seed):
        seeds = tf.random.split(tf.cast(seed, tf.int64), 2)
        if len(mixers) == 1:
            return mixers[0](images, labels, seeds[1])
        return tf.cond(
            tf.random.stateless_uniform((), seeds[0]) < 0.5,
            lambda: mixers[0](images, labels, seeds[1]),
            lambda: mixers[1](images, labels, seeds[1]),
        )

    return mix


def _stages(settings):
    """Pairs of a stage's number of random numbers and the stage, in order."""
    stages = []
    if settings.flip:
        stages.append((1, changes.flip))
    if settings.rand_augment:
        stage = functools.partial(changes.rand_augment, settings.rand_augment)
        stages += [(3, stage)] * settings.rand_augment_layers
    if settings.three_augment:
        cv = require("keras_cv", "data").layers
        stages.append((2, functools.partial(changes.three_augment, cv)))
    if settings.color_jitter:
        stage = functools.partial(changes.color_jitter, settings.color_jitter)
        stages.append((3, stage))
    if settings.erasing:
        stages.append((6, functools.partial(changes.erase, settings.erasing)))
    return stages
