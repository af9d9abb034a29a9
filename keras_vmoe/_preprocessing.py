"""How a model wants its images: a value, which `keras_vmoe.data` exports."""

import dataclasses
from collections.abc import Mapping
from typing import Any
from typing import Self

import numpy as np

from keras_vmoe import _checks

INTERPOLATIONS = ("bilinear", "bicubic")
# Of the RGB images of ImageNet.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """From pixels in [0, 255] to a model's input: `(pixels - mean) / std`.

    Every model of this package has one, `model.preprocessing`. The default
    maps pixels to [-1, 1], as V-MoE does.

    Attributes:
        mean: Number that is subtracted from pixels, or one for each channel.
        std: Number of at least 1 by which the difference is divided, or one for
            each channel; 255 times that of pixels in [0, 1].
        test_crop: Share of the shorter side, in (0, 1], that the center crop of
            evaluation keeps. None resizes whole images.
        interpolation: `"bilinear"` or `"bicubic"`, both with antialiasing, of
            images that are resized. (Training with `"bilinear"` takes the mean
            of an area, see docs/data.md.)
        channels: Channels of the images: 3 repeats gray, 1 converts RGB to
            gray, and both drop alpha; any other number must be that of the
            images.
        exif_orientation: Whether JPEG, PNG and WebP files are turned upright
            as their EXIF says.

    Raises:
        ValueError: If a value is out of range.

    Example:

    >>> Preprocessing.imagenet(test_crop=0.875).mean
    (123.675, 116.28, 103.53)
    """

    mean: float | tuple[float, ...] = 127.5
    std: float | tuple[float, ...] = 127.5
    test_crop: float | None = None
    interpolation: str = "bilinear"
    channels: int = 3
    exif_orientation: bool = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = _checks.plain(getattr(self, field.name))
            value = tuple(value) if isinstance(value, list) else value
            if (
                isinstance(value, tuple)
                and value == value[:1] * len(value) != ()
            ):
                value = value[0]  # Of all channels.
            object.__setattr__(self, field.name, value)
        _checks.check_sizes(channels=self.channels)
        _checks.check_shares(test_crop=self.test_crop)
        _checks.check_flags(exif_orientation=self.exif_orientation)
        _checks.check_choice(
            "interpolation", self.interpolation, INTERPOLATIONS
        )
        for name in ("mean", "std"):
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else (value,)
            good = all(map(_checks.is_number, values))
            good = good and np.isfinite(np.array(values, "float32")).all()
            good &= len(values) in (1, self.channels)
            # 0.229 is of pixels in [0, 1].
            if not good or (name == "std" and min(values) < 1):
                words = "numbers from 1 on" if name == "std" else "numbers"
                raise ValueError(
                    f"`{name}` must be {words} on the scale of 0 to 255, one "
                    "or one for each channel. "
                    f"Received: {name}={value!r} for images of "
                    f"{_checks.counted(self.channels, 'channel')}."
                )

    @classmethod
    def imagenet(cls, **settings: Any) -> Self:
        """With the mean and standard deviation of ImageNet's RGB images.

        Args:
            **settings: The other attributes.
        """
        return cls(IMAGENET_MEAN, IMAGENET_STD, **settings)

    @classmethod
    def of(
        cls, value: "Preprocessing | Mapping[str, Any] | None", **settings: Any
    ) -> Self:
        """A `Preprocessing` of one, a dict of its attributes, or None.

        Args:
            value: The former; None means the default.
            **settings: Attributes that are set unless they are None.

        Raises:
            ValueError: If `value` is something else.
        """
        settings = {k: x for k, x in settings.items() if x is not None}
        if isinstance(value, dict | None):
            names = [field.name for field in dataclasses.fields(cls)]
            _checks.check_keys("`preprocessing`", value or {}, names)
            return cls(**{**(value or {}), **settings})
        if not isinstance(value, cls):
            raise ValueError(
                "`preprocessing` must be None or a Preprocessing, such as "
                "data.Preprocessing.imagenet(test_crop=0.875). Received: "
                f"preprocessing={value!r}."
            )
        return dataclasses.replace(value, **settings)

    def normalized(self, pixels: np.ndarray) -> np.ndarray:
        """Float32 pixels `(..., channels)` in [0, 255] as a model's input."""
        mean = np.asarray(self.mean, "float32")
        std = np.asarray(self.std, "float32")
        return pixels / std - mean / std


def check_preprocessing(model, dataset):
    """Raises if `data.load` made the dataset for another model."""
    ours, theirs = (getattr(x, "preprocessing", None) for x in (model, dataset))
    if not all(isinstance(x, Preprocessing) for x in (ours, theirs)):
        return  # Other objects may have such an attribute, too.
    found = {
        name: (getattr(theirs, name), getattr(ours, name))
        for name in ("mean", "std", "exif_orientation")
    }
    wrong = [f"{k}={x} for {y}" for k, (x, y) in found.items() if x != y]
    if wrong:
        raise ValueError(
            "A dataset must be preprocessed as the model expects. "
            f"Received: a dataset of {', '.join(wrong)}. Pass "
            "`preprocessing=model.preprocessing` to `data.load`."
        )
