"""The data of a run: images, batches and preprocessing."""

import dataclasses
from typing import Any
from typing import Literal

from keras_vmoe.data import Augmentation
from keras_vmoe.data import Preprocessing
from keras_vmoe.training import typed


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Images and batches.

    Attributes:
        dataset: TFDS name, digits or image_folder.
        data_dir: Folder of the dataset or images.
        train_split: TFDS split, such as train[:90%].
        validation_split: Evaluated after each epoch.
        validation_share: Take this share of train_split instead.
        test_split: Evaluated once, at the end.
        num_classes: If the dataset does not define it.
        channels: Of images; default: init's, or 3.
        mean: Of pixels; default: init's, or 127.5.
        std: Of pixels; default: init's, or 127.5.
        interpolation: Of resizing; default: init's.
        batch_size: Images per training step.
        augmentation: See --augmentation.help.
        test_crop: Share of the side kept by a center crop.
        class_weights: Sampling weight of each class.
        skip_corrupt: Skip corrupt images, with a warning.
        exif_orientation: Turn photographs upright.
    """

    dataset: str = "digits"
    data_dir: str | None = None
    train_split: str = "train"
    validation_split: str = "validation"
    validation_share: float | None = None
    test_split: str = "test"
    num_classes: int | None = None
    channels: int | None = None
    mean: float | tuple[float, ...] | None = None
    std: float | tuple[float, ...] | None = None
    interpolation: Literal["bilinear", "bicubic"] | None = None
    batch_size: int = 64
    augmentation: Augmentation | None = Augmentation(crop_padding=3)
    test_crop: float | None = None
    class_weights: tuple[float, ...] | None = None
    skip_corrupt: bool = False
    exif_orientation: bool = True

    def __post_init__(self) -> None:
        typed.check_types(self, "data.")
        typed.check_positive(self, "test_crop", "validation_share")
        good = (self.test_crop or 1) <= 1
        typed.check_value(good, self, "test_crop", "at most 1")
        good = (self.validation_share or 0) < 1
        typed.check_value(good, self, "validation_share", "below 1")
        Preprocessing.of(None, **self.preprocessing)  # Raises if invalid.

    @property
    def preprocessing(self) -> dict[str, Any]:
        """The attributes of the model's `Preprocessing` that are set."""
        names = (field.name for field in dataclasses.fields(Preprocessing))
        found = {name: getattr(self, name) for name in names}
        return {name: x for name, x in found.items() if x is not None}
