"""Finds missing and truncated files before the first image is read.

TFDS notices a truncated file only when it reads it, maybe hours into an
epoch, and then names neither the file nor a mend.
"""

import os
import struct

# A TFRecord is: length (8 bytes), its checksum (4), data, checksum (4).
_HEADER_BYTES = 8 + 4
_RECORD_OVERHEAD = _HEADER_BYTES + 4


def check_files(builder, split):
    """Checks that the files of a split are there and whole.

    Cheap: one look at the size of each file. Only where the sizes do not add
    up to what was written, the records are counted to find the broken file.
    Bits that have flipped inside a file are not found.

    Args:
        builder: A `tfds.core.DatasetBuilder`.
        split: String, the split to be read, with slices and sums.

    Raises:
        OSError: A file is missing or not whole.
    """
    instructions = builder.info.splits[split].file_instructions
    wanted = {os.fspath(instruction.filename) for instruction in instructions}
    for split_info in builder.info.splits.values():
        paths = [os.fspath(path) for path in split_info.filepaths]
        if wanted.intersection(paths) and "://" not in paths[0]:
            _check_split(builder, split_info, paths)


def _check_split(builder, split_info, paths):
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        raise _broken(builder, missing[0], "the file is missing")
    if builder.info.file_format.value != "tfrecord":
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
