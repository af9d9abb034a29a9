"""Finds missing, truncated and damaged files, and names them.

TFDS notices a truncated file only when it reads it, maybe hours into an
epoch, and then names neither the file nor a mend.
"""

import functools
import operator
import os
import struct

from keras_vmoe.data.tensorflow_runtime import import_tensorflow
from keras_vmoe.data.tensorflow_runtime import import_tfds

# A TFRecord is: length (8 bytes), its checksum (4), data, checksum (4).
_HEADER_BYTES = 8 + 4
_RECORD_OVERHEAD = _HEADER_BYTES + 4
_BATCH = 256  # Records at a time, where all are read.


def check_files(builder, split, counts=True):
    """Checks that the files of a TFDS split are there and whole.

    Cheap: one look at the size of each file. Only where the sizes do not add
    up to what was written, the records are counted to find the broken file.
    Bits that have flipped inside a file are not found.

    Args:
        builder: A `tfds.core.DatasetBuilder`.
        split: String, the split to be read, with slices and sums.
        counts: Whether files must be whole; otherwise it is enough that they
            are there.

    Raises:
        OSError: A file is missing or not whole.
    """
    wanted = set(files_of(builder, split))
    for split_info in builder.info.splits.values():
        paths = [os.fspath(path) for path in split_info.filepaths]
        if wanted.intersection(paths) and "://" not in paths[0]:
            _check_split(builder, split_info, paths, counts)


def files_of(builder, split):
    """Paths of the files of a TFDS split."""
    instructions = builder.info.splits[split].file_instructions
    return [os.fspath(instruction.filename) for instruction in instructions]


def without_damage(builder, split):
    """Leaves damaged records out of a TFDS split.

    Reads all of its files once.

    Args:
        builder: A `tfds.core.DatasetBuilder`.
        split: String or `ReadInstruction`, with slices and sums.

    Returns:
        A `ReadInstruction`, and the places of the damaged records: pairs of a
        path and the number of a record in it.

    Raises:
        OSError: If nothing is left.
    """
    tfds = import_tfds()
    if builder.info.file_format.value != "tfrecord":
        return split, []
    splits, files = builder.info.splits, set(files_of(builder, split))
    parts, places = [], []
    read = tfds.core.ReadInstruction.from_spec(split).to_absolute(splits)
    bad = {part.splitname: [] for part in read}
    for name, numbers in bad.items():
        start, info = 0, splits[name]
        for path, length in zip(
            info.filepaths, info.shard_lengths, strict=True
        ):
            path = os.fspath(path)
            found = damaged_records(path, length) if path in files else []
            places += [(path, record) for record in found]
            numbers += [start + record for record in found]
            start += length
    for part in read:
        first, end = part.from_ or 0, part.to
        end = splits[part.splitname].num_examples if end is None else end
        for last in [*bad[part.splitname], end]:
            if first < (last := min(last, end)):
                parts.append((part.splitname, first, last))
            first = max(first, last + 1)
    if not parts:
        raise _broken(builder, places[0][0], "no record is whole")
    instructions = [tfds.core.ReadInstruction(*part) for part in parts]
    return functools.reduce(operator.add, instructions), places


def damaged_records(path, length):
    """Numbers of the damaged records of a file, which is read once.

    Args:
        path: String.
        length: How many records were written.

    Returns:
        List of integers.
    """
    state = import_tensorflow().io.gfile.stat(path)  # Of a bucket as well.
    return _damaged_records(path, length, state.length, state.mtime_nsec)


@functools.cache
def _damaged_records(path, length, *state):
    """Numbers of the records of a TFRecord file that cannot be read.

    Args:
        path: String.
        length: How many records were written.
        *state: What tells that the file is still the same.

    Returns:
        List of integers.
    """
    tf = import_tensorflow()
    damaged, start = [], 0
    while start < length:
        records = tf.data.TFRecordDataset(path).skip(start)
        try:
            for batch in records.batch(_BATCH):
                start += int(tf.size(batch))
            break
        except tf.errors.DataLossError:
            pass
        try:  # Of the batch that failed, one by one.
            for _ in tf.data.TFRecordDataset(path).skip(start):
                start += 1
        except tf.errors.DataLossError:
            damaged.append(start)
            start += 1
    return damaged + list(range(start, length))


def _check_split(builder, split_info, paths, counts):
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        raise _broken(builder, missing[0], "the file is missing")
    if not counts or builder.info.file_format.value != "tfrecord":
        return
    written = split_info.num_bytes + _RECORD_OVERHEAD * split_info.num_examples
    if sum(map(os.path.getsize, paths)) == written:
        return
    for path, expected in zip(paths, split_info.shard_lengths, strict=True):
        found, is_whole = count_records(path)
        if found != expected or not is_whole:
            reason = f"{found} whole records instead of {expected}"
            raise _broken(builder, path, reason)


def count_records(path):
    """Counts the records of a TFRecord file by walking from length to length.

    Args:
        path: String.

    Returns:
        Number of whole records, and whether the file ends with the last one.
    """
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


def _broken(builder, path, reason):
    return OSError(
        "The files of a dataset must be as they were written. "
        f"Received: path={path!r} ({reason}). Delete the folder "
        f"{os.fspath(builder.data_dir)!r} and prepare {builder.name!r} again."
    )
