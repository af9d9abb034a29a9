"""`load`: from a prepared TFDS dataset to batches for a model.

Axes: B images in the batch, H and W height and width in pixels.
"""

import contextlib
import functools
import operator
import os
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import Any
from typing import TypeAlias

import keras
import numpy as np

from keras_vmoe._checks import check_sizes
from keras_vmoe._preprocessing import Preprocessing
from keras_vmoe._warnings import warn
from keras_vmoe.data import batch_changes
from keras_vmoe.data._corruption import check_files
from keras_vmoe.data._corruption import skip_corrupt_records
from keras_vmoe.data.augmentation import Augmentation
from keras_vmoe.data.folders import ImageFolder
from keras_vmoe.data.images import check_image_size
from keras_vmoe.data.pipeline import Pipeline
from keras_vmoe.data.pipeline import seed_of_epoch
from keras_vmoe.data.schema import count_examples
from keras_vmoe.data.schema import read_schema
from keras_vmoe.data.schema import resolve_num_classes
from keras_vmoe.data.sources import open_builder
from keras_vmoe.data.tensorflow_runtime import tf
from keras_vmoe.data.tensorflow_runtime import tfds

if TYPE_CHECKING:
    import tensorflow

Changes: TypeAlias = Augmentation | keras.layers.Layer | Callable[..., Any]
ENDS = 16  # Examples to compare at each end of a split.


