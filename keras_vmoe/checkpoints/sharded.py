"""The sharded checkpoint format of the reference program."""

import contextlib
import math
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from keras_vmoe._extras import require
from keras_vmoe.checkpoints.files import CORRUPT
from keras_vmoe.checkpoints.files import Reader
from keras_vmoe.checkpoints.files import open_checkpoint
from keras_vmoe.checkpoints.sharded_index import DTYPES
from keras_vmoe.checkpoints.sharded_index import bounds_of
from keras_vmoe.checkpoints.sharded_index import read_index

CHUNKS_KEY = "__msgpack_array_chunk_a87ca2__"
NDARRAY, SLICES = 1, 6  # Types of MessagePack extensions.
HEADER = 4096  # Most bytes that the bounds of a chunk take.


def read_vmoe(
    prefix: str | os.PathLike[str],
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, np.ndarray]:
    """Reads a checkpoint of the reference program.

    Bytes go from the file to the arrays without a copy: peak memory is the size
    of the arrays (and of one chunk where an array was cut across its rows).

    Args:
        prefix: Path without `.index` and `.data-00000-of-00001`. Paths such as
            `gs://...` are opened by TensorFlow.
        progress: Optional function of `(bytes so far, total bytes)`.

    Returns:
        Dict from name, such as `"Encoder/encoderblock_0/LayerNorm_0/scale"`, to
        numpy array of the dtype in the file (bfloat16 from `ml_dtypes`). Of a
        training state only the parameters are read.

    Raises:
        FileNotFoundError: If the index or a shard is missing.
        CheckpointError: If a file is truncated, corrupt or of another kind.
        ImportError: If msgpack is missing, or TensorFlow for a remote path.

    Example:

    >>> arrays = read_vmoe("checkpoints/vmoe_b16")  # doctest: +SKIP

    Reference:
        https://github.com/google-research/vmoe, `vmoe/checkpoints`.
    """
    index = read_index(prefix)
    total, done = sum(x.nbytes for x in index.entries.values()), 0
    arrays = {}
    with contextlib.ExitStack() as stack:
        # An index may claim any size: arrays are made only once the files are
        # known to hold all bytes.
        for name, chunks in _plan(index, stack).items():
            entry = index.entries[name]
            array = arrays[name] = np.empty(entry.shape, entry.dtype)
            for chunk in chunks:
                done += _read_chunk(chunk, array)
                if progress:
                    progress(done, total)
    return arrays


class Chunk(NamedTuple):
    """A part of an array in a shard: where its pieces are in the file."""

    reader: Reader
    bounds: tuple
    pieces: list  # `(position, number of elements)` of each.


def _plan(index, stack):
    """Finds all chunks of all arrays, without reading their bytes."""
    entries = index.entries
    by_number = {entry.number: name for name, entry in entries.items()}
    found = {name: {} for name in entries}
    shards = {s for entry in entries.values() for s in entry.shards.values()}
    readers = {
        shard: stack.enter_context(open_checkpoint(index.shard_path(shard)))
        for shard in sorted(shards)
    }
    for shard, reader in readers.items():
        for name, slices, pieces in _scan(reader, by_number, entries):
            bounds = bounds_of(slices, entries[name].shape)
            size = math.prod(stop - start for start, stop in bounds or ())
            is_here = entries[name].shards.get(bounds) == shard
            if not is_here or size != sum(count for _, count in pieces):
                raise reader.error(
                    f"the part {bounds} of {name} is not what the index expects"
                )
            found[name][bounds] = Chunk(reader, bounds, pieces)
    for name, entry in entries.items():
        for bounds, shard in entry.shards.items():
            if bounds not in found[name] and entry.nbytes:
                raise readers[shard].error(
                    f"the part {bounds} of {name} is missing"
                )
    return {name: list(chunks.values()) for name, chunks in found.items()}


def _read_chunk(chunk, array):
    """Reads a chunk into its part of an array, and returns its bytes."""
    # The ellipsis makes a view of a scalar, too.
    part = array[*(slice(*bounds) for bounds in chunk.bounds), ...]
    # Parts of whole rows are read in place.
    direct = part.flags.c_contiguous
    flat = part.reshape(-1) if direct else np.empty(part.size, part.dtype)
    start = 0
    for position, size in chunk.pieces:
        chunk.reader.seek(position)
        chunk.reader.read_into(flat[start : start + size])
        start += size
    if not direct:
        part[...] = flat.reshape(part.shape)
    return flat.nbytes


def _scan(reader, by_number, entries):
    """Name, slices and pieces of all parameters' chunks in a shard."""
    for _ in range(reader.header("map")):
        key = reader.string()
        if key == CHUNKS_KEY:
            reader.advance(1)  # True.
            continue
        if not key.isdecimal() or len(key) > 9:
            raise reader.error(f"the number of an array is {key!r}")
        name = by_number.get(int(key))
        dtype = None if name is None else entries[name].dtype
        for _ in range(reader.header("array")):
            if reader.header("array") != 2:
                raise reader.error("a chunk is not a pair")
            count = reader.header("array")
            pieces = [_piece(reader, dtype) for _ in range(count)]
            slices = _read_slices(reader)
            if name is not None:
                yield name, slices, pieces


def _piece(reader, dtype):
    """`(position, elements)` of a flat array, which is skipped."""
    kind, length = reader.extension_header()
    end = reader.tell() + length
    if kind != NDARRAY:
        raise reader.error(f"an array is an extension of type {kind}")
    if reader.header("array") != 3 or reader.header("array") != 1:
        raise reader.error("a piece of an array is not flat")
    size = reader.header("integer")
    name = reader.string()
    length = reader.header("byte string")
    if dtype is not None and DTYPES.get(name) != dtype:
        raise reader.error(f"an array is of dtype {name!r}, not {dtype}")
    position, dtype = reader.tell(), DTYPES.get(name)
    good = dtype is not None and length == size * dtype.itemsize
    if not good or position + length != end:
        raise reader.error(
            f"{length} bytes cannot be {size} elements of {name!r}"
        )
    reader.advance(length)
    return position, size


def _read_slices(reader):
    """`(start, stop, step)` per axis of the slices that start here."""
    msgpack = require("msgpack", "checkpoints")
    kind, length = reader.extension_header()
    if kind != SLICES or length > HEADER:
        raise reader.error("the bounds of a chunk are missing")
    data = reader.read(length)
    try:
        return [tuple(msgpack.unpackb(one)) for one in msgpack.unpackb(data)]
    except CORRUPT as error:
        raise reader.error(f"a slice cannot be read: {error}") from error
