"""`load`: from a prepared TFDS dataset to batches for a model.

Axes: B images in the batch, H and W height and width in pixels.
"""

import operator

import numpy as np

from keras_vmoe.data.augmentation import Augmentation
from keras_vmoe.data.damage import skip_damage
from keras_vmoe.data.folders import ImageFolder
from keras_vmoe.data.images import check_image_size
from keras_vmoe.data.integrity import check_files
from keras_vmoe.data.pipeline import Pipeline
from keras_vmoe.data.pipeline import seed_of_epoch
from keras_vmoe.data.schema import count_examples
from keras_vmoe.data.schema import read_schema
from keras_vmoe.data.schema import resolve_num_classes
from keras_vmoe.data.sources import open_builder
from keras_vmoe.data.tensorflow_runtime import import_tfds


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
    class_weights=None,
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
        class_weights: Optional positive number for each class: how often its
            images are drawn in training, against those of other classes. An
            epoch keeps its length: it goes through the images until it is
            full.
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
        shard: Optional pair `(index, count)`: read the examples of host
            `index` of `count`; each has equally many in training, and at most
            one more or less in evaluation.

    Returns:
        A `tf.data.Dataset` of `(images, labels)`: float32 `(B, H, W, 3)` in
        [-1, 1], and int32 `(B,)` or float32 `(B, num_classes)`. Its length is
        known but in evaluation with `skip_corrupt`.

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
    class_weights = _check_weights(class_weights, num_classes, training)
    num_examples = count_examples(name, builder, split)
    if skip_corrupt:
        split = skip_damage(builder, split)
    if shard is not None:
        split = _shard_of(split, shard, training)
    if skip_corrupt or shard is not None:
        num_examples = count_examples(name, builder, split)
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
        class_weights=class_weights,
        augmentation=augmentation,
        one_hot=one_hot or augmentation.mixes,
        test_crop=None if training else test_crop,
        is_training=training,
        skip_corrupt=skip_corrupt,
        cache=cache,
    )
    examples = pipeline.examples(shuffle_buffer)
    return pipeline.batches(examples, batch_size, bool(drop_remainder))


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


def _check_weights(weights, num_classes, training):
    """The weights of the classes in training, nothing in evaluation."""
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
            f"each class. Received: class_weights={weights!r}. Those of weight "
            "2 are drawn twice as often as images of weight 1."
        )
    return weights if training else None


def _check_test_crop(test_crop):
    good = isinstance(test_crop, (int, float)) and 0 < test_crop <= 1
    if test_crop is not None and not good:
        raise ValueError(
            "`test_crop` must be a share in (0, 1] or None. "
            f"Received: test_crop={test_crop!r}. ConvNeXt has 0.875."
        )


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
