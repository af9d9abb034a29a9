"""`load`: from a prepared TFDS dataset to batches for a model.

Axes: B images in the batch, H and W height and width in pixels.
"""

import contextlib
import logging
import operator

from keras_vmoe.data.images import check_image_size
from keras_vmoe.data.images import normalize
from keras_vmoe.data.images import random_crop
from keras_vmoe.data.images import to_rgb
from keras_vmoe.data.integrity import check_files
from keras_vmoe.data.schema import read_schema
from keras_vmoe.data.schema import resolve_num_classes
from keras_vmoe.data.sources import open_builder
from keras_vmoe.data.tensorflow_runtime import checked
from keras_vmoe.data.tensorflow_runtime import import_tensorflow
from keras_vmoe.data.tensorflow_runtime import import_tfds

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
    random_crop_padding=0,
    drop_remainder=None,
    shuffle_buffer=10_000,
):
    """Loads an image-classification dataset as batches for a model.

    One pass over the result is one epoch. In training the order and the crops
    differ from epoch to epoch, and a second run with the same seed repeats
    them exactly. (TensorFlow mixes the global seed of `tf.random.set_seed`,
    which `keras.utils.set_random_seed` sets, into both.) In evaluation the
    examples come in the order of the files, always the same.

    Images become RGB, are resized and normalised as by `preprocess`; read
    there what number types mean. Nothing is downloaded: a dataset has to be
    prepared by TFDS before. Under the JAX and PyTorch backends TensorFlow,
    which does the reading, is kept off the GPUs.

    Args:
        name: String, name of a TFDS dataset, with its config and version if
            wanted: `"cifar10"`, `"name/config"`, `"name:1.0.0"`. `"digits"`
            is embedded in this package and written at first use.
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
        seed: Non-negative integer, seed of the order and of the crops.
        random_crop_padding: Integer, in training images are padded with that
            many black pixels per side, then cropped at random to their size.
        drop_remainder: Boolean, whether to drop a last batch that is not
            full. None drops it in training only.
        shuffle_buffer: Integer, number of examples (undecoded, as stored) to
            draw from when shuffling. Files are shuffled as well.

    Returns:
        A `tf.data.Dataset` of `(images, labels)`: float32 `(B, H, W, 3)` in
        [-1, 1] and int32 `(B,)`. Its length is known.

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
    tf = import_tensorflow()
    size = check_image_size(image_size)
    _check_at_least(1, batch_size=batch_size, shuffle_buffer=shuffle_buffer)
    _check_at_least(0, random_crop_padding=random_crop_padding, seed=seed)
    drop_remainder = training if drop_remainder is None else drop_remainder

    builder = open_builder(name, data_dir)
    schema = read_schema(name, builder.info)
    num_classes = resolve_num_classes(name, schema, num_classes)
    num_examples = _count_examples(name, builder, split)
    if num_examples < (batch_size if drop_remainder else 1):
        raise _no_batch(name, split, num_examples, batch_size)
    check_files(builder, split)

    dataset = _read(builder, schema, split, seed if training else None)
    if training:
        buffer = min(shuffle_buffer, num_examples)
        dataset = dataset.shuffle(buffer, seed, reshuffle_each_iteration=True)
    dataset = dataset.map(_decoder(builder, schema, size), tf.data.AUTOTUNE)
    if training and random_crop_padding:
        dataset = _with_random_crops(dataset, random_crop_padding, seed)
    dataset = dataset.batch(batch_size, drop_remainder=bool(drop_remainder))
    finish = _finisher(name, num_classes)
    dataset = dataset.map(finish, tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)
    options = tf.data.Options()
    options.deterministic = True
    return dataset.with_options(options)


def _read(builder, schema, split, shuffle_seed):
    """Reads examples whose images are still as stored, mostly compressed.

    Decoding comes after the shuffle, whose buffer would otherwise hold
    decoded photographs (5 GB of them for ImageNet).
    """
    tfds = import_tfds()
    shuffles = shuffle_seed is not None
    config = tfds.ReadConfig(
        shuffle_seed=shuffle_seed,
        shuffle_reshuffle_each_iteration=shuffles,
        # TFDS's default of 16 would mix the order of the files.
        interleave_cycle_length=16 if shuffles else 1,
        enable_ordering_guard=False,
        try_autocache=False,
        skip_prefetch=True,
    )
    skip = {schema.image: tfds.decode.SkipDecoding()}
    with _without_tfds_warnings():
        return builder.as_dataset(
            split,
            shuffle_files=shuffles,
            read_config=config,
            decoders=tfds.decode.PartialDecoding(
                {schema.image: True, schema.label: True},
                decoders=skip if schema.is_encoded else None,
            ),
        )


@contextlib.contextmanager
def _without_tfds_warnings():
    """Keeps back what TFDS has to say about things done on purpose.

    It warns that an ordered dataset is shuffled, and blames its own use of a
    deprecated property on the user.
    """

    def keeps(record):
        text = record.getMessage()
        return "FeatureConnector" not in text and "ordered" not in text

    logger = logging.getLogger("absl")
    logger.addFilter(keeps)
    try:
        yield
    finally:
        logger.removeFilter(keeps)


def _decoder(builder, schema, size):
    """Returns the function from a stored example to RGB pixels and label."""
    tf = import_tensorflow()
    feature = builder.info.features[schema.image]

    def decode(example):
        image = example[schema.image]
        if schema.is_encoded:
            image = feature.decode_example(image)
        return to_rgb(image, size), tf.cast(example[schema.label], tf.int64)

    return decode


def _finisher(name, num_classes):
    """Returns the function from a batch of pixels to a batch for the model."""
    tf = import_tensorflow()
    message = (
        f"Labels must lie in [0, {num_classes}). "
        "Received: label={shown} "
        f"with num_classes={num_classes} in the dataset {name}. "
        "Pass the true num_classes, or prepare the dataset with right labels."
    )

    # By the batch, because one by one small operations cost as much as
    # decoding a small image.
    def finish(images, labels):
        is_wrong = (labels < 0) | (labels >= num_classes)
        is_right = tf.logical_not(tf.reduce_any(is_wrong))
        first_wrong = tf.gather(labels, tf.argmax(tf.cast(is_wrong, tf.int32)))
        labels = checked(labels, is_right, message, first_wrong)
        return normalize(images), tf.cast(labels, tf.int32)

    return finish


def _with_random_crops(dataset, padding, seed):
    """Crops each image at random; which crop does not depend on threads."""
    tf = import_tensorflow()
    # One number per example: a function of the seed, the example's place in
    # the epoch, and how many epochs went before.
    numbers = tf.data.Dataset.random(seed, rerandomize_each_iteration=True)

    def crop(example, number):
        image, label = example
        return random_crop(image, padding, [number, seed]), label

    return tf.data.Dataset.zip(dataset, numbers).map(
        crop, num_parallel_calls=tf.data.AUTOTUNE
    )


def _count_examples(name, builder, split):
    splits = builder.info.splits
    try:
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
