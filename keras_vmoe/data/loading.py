"""`load`: from a prepared TFDS dataset to batches for a model.

Axes: B images in the batch, H and W height and width in pixels.
"""

import contextlib
import dataclasses
import operator
import warnings

from keras_vmoe.data.augmentation import Augmentation
from keras_vmoe.data.folders import ImageFolder
from keras_vmoe.data.images import check_image_size
from keras_vmoe.data.integrity import check_files
from keras_vmoe.data.integrity import without_damage
from keras_vmoe.data.pipeline import Pipeline
from keras_vmoe.data.pipeline import seed_of_epoch
from keras_vmoe.data.schema import read_schema
from keras_vmoe.data.schema import resolve_num_classes
from keras_vmoe.data.sources import open_builder
from keras_vmoe.data.tensorflow_runtime import import_tfds

# What TensorFlow raises where an image or a record is damaged, also through a
# generator.
_DATA_ERRORS = ("DataLossError", "InvalidArgumentError", "UnknownError")
# What TFDS raises for splits that it cannot read; AttributeError is for one
# that is no string.
_SPLIT_ERRORS = (
    KeyError,
    ValueError,
    AssertionError,
    AttributeError,
    NotImplementedError,
)


def load(
    name,
    split,
    image_size,
    batch_size,
    training,
    data_dir=None,
    *,
    num_classes=None,
    seed=0,
    epoch=None,
    augmentation=None,
    one_hot=False,
    test_crop=None,
    drop_remainder=None,
    shuffle_buffer=10_000,
    skip_corrupt=False,
    cache=False,
    shard=None,
):
    """Loads an image-classification dataset as batches for a model.

    One pass over the result is one epoch. In training the order and the changes
    differ from epoch to epoch, and a second run with the same seed repeats
    them exactly. (TensorFlow mixes the global seed of `tf.random.set_seed`,
    which `keras.utils.set_random_seed` sets, into both.) With `epoch` the
    result is that epoch and no other, whatever was read before: so a run can
    be resumed. In evaluation the examples come in the order of the files,
    always the same.

    Images become RGB, are resized and normalised as by `preprocess`; read
    there what number types mean. Nothing is downloaded: a dataset has to be
    prepared by TFDS before. Under the JAX and PyTorch backends TensorFlow,
    which does the reading, is kept off the GPUs.

    Args:
        name: String, name of a TFDS dataset, with its config and version if
            wanted: `"cifar10"`, `"name/config"`, `"name:1.0.0"`. `"digits"`
            is embedded in this package and written at first use.
            `"image_folder"` is the folder `data_dir` itself, laid out as
            `data_dir/split/class/image.jpg`.
        split: String, with TFDS's slices and sums, such as `"train[:90%]"` or
            `"train+validation"`.
        image_size: Integer or pair `(height, width)`, in pixels.
        batch_size: Integer B.
        training: Boolean, whether to shuffle, crop and drop.
        data_dir: Folder that holds TFDS datasets. None is TFDS's own
            (`~/tensorflow_datasets`), and for `"digits"` the user's cache
            (`~/.cache/keras_vmoe/datasets`, or under `XDG_CACHE_HOME`).
        num_classes: Integer, labels must lie in `[0, num_classes)`. None takes
            it from the dataset.
        seed: Non-negative integer, seed of the order and of the augmentation.
        epoch: Optional non-negative integer; every pass over the result is then
            this epoch of a training with this seed.
        augmentation: Optional `Augmentation` of the training images.
        one_hot: Boolean, whether labels are one-hot. They always are where the
            augmentation mixes them.
        test_crop: Optional share of the image's shorter side, in (0, 1], that
            the centre crop of evaluation keeps. None resizes the whole image,
            its sides independently.
        drop_remainder: Boolean, whether to drop a last batch that is not
            full. None drops it in training only.
        shuffle_buffer: Integer, number of examples (undecoded, as stored) to
            draw from when shuffling. Files are shuffled as well.
        skip_corrupt: Boolean, whether to skip damaged records and images that
            cannot be decoded, with warnings that name and count them. In
            training other images take the place of the latter. All files are
            read once before. Without it they are an error, and `find_corrupt`
            names them.
        cache: Boolean, whether to keep the stored (not the decoded) examples
            in memory after the first pass over the result; shuffling then
            keeps that pass's order of the files.
        shard: Optional pair `(index, count)`: of `count` hosts with equally
            many examples each, read those of host `index`.

    Returns:
        A `tf.data.Dataset` of `(images, labels)`: float32 `(B, H, W, 3)` in
        [-1, 1], and int32 `(B,)` or float32 `(B, num_classes)`. Its length is
        known.

    Raises:
        ValueError: Something was asked for that does not exist: an unknown or
            unprepared dataset, an unknown split, a dataset without image and
            label, arguments out of range.
        OSError: `data_dir` or a file of the dataset is missing or broken.
        ImportError: The extra `data` is not installed.
        tf.errors.InvalidArgumentError: While reading, a label outside
            `[0, num_classes)` or a pixel outside its type's range.

    Example:

    ```python
    from keras_vmoe import data

    train = data.load("digits", "train", 32, batch_size=64, training=True)
    for images, labels in train.take(1):
        print(images.shape, labels.shape)  # (64, 32, 32, 3) (64,)
    ```
    """
    size = check_image_size(image_size)
    _check_at_least(1, batch_size=batch_size, shuffle_buffer=shuffle_buffer)
    _check_at_least(0, seed=seed, epoch=0 if epoch is None else epoch)
    augmentation = _check_augmentation(augmentation, training)
    _check_test_crop(test_crop)
    drop_remainder = training if drop_remainder is None else drop_remainder

    builder = open_builder(name, data_dir)
    schema = read_schema(name, builder.info)
    num_classes = resolve_num_classes(name, schema, num_classes)
    if skip_corrupt:
        split = _without_damage(name, builder, split)
    if shard is not None:
        split = _shard_of(name, builder, split, shard, training)
    num_examples = _count_examples(name, builder, split)
    if num_examples < (batch_size if drop_remainder else 1):
        raise _no_batch(name, split, num_examples, batch_size)
    if not isinstance(builder, ImageFolder):
        check_files(builder, split, counts=not skip_corrupt)
    pipeline = Pipeline(
        builder=builder,
        schema=schema,
        split=split,
        num_examples=num_examples,
        num_classes=num_classes,
        size=size,
        seed=seed if epoch is None else seed_of_epoch(seed, epoch),
        is_one_epoch=epoch is not None,
        augmentation=augmentation,
        one_hot=one_hot or augmentation.mixes,
        test_crop=None if training else test_crop,
        skip_corrupt=skip_corrupt,
        cache=cache,
    )
    examples = pipeline.examples(training, shuffle_buffer)
    return pipeline.batches(
        examples, batch_size, bool(drop_remainder), fills=training
    )


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
        num_examples=_count_examples(name, builder, split),
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
    decoded = pipeline.decoded(pipeline.examples(False, 1))
    for *_, place, is_good in decoded.as_numpy_iterator():
        if not is_good:
            yield place.decode()


