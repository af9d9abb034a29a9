"""The datasets of a run, and the batches that `fit` trains on."""

import dataclasses
import functools
import itertools

from keras_vmoe import data
from keras_vmoe._extras import require
from keras_vmoe.data.pipeline import seed_of_epoch
from keras_vmoe.distribution import _processes
from keras_vmoe.distribution import _replicas
from keras_vmoe.training.config import DataConfig


def with_splits(config, info):
    """Returns a configuration with `validation_share` cut from `train_split`.

    Without a test split, the same images are used for the test.
    """
    reads = config.data
    if reads.validation_share is None:
        return config
    name, test = reads.train_split, reads.test_split
    validates = reads.validation_split != DataConfig.validation_split
    if validates or name not in info.splits:
        raise ValueError(
            "`validation_share` must be taken from a whole split, without "
            "another validation_split. "
            f"Received: validation_share={reads.validation_share}, "
            f"train_split={name!r}, "
            f"validation_split={reads.validation_split!r}. Leave the share "
            f"out, or set train_split to one of {sorted(info.splits)} and "
            f"validation_split to {DataConfig.validation_split!r}."
        )
    size = info.splits[name]
    cut = size - max(1, round(size * reads.validation_share))
    validation = f"{name}[{cut}:]"
    usual = (DataConfig.test_split, DataConfig.validation_split)
    if test in usual and test not in info.splits:
        test = validation
    splits = dataclasses.replace(
        reads,
        train_split=f"{name}[:{cut}]",
        validation_split=validation,
        test_split=test,
        validation_share=None,
    )
    return dataclasses.replace(config, data=splits)


def datasets(config, info):
    """Loads the datasets for training (first epoch), validation and test.

    Each of several processes trains on its share of the images, and reads all
    validation and test images.
    """
    whole = {"training": False, "shard": None}
    one_hot = is_one_hot(config)
    return (
        load(config, info, "train_split", epoch=0),
        load(config, info, "validation_split", one_hot=one_hot, **whole),
        load(config, info, "test_split", **whole),
    )


def load(config, info, split, training=True, **options):
    """Loads one of the run's datasets, or this process's share of it."""
    processes = _processes.num_processes()
    images, seed = config.data, config.seed
    batch_size = images.batch_size
    if processes > 1 and "shard" not in options:
        _replicas.check_batch(batch_size, 1, 1, processes)
        batch_size //= processes
        index = _processes.process_id()
        options["shard"] = (index, processes)
        seed = seed_of_epoch(seed, index)  # Otherwise all would crop alike.
    try:
        return data.load(
            images.dataset,
            getattr(images, split),
            config.image_size,
            batch_size,
            training,
            images.data_dir,
            num_classes=images.num_classes or info.num_classes,
            seed=seed,
            class_weights=images.class_weights if training else None,
            augmentation=images.augmentation,
            skip_corrupt=images.skip_corrupt,
            preprocessing=images.preprocessing,
            **options,
        )
    except ValueError as error:
        if "split" not in str(error):
            raise
        share = "; --validation_share 0.1 takes a tenth of `train_split`"
        share = "" if training else share
        raise ValueError(
            f"{error} (The setting is `{split}`{share}.)"
        ) from error


def check_batches(config, model, strategy):
    """Raises unless each device gets whole groups of images."""
    groups = [x.images_per_group for x in model.moe_layers]
    group = max([1, *(x for x in groups if x != "batch")])
    replicas = _replicas.num_replicas(strategy)
    if replicas == 1:
        return  # One device allows a partial last group.
    processes = _processes.num_processes()
    _replicas.check_batch(config.data.batch_size, group, replicas, processes)


def parts_of(config, length):
    """Returns the steps between checkpoints and the number of checkpoints."""
    parts = config.checkpoint.checkpoints_per_epoch
    if parts > length:
        raise ValueError(
            "An epoch must have at least one step per checkpoint. Received: "
            f"checkpoints_per_epoch={parts} with {length} steps per epoch."
        )
    return length // parts, config.epochs * parts


def batches(config, info, first_step, length):
    """Yields batches of one epoch after another, without end.

    Each epoch of `length` batches is a separate dataset, a function of the seed
    and the epoch's number: it does not depend on earlier reads.
    """
    first_epoch, done = divmod(first_step, length)
    for epoch in itertools.count(first_epoch):
        options = {"epoch": epoch, "one_hot": is_one_hot(config)}
        dataset = load(config, info, "train_split", **options)
        yield from dataset.skip(done).as_numpy_iterator()
        done = 0


def stream(config, info, first_step, example, strategy):
    """Returns the input of `fit`: batches, of static shape on several devices.

    (Keras drops the static shape of a generator's batches. A TPU needs it. So
    do several processes, which would wait forever on a different shape.)
    """
    length = len(example)
    source = functools.partial(batches, config, info, first_step, length)
    if strategy is None:
        return source()
    tf = require("tensorflow", "tensorflow")
    endless = tf.data.experimental.assert_cardinality(
        tf.data.INFINITE_CARDINALITY
    )
    return tf.data.Dataset.from_generator(
        source, output_signature=example.element_spec
    ).apply(endless)


def is_one_hot(config):
    """Whether the labels are distributions over the classes."""
    optimizer, augmentation = config.optimizer, config.data.augmentation
    smoothed = optimizer.label_smoothing > 0
    mixes = augmentation is not None and augmentation.mixes
    return smoothed or optimizer.loss != "ce" or mixes
