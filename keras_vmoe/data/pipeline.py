"""The stages between a prepared dataset and batches for a model.

Read, cache, shuffle, repeat, decode, crop and change, batch, check, mix,
normalize.
"""

import contextlib
import dataclasses
import functools
import logging
from typing import Any

import numpy as np

from keras_vmoe._preprocessing import Preprocessing
from keras_vmoe._warnings import warn
from keras_vmoe.data.augmentation import Augmentation
from keras_vmoe.data.augmentation import make_change
from keras_vmoe.data.augmentation import make_mix
from keras_vmoe.data.folders import ImageFolder
from keras_vmoe.data.images import center_crop
from keras_vmoe.data.images import decode_and_crop
from keras_vmoe.data.images import decoder_of
from keras_vmoe.data.images import named_if_none
from keras_vmoe.data.images import random_crop
from keras_vmoe.data.images import to_channels
from keras_vmoe.data.orientation import upright
from keras_vmoe.data.schema import Schema
from keras_vmoe.data.tensorflow_runtime import checked
from keras_vmoe.data.tensorflow_runtime import tf
from keras_vmoe.data.tensorflow_runtime import tfds

STRIDE = 15_485_863  # A prime.


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The settings of all stages; see the arguments of `data.load`."""

    builder: Any
    schema: Schema
    split: str
    num_examples: int
    num_classes: int
    size: tuple[int, int]
    preprocessing: Preprocessing
    seed: int = 0
    is_one_epoch: bool = True
    augmentation: Augmentation = Augmentation()
    batch_change: Any = None
    one_hot: bool = False
    is_training: bool = False
    class_weights: Any = None
    skip_corrupt: bool = False
    cache: bool = False

    def examples(self, shuffle_buffer=1):
        """Returns stored examples with random numbers: `(example, number)`.

        In training they are shuffled, and repeated if augmentation is.
        """
        dataset = self._read()
        if self.cache:
            dataset = dataset.cache()
        repeats = self.augmentation.repeats
        if repeats > 1:
            dataset = self._every_nth(dataset, repeats)
        if self.is_training:
            dataset = dataset.shuffle(
                min(shuffle_buffer, self.num_examples),
                self.seed,
                reshuffle_each_iteration=not self.is_one_epoch,
            )
        if self._decodes_once:
            dataset = dataset.map(self._with_pixels, tf.data.AUTOTUNE)
        if repeats > 1:
            dataset = dataset.flat_map(
                lambda x: tf.data.Dataset.from_tensors(x).repeat(repeats)
            )
            dataset = _cut(dataset, self.num_examples)
        # A function of the seed, the epoch and the example's position in it, so
        # crops do not depend on threads.
        numbers = self._numbers()
        if self.class_weights is None:
            return tf.data.Dataset.zip(dataset, numbers)
        # Each pass within an epoch draws new examples: the numbers continue.
        dataset = tf.data.Dataset.zip(dataset.repeat(), numbers)
        return _cut(dataset.filter(self._is_drawn), self.num_examples)

    def _numbers(self):
        """Random numbers, new in every pass unless it is one epoch only."""
        return tf.data.Dataset.random(
            self.seed, rerandomize_each_iteration=not self.is_one_epoch
        )

    def _is_drawn(self, example, number):
        """Whether an example is drawn, according to its class's weight."""
        weights = tf.constant(self.class_weights)
        label = tf.cast(example[self.schema.label], tf.int32)
        label = tf.clip_by_value(label, 0, self.num_classes - 1)
        # Independent of the random numbers of the example's crop.
        x = tf.random.stateless_uniform((), [number, self.seed + 1])
        return x * tf.reduce_max(weights) < weights[label]

    @property
    def _decodes_once(self):
        """Whether the copies of an image are decoded together.

        Not if each has its own random crop, some are left out, or corrupt
        images are reported.
        """
        return (
            self.augmentation.repeats > 1
            and self.augmentation.crop_area is None
            and self.class_weights is None
            and not self.skip_corrupt
        )

    def batches(self, examples, batch_size, drop_remainder):
        """Returns batches `(images, labels)` of the output of `examples`."""
        if self.skip_corrupt:
            dataset = self.decoded(examples).filter(_is_readable())
            dataset = dataset.map(lambda *decoded: decoded[:3])
            if self.is_training:  # Others replace corrupt ones.
                dataset = _cut(dataset.repeat(), examples.cardinality())
        else:
            dataset = examples.map(self._image, tf.data.AUTOTUNE)
        dataset = dataset.batch(batch_size, drop_remainder=drop_remainder)
        dataset = dataset.map(self._finished, tf.data.AUTOTUNE)
        options = tf.data.Options()
        options.deterministic = True
        return dataset.prefetch(tf.data.AUTOTUNE).with_options(options)

    def _every_nth(self, dataset, n):
        """A share `1 / n` of the examples, different in each epoch."""
        size, chosen = self.num_examples, -(-self.num_examples // n)
        offsets = (
            self._numbers()
            .take(1)
            .flat_map(lambda x: tf.data.Dataset.from_tensors(x).repeat(size))
        )
        # Strides of a prime visit all examples, and spread evenly.
        return (
            tf.data.Dataset.zip(dataset.enumerate(), offsets)
            .filter(lambda x, offset: (x[0] * STRIDE + offset) % size < chosen)
            .map(lambda x, offset: x[1])
        )

    def decoded(self, examples):
        """Decodes images one by one: `(image, label, number, name, is_good)`.

        An image that cannot be decoded is black. `examples` is the output of
        the method of this name, with `skip_corrupt`.
        """
        spec = examples.map(self._image).element_spec[0]

        def attempt(example, number):
            name, label = example["tfds_id"], example[self.schema.label]
            label = tf.cast(label, tf.int64)
            one = tf.data.Dataset.from_tensors((example, number))
            good = one.map(self._image).ignore_errors()
            good = good.map(lambda *decoded: (*decoded, name, True))
            black = tf.zeros(spec.shape, spec.dtype)
            bad = (black, label, number, name, False)
            return good.concatenate(tf.data.Dataset.from_tensors(bad)).take(1)

        return examples.interleave(
            attempt,
            cycle_length=16,
            num_parallel_calls=tf.data.AUTOTUNE,
            deterministic=True,
        )

    def _read(self):
        """Reads examples with images as stored, mostly compressed.

        They are decoded after the shuffle. Otherwise its buffer would hold
        decoded photographs (5 GB of them for ImageNet).
        """
        shuffles = self.is_training
        seed = self.seed if shuffles else None
        if isinstance(self.builder, ImageFolder):
            return self.builder.read(self.split, seed, not self.is_one_epoch)
        schema = self.schema
        config = tfds.ReadConfig(
            shuffle_seed=seed,
            shuffle_reshuffle_each_iteration=shuffles and not self.is_one_epoch,
            # TFDS's default of 16 would mix the order of the files.
            interleave_cycle_length=16 if shuffles else 1,
            enable_ordering_guard=False,
            try_autocache=False,
            skip_prefetch=True,
            add_tfds_id=self.skip_corrupt,  # Names skipped examples.
        )
        skip = {schema.image: tfds.decode.SkipDecoding()}
        with _without_tfds_warnings():
            return self.builder.as_dataset(
                self.split,
                shuffle_files=shuffles,
                read_config=config,
                decoders=tfds.decode.PartialDecoding(
                    {schema.image: True, schema.label: True},
                    decoders=skip if schema.is_encoded else None,
                ),
            )

    def _image(self, example, number):
        """Maps a stored example to an augmented image, a label, the number."""
        if not self._decodes_once:
            example = self._with_pixels(example, number)
        image = example[self.schema.image]
        if self.augmentation.crop_padding:
            padding = self.augmentation.crop_padding
            image = random_crop(image, padding, [number, self.seed])
        change = make_change(self.augmentation)
        if change is not None:
            # A different seed from the crop's.
            image = _traced(change, image, tf.stack([number, ~self.seed]))
        return image, tf.cast(example[self.schema.label], tf.int64), number

    def _with_pixels(self, example, number=None):
        """An example with its image decoded to pixels of the right size."""
        image = stored = example[self.schema.image]
        decode = None
        if self.schema.is_encoded:
            features = self.builder.info.features
            channels = None
            if isinstance(self.builder, ImageFolder):
                channels = 4 if self.preprocessing.channels == 4 else 3
                image = named_if_none(image, example["tfds_id"])
            decode = decoder_of(features[self.schema.image], channels)
        area = self.augmentation.crop_area
        if area is not None:
            image = decode_and_crop(image, decode, area, [number, self.seed])
        elif decode is not None:
            image = decode(image)
        if decode is not None and self._turns:
            image = upright(image, stored)
        wanted, fast = self.preprocessing, self.is_training
        if wanted.test_crop is not None and not self.is_training:
            image = center_crop(image, self.size, wanted.test_crop)
        image = to_channels(image, self.size, wanted, fast)
        return example | {self.schema.image: image}

    @property
    def _turns(self):
        """Whether images are turned upright, according to EXIF.

        Images of a fixed size were encoded from pixels, without EXIF.
        """
        shape = self.builder.info.features[self.schema.image].shape
        return self.preprocessing.exif_orientation and None in shape[:2]

    def _finished(self, images, labels, numbers):
        """A batch for the model: checked, mixed, normalized."""
        labels = self._checked_labels(labels)
        mix = make_mix(self.augmentation)
        if mix is not None:
            # A different seed from the first image's changes.
            seed = tf.stack([~numbers[0], ~self.seed])
            images, labels = _traced(mix, images, labels, seed)
        images = tf.cast(images, tf.float32)
        if self.batch_change is not None:
            images, labels = self.batch_change(images, labels)
        return self.preprocessing.normalized(images), labels

    def _checked_labels(self, labels):
        """Labels in range, one-hot if wanted."""
        # Per batch: one by one, it costs as much as decoding a small image.
        message = (
            f"Labels must lie in [0, {self.num_classes}). "
            "Received: label={shown} "
            f"with num_classes={self.num_classes} in the dataset "
            f"{self.builder.name}. Pass the true num_classes."
        )
        is_wrong = (labels < 0) | (labels >= self.num_classes)
        is_right = tf.logical_not(tf.reduce_any(is_wrong))
        first_wrong = tf.gather(labels, tf.argmax(tf.cast(is_wrong, tf.int32)))
        labels = checked(labels, is_right, message, first_wrong)
        if self.one_hot:
            return tf.one_hot(labels, self.num_classes)
        return tf.cast(labels, tf.int32)


def _traced(function, *inputs):
    """Applies a `tf.function`, traced once rather than per pipeline."""
    specs = [tf.TensorSpec(x.shape, x.dtype) for x in inputs]
    with tf.init_scope():
        function = function.get_concrete_function(*specs)
    return function(*inputs)


def _cut(dataset, length):
    """The first `length` examples of a dataset with at least so many."""
    length_is_known = tf.data.experimental.assert_cardinality(length)
    return dataset.take(length).apply(length_is_known)


def seed_of_epoch(seed, epoch):
    """Returns a seed below 2**31 for one epoch of training with `seed`."""
    state = np.random.SeedSequence([seed, epoch]).generate_state(1)
    return int(state[0] >> 1)


@functools.cache
def _is_readable():
    """A filter of readable images; warns once of each unreadable one."""
    skipped = set()  # Training reopens its datasets every epoch.

    def skip(name):
        if name not in skipped:
            skipped.add(name)
            warn(
                f"{name.decode()} cannot be decoded and is skipped, "
                f"{len(skipped)} so far."
            )
        return False

    def is_readable(image, label, number, name, is_good):
        return tf.cond(
            is_good,
            lambda: True,
            lambda: tf.numpy_function(skip, [name], tf.bool),
        )

    return is_readable


@contextlib.contextmanager
def _without_tfds_warnings():
    """Suppresses warnings of TFDS while it opens a dataset.

    It warns that an ordered dataset is shuffled, which is intended, and of its
    own use of a deprecated property.
    """
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