def load(
    name: str,
    split: str,
    image_size: int | Sequence[int],
    batch_size: int,
    training: bool,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    num_classes: int | None = None,
    seed: int = 0,
    epoch: int | None = None,
    class_weights: Sequence[float] | np.ndarray | None = None,
    augmentation: Changes | Sequence[Changes] | None = None,
    one_hot: bool = False,
    test_crop: float | None = None,
    drop_remainder: bool | None = None,
    shuffle_buffer: int = 10_000,
    skip_corrupt: bool = False,
    cache: bool = False,
    shard: tuple[int, int] | None = None,
    channels: int | None = None,
    exif_orientation: bool | None = None,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
    label: str | None = None,
) -> "tensorflow.data.Dataset":
    """Loads an image-classification dataset as batches for a model.

    One pass is one epoch. In training, order and augmentation differ from epoch
    to epoch. A second run with the same seed, and the same
    `keras.utils.set_random_seed`, repeats them. In evaluation, examples come in
    file order (in a folder of images, the classes take turns, so every slice
    has its share). Images are resized and normalized as in `preprocess`.
    Nothing is downloaded. See docs/data.md.

    Args:
        name: String, a TFDS dataset: `"cifar10"`, `"name/config"` or
            `"name:1.0.0"`; `"digits"`, embedded in this package; or
            `"image_folder"`: `data_dir/split/class/image.jpg`, or
            `data_dir/class/image.jpg` with the single split `"train"`.
        split: String, with TFDS's slices and sums, such as `"train[:90%]"`.
        image_size: Integer or pair `(height, width)`, in pixels.
        batch_size: Integer B.
        training: Boolean, whether to shuffle, augment and drop.
        data_dir: Folder of TFDS datasets. None means TFDS's default, and for
            `"digits"` the user's cache.
        num_classes: Integer, labels must lie in `[0, num_classes)`. None takes
            it from the dataset.
        seed: Integer of at least 0, seed of the order and the augmentation.
        epoch: Optional integer of at least 0: every pass is this epoch of
            training with this seed, so a run can be resumed.
        class_weights: Optional positive number per class: how often its images
            are drawn in training, relative to others. An epoch keeps its
            length.
        augmentation: Changes of training images: an `Augmentation`, whose
            epochs can be repeated; an image augmentation layer of
            `keras_cv.layers` or `keras.layers`; a function from images
            `(B, H, W, channels)` in [0, 255] and labels to both; or a list of
            these, an `Augmentation` first. See docs/data.md.
        one_hot: Boolean, whether labels are one-hot; mixed labels always are.
        test_crop: Optional share of the shorter side, in (0, 1], that the
            center crop of evaluation keeps; None takes `preprocessing`'s.
        drop_remainder: Boolean, whether to drop a partial last batch. None
            drops it in training only.
        shuffle_buffer: Integer, number of stored examples to draw from.
        skip_corrupt: Boolean, whether to skip corrupt records and images, with
            warnings. All files are read once beforehand.
        cache: Boolean, whether to cache the stored examples in memory.
        shard: Optional pair `(index, count)`: reads the share of host `index`
            of `count`.
        channels: Integer, channels of the images; None takes
            `preprocessing`'s.
        exif_orientation: Boolean, whether to turn images upright; None takes
            `preprocessing`'s.
        preprocessing: A `Preprocessing`, such as `model.preprocessing`. None
            means the default, to [-1, 1].
        label: Key of the labels among the features of the dataset, such as
            CIFAR-100's `"coarse_label"`; None takes its `supervised_keys`, or
            `"label"`.

    Returns:
        A `tf.data.Dataset` of `(images, labels)`: float32
        `(B, H, W, channels)`, and int32 `(B,)` or float32 `(B, num_classes)`.
        A model with another mean, standard deviation or orientation rejects it,
        unless it has since been mapped, batched or cut.

    Raises:
        ValueError: An unknown or unprepared dataset or split, a dataset without
            image and label, arguments out of range.
        OSError: `data_dir` or a file of the dataset is missing or corrupt.
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
    check_sizes(batch_size=batch_size, shuffle_buffer=shuffle_buffer)
    check_sizes(0, seed=seed, epoch=0 if epoch is None else epoch)
    wanted = Preprocessing.of(
        preprocessing,
        test_crop=test_crop,
        channels=channels,
        exif_orientation=exif_orientation,
    )
    if drop_remainder is None:
        drop_remainder = training
    builder = open_builder(name, data_dir)
    schema = read_schema(name, builder.info, label)
    num_classes = resolve_num_classes(name, schema, num_classes)
    shape = (*size, wanted.channels)
    pipeline = Pipeline(
        builder=builder,
        schema=schema,
        num_classes=num_classes,
        size=size,
        preprocessing=wanted,
        seed=seed if epoch is None else seed_of_epoch(seed, epoch),
        is_one_epoch=epoch is not None,
        class_weights=_check_weights(class_weights, num_classes, training),
        is_training=training,
        skip_corrupt=skip_corrupt,
        cache=cache,
        # Before files are read.
        **_changes(augmentation, training, shape, num_classes, one_hot),
        **_part_of(
            name,
            builder,
            split,
            shard,
            training,
            skip_corrupt,
            least=batch_size if drop_remainder else 1,
        ),
    )
    _check_order(builder, split, schema.label)
    examples = pipeline.examples(shuffle_buffer)
    dataset = pipeline.batches(examples, batch_size, bool(drop_remainder))
    # For `fit`, `evaluate` and `predict` of a model.
    dataset.preprocessing = wanted
    return dataset


def _changes(augmentation, training, shape, num_classes, one_hot):
    """What is done to images of a shape, and whether labels are one-hot."""
    ours, batch_change = batch_changes.split(augmentation)
    ours.check_channels(shape[-1])
    if not training:
        ours, batch_change = Augmentation(), None
    one_hot = one_hot or ours.mixes
    if batch_change is not None:
        one_hot = one_hot or batch_change.mixes
        batch_change.try_out(shape, num_classes, one_hot)
    return {
        "augmentation": ours,
        "batch_change": batch_change,
        "one_hot": one_hot,
    }


def _part_of(name, builder, split, shard, training, skip_corrupt, least):
    """The part of a split to read, and its number of examples."""
    count_examples(name, builder, split)  # Raises if it does not exist.
    if skip_corrupt:
        split = skip_corrupt_records(builder, split)
    if shard is not None:
        split = _shard_of(split, shard, training)
    num_examples = count_examples(name, builder, split)
    if num_examples < least:
        raise ValueError(
            "A split must hold at least one batch; in training, or with "
            "drop_remainder=True, a full one. "
            f"Received: split={split!r} of name={name!r} with {num_examples} "
            f"of at least {least} examples. "
            "Choose a larger split or a smaller batch_size."
        )
    check_files(builder, split, counts=not skip_corrupt)
    return {"split": split, "num_examples": num_examples}


def _check_order(builder, split, label):
    """Warns if slices are taken from a split stored class by class."""
    splits = builder.info.splits
    parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(splits)
    for part in parts:
        size = splits[part.splitname].num_examples
        is_slice = (part.from_ or 0, part.to or size) != (0, size)
        # We order folders and the embedded digits ourselves.
        ours = isinstance(builder, ImageFolder) or builder.name == "digits"
        if is_slice and size >= 2 * ENDS and not ours:
            _check_ends(builder.data_path, part.splitname, label)


@functools.cache
def _check_ends(folder, split, label):
    """Warns if each end of a split has one class only; reads them once."""
    labels = tfds.builder_from_directory(folder).as_dataset(
        f"{split}[:{ENDS}]+{split}[-{ENDS}:]",
        read_config=tfds.ReadConfig(
            interleave_cycle_length=1,
            enable_ordering_guard=False,
            try_autocache=False,
        ),
        decoders=tfds.decode.PartialDecoding({label: True}),
    )
    # Unreadable records raise later, when they are actually used.
    with contextlib.suppress(tf.errors.OpError):
        labels = [int(x[label]) for x in labels.as_numpy_iterator()]
        first, last = set(labels[:ENDS]), set(labels[ENDS:])
        if len(first) == len(last) == 1 and first != last:
            warn(
                "A dataset whose splits are sliced must not be stored class "
                f"by class: its slices are of other classes. Received: "
                f"split={split!r} in {folder}, whose first {ENDS} examples are "
                f"of class {first.pop()} and last {ENDS} of class "
                f"{last.pop()}. Take whole splits, or prepare it with its "
                "examples shuffled (TFDS: disable_shuffling=False)."
            )


def _shard_of(split, shard, training):
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
    parts = tfds.even_splits(split, count, drop_remainder=training)
    return parts[index]


def _check_weights(weights, num_classes, training):
    """The class weights in training, None in evaluation."""
    if weights is None:
        return None
    try:
        weights = np.array(weights, "float32")
        good = weights.shape == (num_classes,)
        good = good and np.isfinite(weights).all() and (weights > 0).all()
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(
            f"`class_weights` must be {num_classes} positive numbers, one for "
            f"each class. Received: class_weights={weights!r}."
        )
    return weights if training else None