class named_damage(contextlib.AbstractContextManager):  # noqa: N801
    """Context manager that names the image or file where reading fails.

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

    def __init__(self, name, splits, data_dir=None):
        self.name, self.splits, self.data_dir = name, splits, data_dir

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        # By name: wherever TensorFlow raised it, and without importing it.
        if kind is None or kind.__name__ not in _DATA_ERRORS:
            return
        for split in self.splits:
            for place in find_corrupt(self.name, split, self.data_dir):
                raise OSError(
                    "All images must be readable. "
                    f"Received: {place}, which is damaged, in the split "
                    f"{split!r} of {self.name!r}. Mend or remove it, or skip "
                    "what is damaged: skip_corrupt=True, --skip_corrupt true."
                ) from error


def _without_damage(name, builder, split):
    """The split without damaged records; warns of these."""
    _count_examples(name, builder, split)  # That it exists.
    if isinstance(builder, ImageFolder):
        return split
    split, places = without_damage(builder, split)
    if places:
        named = [f"record {record} of {path}" for path, record in places[:5]]
        warnings.warn(
            f"{len(places)} damaged records are skipped, such as "
            f"{', '.join(named)}.",
            stacklevel=3,
        )
    return split


def _shard_of(name, builder, split, shard, training):
    """The part of a split that one of several hosts reads."""
    try:
        index, count = map(operator.index, shard)
        good = 0 <= index < count
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(
            "`shard` must be a pair (index, count) of integers with 0 <= index "
            f"< count. Received: shard={shard!r}. Pass for example "
            "(jax.process_index(), jax.process_count())."
        )
    _count_examples(name, builder, split)  # That it exists.
    parts = import_tfds().even_splits(split, count, drop_remainder=training)
    return parts[index]


def _check_augmentation(augmentation, training):
    """The augmentation of the training images, nothing in evaluation."""
    if augmentation is not None and not isinstance(augmentation, Augmentation):
        raise ValueError(
            "`augmentation` must be an Augmentation or None. "
            f"Received: augmentation={augmentation!r}. "
            "Write data.Augmentation(flip=True)."
        )
    return augmentation if augmentation and training else Augmentation()


def _check_test_crop(test_crop):
    good = isinstance(test_crop, (int, float)) and 0 < test_crop <= 1
    if test_crop is not None and not good:
        raise ValueError(
            "`test_crop` must be a share in (0, 1] or None. "
            f"Received: test_crop={test_crop!r}. ConvNeXt has 0.875."
        )


def _count_examples(name, builder, split):
    splits = builder.info.splits
    try:
        if isinstance(builder, ImageFolder):
            return builder.num_examples(split)
        return splits[split].num_examples
    except _SPLIT_ERRORS as error:
        raise ValueError(
            f"`split` must be made of the splits {sorted(splits)}, with "
            'slices and sums such as "train[:90%]" or "train+test". '
            f"Received: split={split!r} of name={name!r}. "
            "Choose one of these splits."
        ) from error


def _no_batch(name, split, num_examples, batch_size):
    return ValueError(
        "A split must hold at least one batch; in training, or with "
        "drop_remainder=True, a full one. "
        f"Received: split={split!r} of name={name!r} with {num_examples} "
        f"examples, batch_size={batch_size}. "
        "Choose a larger split or a smaller batch_size."
    )


def _check_at_least(lowest, **arguments):
    for name, value in arguments.items():
        try:
            is_valid = operator.index(value) >= lowest
        except TypeError:
            is_valid = False
        if not is_valid:
            raise ValueError(
                f"`{name}` must be an integer of at least {lowest}. "
                f"Received: {name}={value!r}. Pass for example {name}=64."
            )
