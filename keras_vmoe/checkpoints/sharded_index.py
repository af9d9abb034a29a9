"""The index of a sharded checkpoint: names, shapes and shards of arrays."""

import dataclasses
import math

import ml_dtypes
import numpy as np

from keras_vmoe._extras import require
from keras_vmoe.checkpoints.files import CORRUPT
from keras_vmoe.checkpoints.files import open_checkpoint

VERSIONS = (None, "20220622")
INDEX_INFO = 8  # Type of a MessagePack extension.
DTYPES = {
    name: np.dtype(name)
    for name in (
        "bool", "float16", "float32", "float64", "int8", "int16", "int32",
        "int64", "uint8", "uint16", "uint32", "uint64",
    )
} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}  # fmt: skip
MAX_DEPTH = 32  # Of nested names, and of axes.
MAX_SIZE = 2**48  # Of an axis.
MAX_SHARDS = 100_000


@dataclasses.dataclass(frozen=True)
class Entry:
    """The index entry of one array."""

    number: int  # Its position in the sorted index.
    shape: tuple
    dtype: np.dtype
    shards: dict  # From `(start, stop)` per axis to the shard of this part.

    @property
    def nbytes(self):
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Index:
    """The index of a checkpoint: `entries` by name, in `shard_count` files."""

    prefix: str
    shard_count: int
    entries: dict

    def shard_path(self, shard):
        return f"{self.prefix}.data-{shard:05d}-of-{self.shard_count:05d}"


def read_index(prefix):
    """Reads the `.index` file of a `read_vmoe` prefix into an `Index`."""
    msgpack = require("msgpack", "checkpoints")
    prefix = str(prefix).removesuffix(".index")
    with open_checkpoint(f"{prefix}.index") as reader:
        data = reader.read(reader.size)
        try:
            content = msgpack.unpackb(data, strict_map_key=False)
        except CORRUPT as error:
            raise reader.error(
                f"MessagePack cannot be read: {type(error).__name__} {error}"
            ) from error
        content = content if isinstance(content, dict) else {}
        count, tree = content.get("shard_count"), content.get("index")
        if (
            not isinstance(tree, dict)
            or not _is_index(count, MAX_SHARDS)
            or not count
        ):
            raise reader.error("no index of a V-MoE checkpoint was found")
        if content.get("version") not in VERSIONS:
            raise reader.error(
                f"the version is {content['version']!r}, not one of {VERSIONS}"
            )
        leaves = _flatten(reader, tree)
        entries = {}
        # Sorted level by level, which is how the shards number the arrays.
        for number, name in enumerate(sorted(leaves)):
            entry = _entry(msgpack, reader, name, number, leaves[name], count)
            entries["/".join(name)] = entry
        if not entries:
            raise reader.error("no array is named")
    return Index(prefix, count, _parameters(entries))


def _is_index(value, end):
    return type(value) is int and 0 <= value < end


def _parameters(entries):
    """The parameters alone, if the index holds a whole training state."""
    prefix = "params/"
    inside = {k: v for k, v in entries.items() if k.startswith(prefix)}
    return {k.removeprefix(prefix): v for k, v in inside.items()} or entries


def _flatten(reader, tree):
    """Leaves of nested maps by tuples of keys; without recursion."""
    leaves, nodes = {}, [((), tree)]
    while nodes:
        name, node = nodes.pop()
        if len(name) > MAX_DEPTH:
            raise reader.error(f"names are nested deeper than {MAX_DEPTH}")
        for key, child in node.items():
            if not isinstance(key, str) or "/" in key:
                raise reader.error(f"a name is {key!r}, not a plain string")
            if isinstance(child, dict):
                nodes.append(((*name, key), child))
            else:
                leaves[*name, key] = child
    return leaves


def _entry(msgpack, reader, name, number, leaf, shard_count):
    """Checks and decodes a leaf of the index."""
    name = "/".join(name)
    if getattr(leaf, "code", None) != INDEX_INFO:
        kind = getattr(leaf, "code", type(leaf).__name__)
        raise reader.error(f"{name} is not an array but of type {kind}")
    try:
        aval, slices, shards = msgpack.unpackb(leaf.data)
        shape, dtype, *_ = msgpack.unpackb(aval)
        slices = [
            tuple(tuple(msgpack.unpackb(one)) for one in msgpack.unpackb(part))
            for part in slices
        ]
        dtype = dtype.decode() if isinstance(dtype, bytes) else dtype
    except CORRUPT as error:
        raise reader.error(
            f"the entry of {name} cannot be read: {error}"
        ) from error
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise reader.error(f"{name} has the unknown dtype {dtype!r}")
    good = isinstance(shape, list) and len(shape) <= MAX_DEPTH
    good = good and all(_is_index(size, MAX_SIZE) for size in shape)
    shards = shards if isinstance(shards, list) else [shards]
    good = good and all(_is_index(shard, shard_count) for shard in shards)
    if not good or len(slices) != len(shards):
        raise reader.error(
            f"{name} has shape {shape} in shards {shards} of {shard_count}"
        )
    parts = [bounds_of(part, shape) for part in slices]
    if None in parts or not _tile(parts, shape):
        raise reader.error(f"the parts of {name} do not make up shape {shape}")
    parts = dict(zip(parts, shards, strict=True))
    return Entry(number, tuple(shape), DTYPES[dtype], parts)


def bounds_of(slices, shape):
    """`(start, stop)` per axis, or None if the slices do not fit the shape."""
    if len(slices) != len(shape) or any(len(one) != 3 for one in slices):
        return None
    bounds = []
    for (start, stop, step), size in zip(slices, shape, strict=True):
        start = 0 if start is None else start
        stop = size if stop is None else stop
        are_integers = type(start) is type(stop) is int
        if not are_integers or not 0 <= start <= stop <= size:
            return None
        if step not in (None, 1):
            return None
        bounds.append((start, stop))
    return tuple(bounds)


def _tile(parts, shape):
    """Whether the parts are a grid that covers every element once."""
    axes = [
        sorted({part[axis] for part in parts}) for axis in range(len(shape))
    ]
    for bounds, size in zip(axes, shape, strict=True):
        edges = [0, *(stop for _, stop in bounds)]
        starts = [start for start, _ in bounds]
        if starts != edges[:-1] or edges[-1] != size:
            return False
    count = math.prod(len(bounds) for bounds in axes)
    return len(parts) == len(set(parts)) == count
