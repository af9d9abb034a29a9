"""Images, labels, classes and splits of a dataset."""

import dataclasses
import operator
import os

from keras_vmoe._checks import nearest
from keras_vmoe.data.folders import ImageFolder
from keras_vmoe.data.sources import open_builder
from keras_vmoe.data.tensorflow_runtime import tfds


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """Facts about a dataset that are known before its images are read.

    Attributes:
        name: String, as given to `info` and `load`.
        num_classes: Integer, or None if the dataset does not define it.
        class_names: Tuple of strings, one per class; empty without classes.
        splits: Dictionary of split name to number of examples.
        image_shape: `(H, W, channels)` as stored, in pixels. Sides that vary
            between images are None.
        files: For a folder of images, the numbers of files taken and left out
            by kind, as text.
    """

    name: str
    num_classes: int | None
    class_names: tuple[str, ...]
    splits: dict[str, int]
    image_shape: tuple[int | None, ...]
    files: str | None = None


@dataclasses.dataclass(frozen=True)
class Schema:
    """Where a dataset keeps what image classification needs."""

    image: str  # Key of the feature.
    label: str  # Key of the feature.
    channels: int
    is_encoded: bool  # Whether images are stored as PNG or JPEG.
    num_classes: int | None  # None if the dataset does not define it.


def info(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    label: str | None = None,
) -> DatasetInfo:
    """Describes a dataset: classes, splits and stored image shape.

    Args:
        name: String, see `load`.
        data_dir: Folder that holds the dataset, see `load`.
        label: Key of the labels, see `load`.

    Returns:
        A `DatasetInfo`.

    Raises:
        ValueError: The dataset is unknown or not prepared, or has no image
            and label.
        OSError: `data_dir` or the dataset in it cannot be read.

    Example:

    ```python
    from keras_vmoe import data

    data.info("digits").splits  # {"train": 1254, "validation": 179, ...}
    ```
    """
    builder = open_builder(name, data_dir)
    tfds_info = builder.info
    schema = read_schema(name, tfds_info, label)
    classes = tfds_info.features[schema.label]
    return DatasetInfo(
        name=name,
        num_classes=schema.num_classes,
        class_names=tuple(classes.names) if schema.num_classes else (),
        splits={k: s.num_examples for k, s in tfds_info.splits.items()},
        image_shape=tuple(tfds_info.features[schema.image].shape),
        files=getattr(builder, "counts", None),
    )


def read_schema(name, tfds_info, label=None):
    """Finds the image and label of a dataset, or raises a ValueError."""
    features = dict(getattr(tfds_info.features, "items", dict)())
    for image, key in _candidate_keys(tfds_info.supervised_keys):
        key = key if label is None else label
        if _is_image(features.get(image)) and _is_label(features.get(key)):
            return Schema(
                image=image,
                label=key,
                channels=features[image].shape[-1],
                is_encoded=isinstance(features[image], tfds.features.Image),
                num_classes=getattr(features[key], "num_classes", None),
            )
    words = "" if label is None else f", label={label!r}"
    raise ValueError(
        "A dataset for image classification must have an image (H, W, "
        "channels) and an integer label, as its `supervised_keys` or under "
        'the keys "image" and "label". '
        f"Received: name={name!r} with features {sorted(features)}{words}. "
        "Prepare it with such features."
    )


def _candidate_keys(supervised_keys):
    candidates = [("image", "label")]
    is_pair = isinstance(supervised_keys, (tuple, list))
    if is_pair and [type(key) for key in supervised_keys] == [str, str]:
        candidates.insert(0, tuple(supervised_keys))
    return candidates


def _is_image(feature):
    features = tfds.features
    return (
        isinstance(feature, (features.Image, features.Tensor))
        and len(feature.shape) == 3
        and feature.shape[-1] is not None
    )


def _is_label(feature):
    features = tfds.features
    return isinstance(feature, features.ClassLabel) or (
        isinstance(feature, features.Tensor)
        and feature.shape == ()
        and feature.tf_dtype.is_integer
    )


def resolve_num_classes(name, schema, num_classes):
    """Returns the number of classes: the caller's, else the dataset's."""
    known = schema.num_classes
    if num_classes is None and known is None:
        raise ValueError(
            "`num_classes` must be given for a dataset that does not name its "
            f"classes. Received: num_classes=None with name={name!r}. "
            "Pass num_classes, one more than the highest label."
        )
    num_classes = operator.index(known if num_classes is None else num_classes)
    if num_classes < (known or 1):
        raise ValueError(
            "`num_classes` must be at least the number of classes of the "
            f"dataset, {known or 1}. "
            f"Received: num_classes={num_classes} with name={name!r}. "
            "Leave it out to take the dataset's own."
        )
    return num_classes


def num_images(name, split, data_dir=None):
    """Returns the number of images in a split, corrupt ones included."""
    return count_examples(name, open_builder(name, data_dir), split)


def _sizes(splits):
    """Names of splits and their numbers of images."""
    sizes = {k: getattr(splits[k], "num_examples", splits[k]) for k in splits}
    return ", ".join(f"{name} ({size})" for name, size in sorted(sizes.items()))


def count_examples(name, builder, split):
    """Returns the size of a split; raises a ValueError if it does not exist."""
    splits = builder.info.splits
    try:
        if isinstance(builder, ImageFolder):
            return builder.num_examples(split)
        return splits[split].num_examples
    except (  # AttributeError if it is not a string.
        *(AssertionError, AttributeError, LookupError, ValueError),
        NotImplementedError,
    ) as error:
        raise ValueError(
            f"`split` must be made of the splits {_sizes(splits)}, with slices "
            'and sums such as "train[:90%]" or "train+test". '
            f"Received: split={split!r} of name={name!r}."
            f"{nearest(split, splits)}"
        ) from error


def read_values(name, split, key, data_dir=None):
    """Returns the values of one feature in evaluation order.

    Args:
        name: String, see `load`.
        split: String, see `load`.
        key: Key of a feature that is not the image.
        data_dir: Folder that holds the dataset, see `load`.

    Returns:
        List of NumPy arrays, one per example.
    """
    read = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
    read.enable_ordering_guard = False
    values = open_builder(name, data_dir).as_dataset(
        split,
        read_config=read,
        decoders=tfds.decode.PartialDecoding({key: True}),
    )
    return [x[key] for x in values.as_numpy_iterator()]
