"""Damaged records and images: found, named, left out."""

import contextlib
import dataclasses
import warnings

from keras_vmoe.data.augmentation import Augmentation
from keras_vmoe.data.folders import ImageFolder
from keras_vmoe.data.integrity import without_damage
from keras_vmoe.data.pipeline import Pipeline
from keras_vmoe.data.schema import count_examples
from keras_vmoe.data.schema import read_schema
from keras_vmoe.data.sources import open_builder

# What TensorFlow raises where an image or a record is damaged, also through a
# generator.
_DATA_ERRORS = ("DataLossError", "InvalidArgumentError", "UnknownError")


def find_corrupt(name, split, data_dir=None):
    """Finds images that cannot be decoded and damaged files.

    Reads and decodes all of a split, as fast as training does.

    Args:
        name: String, see `load`.
        split: String, see `load`.
        data_dir: Folder that holds the dataset, see `load`.

    Yields:
        Strings, the place of each: path of the image, or file and number of the
        record.

    Raises:
        ValueError: If there is no such dataset or split.

    Example:

    ```python
    from keras_vmoe import data

    list(data.find_corrupt("digits", "test"))  # []
    ```
    """
    builder = open_builder(name, data_dir)
    schema = read_schema(name, builder.info)
    pipeline = Pipeline(
        builder=builder,
        schema=schema,
        split=split,
        num_examples=count_examples(name, builder, split),
        num_classes=schema.num_classes or 1,
        size=(8, 8),
        seed=0,
        is_one_epoch=True,
        augmentation=Augmentation(),
        one_hot=False,
        test_crop=None,
        skip_corrupt=True,
    )
    if not isinstance(builder, ImageFolder):
        split, places = without_damage(builder, split)
        for path, record in places:
            yield f"{path}, record {record}"
        pipeline = dataclasses.replace(pipeline, split=split)
    decoded = pipeline.decoded(pipeline.examples())
    for *_, place, is_good in decoded.as_numpy_iterator():
        if not is_good:
            yield place.decode()


@contextlib.contextmanager
def named_damage(name, splits, data_dir=None):
    """Names the image or the file where reading fails inside of a `with`.

    Args:
        name: String, see `load`.
        splits: The splits that are read inside.
        data_dir: Folder that holds the dataset, see `load`.

    Raises:
        OSError: In the place of TensorFlow's error, if there is damage.

    Example:

    ```python
    from keras_vmoe import data

    test = data.load("digits", "test", 32, 64, training=False)
    with data.named_damage("digits", ["test"]):
        for images, labels in test:
            pass
    ```
    """
    try:
        yield
    except Exception as error:
        # By name: wherever TensorFlow raised it, and without importing it.
        if type(error).__name__ not in _DATA_ERRORS:
            raise
        for split in splits:
            for place in find_corrupt(name, split, data_dir):
                raise OSError(
                    "All images must be readable. "
                    f"Received: {place}, which is damaged, in the split "
                    f"{split!r} of {name!r}. Mend or remove it, or skip what "
                    "is damaged: skip_corrupt=True, --skip_corrupt."
                ) from error
        raise


def skip_damage(builder, split):
    """Leaves damaged records out of a split, and warns of these.

    Args:
        builder: What `open_builder` returns.
        split: String, a split that exists.

    Returns:
        The split without them.
    """
    if isinstance(builder, ImageFolder):
        return split  # Its images are skipped one by one.
    split, places = without_damage(builder, split)
    if places:
        named = [f"record {record} of {path}" for path, record in places[:5]]
        warnings.warn(
            f"{len(places)} damaged records are skipped, such as "
            f"{', '.join(named)}.",
            stacklevel=3,
        )
    return split
