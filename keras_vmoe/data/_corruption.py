"""Finds, names and skips missing, truncated and corrupt files and images.

TFDS notices a truncated file only when it reads it, perhaps hours into an
epoch, and then names neither the file nor a remedy.
"""

import contextlib
import dataclasses
import functools
import operator
import os
import struct
from collections.abc import Iterator

import numpy as np

from keras_vmoe._preprocessing import Preprocessing
from keras_vmoe._warnings import warn
from keras_vmoe.data.folders import ImageFolder
from keras_vmoe.data.pipeline import Pipeline
from keras_vmoe.data.schema import count_examples
from keras_vmoe.data.schema import read_schema
from keras_vmoe.data.sources import broken_files
from keras_vmoe.data.sources import open_builder
from keras_vmoe.data.tensorflow_runtime import tf
from keras_vmoe.data.tensorflow_runtime import tfds

# A TFRecord is length (8 bytes), its checksum (4), data, checksum (4).
_RECORD_OVERHEAD = 8 + 4 + 4


def find_corrupt(
    name: str, split: str, data_dir: str | os.PathLike[str] | None = None
) -> Iterator[str]:
    """Finds corrupt records and images that cannot be decoded.

    Reads and decodes the whole split, as fast as training does.

    Args:
        name: String, see `load`.
        split: String, see `load`.
        data_dir: Folder that holds the dataset, see `load`.

    Yields:
        Strings: path of the image, or file and number of the record.

    Raises:
        ValueError: If the dataset or split does not exist.

    Example:

    ```python
    from keras_vmoe import data

    list(data.find_corrupt("digits", "test"))  # []
    ```
    """
    builder = open_builder(name, data_dir)
    schema = read_schema(name, builder.info)
    pipeline = Pipeline(
        builder,
        schema,
        split,
        num_examples=count_examples(name, builder, split),
        num_classes=schema.num_classes or 1,
        size=(8, 8),
        preprocessing=Preprocessing(channels=schema.channels),
        skip_corrupt=True,
    )
    whole, places = _whole_records(builder, split)
    for path, record in places:
        yield f"{path}, record {record}"
    pipeline = dataclasses.replace(pipeline, split=whole)
    decoded = pipeline.decoded(pipeline.examples())
    for *_, place, is_good in decoded.as_numpy_iterator():
        if not is_good:
            yield place.decode()


@contextlib.contextmanager
def named_corruption(name, splits, data_dir=None):
    """Names the image or record where reading fails inside a `with` block.

    TensorFlow's error becomes an OSError. `splits` are the splits being read.
    """
    try:
        yield
    except (
        tf.errors.DataLossError,
        tf.errors.InvalidArgumentError,
        tf.errors.UnknownError,  # Through a generator.
    ) as error:
        for split in splits:
            for place in find_corrupt(name, split, data_dir):
                raise OSError(
                    "All images must be readable. "
                    f"Received: {place}, which is corrupt, in the split "
                    f"{split!r} of {name!r}. Repair or remove it, or set "
                    "skip_corrupt=True, --skip_corrupt."
                ) from error
        raise


def skip_corrupt_records(builder, split):
    """Returns the split without corrupt records; a warning names some."""
    split, places = _whole_records(builder, split)
    if places:
        named = [f"record {record} of {path}" for path, record in places[:5]]
        warn(
            f"{len(places)} corrupt records are skipped, such as "
            f"{', '.join(named)}."
        )
    return split


def check_files(builder, split, counts=True):
    """Raises an OSError unless a TFDS split's files exist and are complete.

    Checks the size of each file. Records are counted, to find the truncated
    file, only if the sizes do not add up to what was written. Flipped bits are
    not detected.

    Args:
        builder: A `tfds.core.DatasetBuilder`.
        split: String, the split to be read, with slices and sums.
        counts: Whether files must be complete, not only exist.
    """
    if isinstance(builder, ImageFolder):
        return  # Just listed.
    wanted = _files_of(builder, split)
    for split_info in builder.info.splits.values():
        paths = [os.fspath(path) for path in split_info.filepaths]
        if wanted.isdisjoint(paths) or "://" in paths[0]:
            continue
        for path in paths:
            if not os.path.exists(path):
                reason = "the file is missing"
                raise broken_files(builder.data_dir, reason, path=path)
        if counts and _holds_records(builder):
            _check_counts(builder, split_info, paths)


def _check_counts(builder, split_info, paths):
    written = split_info.num_bytes + _RECORD_OVERHEAD * split_info.num_examples
    if sum(map(os.path.getsize, paths)) == written:
        return
    for path, expected in zip(paths, split_info.shard_lengths, strict=True):
        found, is_whole = _count_records(path)
        if found != expected or not is_whole:
            reason = f"{found} whole records instead of {expected}"
            raise broken_files(builder.data_dir, reason, path=path)


def _count_records(path):
    """Counts complete records of a TFRecord file; whether nothing follows."""
    size = os.path.getsize(path)
    count = position = 0
    with open(path, "rb") as file:
        while position + _RECORD_OVERHEAD <= size:
            file.seek(position)
            (length,) = struct.unpack("<Q", file.read(8))
            if position + length + _RECORD_OVERHEAD > size:
                break
            position += length + _RECORD_OVERHEAD
            count += 1
    return count, position == size


def _holds_records(builder):
    """Whether a dataset consists of TFRecord files."""
    if isinstance(builder, ImageFolder):
        return False
    return builder.info.file_format.value == "tfrecord"


def _files_of(builder, split):
    """Paths of the files of a TFDS split."""
    instructions = builder.info.splits[split].file_instructions
    return {os.fspath(instruction.filename) for instruction in instructions}


def _whole_records(builder, split):
    """The split without corrupt records, and their pairs of path and number.

    Reads all files once. Raises an OSError if no record remains.
    """
    if not _holds_records(builder):
        return split, []
    instruction = tfds.core.ReadInstruction
    splits, files = builder.info.splits, _files_of(builder, split)
    read = instruction.from_spec(split).to_absolute(splits)
    corrupt, places = {part.splitname: [] for part in read}, []
    for name, numbers in corrupt.items():
        start, paths = 0, map(os.fspath, splits[name].filepaths)
        for path, length in zip(paths, splits[name].shard_lengths, strict=True):
            found = corrupt_records(path, length) if path in files else []
            places += [(path, record) for record in found]
            numbers += [start + record for record in found]
            start += length
    runs = []
    for part in read:
        name = part.splitname
        whole = np.arange(splits[name].num_examples)[part.from_ : part.to]
        whole = np.setdiff1d(whole, corrupt[name])
        for run in np.split(whole, np.flatnonzero(np.diff(whole) > 1) + 1):
            if len(run):
                runs.append(instruction(name, int(run[0]), int(run[-1]) + 1))
    if not runs:
        path, reason = places[0][0], "no record is whole"
        raise broken_files(builder.data_dir, reason, path=path)
    return functools.reduce(operator.add, runs), places


def corrupt_records(path, length):
    """Numbers of the corrupt records in a TFRecord file of `length` records."""
    state = tf.io.gfile.stat(path)  # Buckets as well.
    return _corrupt_records(path, length, state.length, state.mtime_nsec)


@functools.cache
def _corrupt_records(path, length, *state):
    """As `corrupt_records`; `state` changes when the file does."""
    corrupt, start = [], 0
    while start < length:
        try:
            for _ in tf.data.TFRecordDataset(path).skip(start):
                start += 1
            break
        except tf.errors.DataLossError:
            corrupt.append(start)
            start += 1
    return corrupt + list(range(start, length))
