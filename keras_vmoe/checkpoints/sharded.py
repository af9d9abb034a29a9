"""The sharded checkpoint format of the reference program."""

import contextlib
import dataclasses
import math

import ml_dtypes
import numpy as np

from keras_vmoe._extras import require
from keras_vmoe.checkpoints.files import open_checkpoint

VERSIONS = (None, "20220622")
CHUNKS_KEY = "__msgpack_array_chunk_a87ca2__"
NDARRAY, SLICES, INDEX_INFO = 1, 6, 8  # Types of MessagePack extensions.
DTYPES = {
    name: np.dtype(name)
    for name in (
        "bool", "float16", "float32", "float64", "int8", "int16", "int32",
        "int64", "uint8", "uint16", "uint32", "uint64",
    )
} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}  # fmt: skip
MAX_DEPTH = 32  # Of nested names.
MAX_SIZE = 2**48  # Of an axis.
HEADER = 4096  # Bytes that the head of an array takes at most.


def read_vmoe(prefix, progress=None):
    """Reads a checkpoint of the reference program.

    Bytes go from the file to the arrays without a copy between, so that the
    peak of memory is the size of the arrays (and one chunk, where an array was
    cut across its rows).

    Args:
        prefix: Path without `.index` and `.data-00000-of-00001`. Paths such as
            `gs://...` are opened by TensorFlow.
        progress: Optional function of `(bytes so far, bytes in all)`.

    Returns:
        Dict from name, such as `"Encoder/encoderblock_0/LayerNorm_0/scale"`, to
        numpy array, of the dtype in the file (bfloat16 from `ml_dtypes`). Of a
        whole training state only the parameters are read.

    Raises:
        FileNotFoundError: If the index or a shard is missing.
        CheckpointError: If a file is cut short, damaged or of another kind.
        ImportError: If msgpack is missing, or TensorFlow for a remote path.

    Example:

    >>> arrays = read_vmoe("checkpoints/vmoe_b16")  # doctest: +SKIP

    Reference:
        https://github.com/google-research/vmoe, `vmoe/checkpoints`.
    """
    index = read_index(prefix)
    arrays = {}
    total = sum(entry.nbytes for entry in index.entries.values())
    with _Shards(index, progress, total) as shards:
        # An index may claim any size. No array is made before the files have
        # shown that they hold all the bytes.
        plan = shards.plan()
        for name, chunks in plan.items():
            entry = index.entries[name]
            array = np.empty(entry.shape, entry.dtype)
            for chunk in chunks:
                shards.read_chunk(chunk, array)
            arrays[name] = array
    return arrays


@dataclasses.dataclass(frozen=True)
class Entry:
    """What the index says of one array.

    Attributes:
        number: Its place in the sorted index.
        shape: Its shape.
        dtype: Its numpy dtype.
        shards: Dict from slices, a tuple of `(start, stop)` per axis, to the
            shard that holds this part.
    """

    number: int
    shape: tuple
    dtype: np.dtype
    shards: dict

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
    """Reads the `.index` file: shapes, dtypes and shards of all parameters.

    Args:
        prefix: As of `read_vmoe`.

    Returns:
        An `Index`.

    Raises:
        FileNotFoundError, CheckpointError, ImportError: As `read_vmoe`.
    """
    msgpack = require("msgpack", "checkpoints")
    prefix = str(prefix).removesuffix(".index")
    with open_checkpoint(f"{prefix}.index") as reader:
        content = _unpack(msgpack, reader, reader.read(reader.size))
        content = content if isinstance(content, dict) else {}
        count, tree = content.get("shard_count"), content.get("index")
        if not isinstance(tree, dict) or not _is_count(count):
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


def _is_count(value):
    return type(value) is int and 0 < value < 100_000


def _parameters(entries):
    """The parameters alone, where the index holds a whole training state."""
    inside = {
        name.removeprefix("params/"): entry
        for name, entry in entries.items()
        if name.startswith("params/")
    }
    return inside or entries


def _unpack(msgpack, reader, data):
    try:
        return msgpack.unpackb(data, raw=False, strict_map_key=False)
    except _errors(msgpack) as error:
        raise reader.error(
            f"MessagePack cannot be read: {type(error).__name__} {error}"
        ) from error


def _errors(msgpack):
    """What bytes that are no MessagePack, or hold other things, raise."""
    return (
        AttributeError, LookupError, TypeError, ValueError,
        msgpack.UnpackException,
    )  # fmt: skip


def _flatten(reader, tree):
    """Leaves of nested maps by tuples of keys; no recursion, so no overflow."""
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
        raise reader.error(f"{name} is no array but {_describe(leaf)}")
    try:
        aval, slices, shards = msgpack.unpackb(leaf.data)
        shape, dtype, *_ = msgpack.unpackb(aval)
        slices = [
            tuple(tuple(msgpack.unpackb(one)) for one in msgpack.unpackb(part))
            for part in slices
        ]
        dtype = dtype.decode() if isinstance(dtype, bytes) else dtype
    except _errors(msgpack) as error:
        raise reader.error(
            f"the entry of {name} cannot be read: {error}"
        ) from error
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise reader.error(f"{name} has the unknown dtype {dtype!r}")
    sizes = isinstance(shape, list) and len(shape) <= MAX_DEPTH
    sizes = sizes and all(
        type(size) is int and 0 <= size < MAX_SIZE for size in shape
    )
    shards = shards if isinstance(shards, list) else [shards]
    known = [
        type(shard) is int and 0 <= shard < shard_count for shard in shards
    ]
    if not sizes or len(slices) != len(shards) or not all(known):
        raise reader.error(
            f"{name} has shape {shape} in shards {shards} of {shard_count}"
        )
    parts = [_bounds(part, shape) for part in slices]
    if None in parts or not _tile(parts, shape):
        raise reader.error(f"the parts of {name} do not make up shape {shape}")
    parts = dict(zip(parts, shards, strict=True))
    return Entry(number, tuple(shape), DTYPES[dtype], parts)


def _describe(leaf):
    code = getattr(leaf, "code", None)
    kind = type(leaf).__name__
    return kind if code is None else f"an extension of type {code}"


def _bounds(slices, shape):
    """`(start, stop)` per axis, or None if the slices do not fit the shape."""
    if len(slices) != len(shape):
        return None
    bounds = []
    for one, size in zip(slices, shape, strict=True):
        if len(one) != 3 or one[2] not in (None, 1):
            return None
        start = 0 if one[0] is None else one[0]
        stop = size if one[1] is None else one[1]
        if type(start) is not int or type(stop) is not int:
            return None
        if not 0 <= start <= stop <= size:
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


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A part of an array in a shard: where its pieces stand in the file."""

    shard: int
    bounds: tuple
    pieces: list  # `(position, number of elements)` of each.


class _Shards:
    """The open data files of a checkpoint."""

    def __init__(self, index, progress, total):
        self._index = index
        self._progress = progress or (lambda done, total: None)
        self._done, self._total = 0, total
        self._stack, self._readers = None, {}

    def __enter__(self):
        self._stack = contextlib.ExitStack()
        return self

    def __exit__(self, *error):
        return self._stack.__exit__(*error)

    def plan(self):
        """Finds all chunks of all arrays, without reading their bytes."""
        entries = self._index.entries
        by_number = {entry.number: name for name, entry in entries.items()}
        found = {name: {} for name in entries}
        shards = {
            s for entry in entries.values() for s in entry.shards.values()
        }
        for shard in sorted(shards):
            path = self._index.shard_path(shard)
            reader = self._stack.enter_context(open_checkpoint(path))
            self._readers[shard] = reader
            for number, slices, pieces in _scan(reader, by_number, entries):
                name = by_number.get(number)
                if name is None:  # Not a parameter.
                    continue
                bounds = _bounds(slices, entries[name].shape)
                chunk = Chunk(shard, bounds, pieces)
                _check_chunk(reader, name, entries[name], chunk)
                found[name][bounds] = chunk
        for name, chunks in found.items():
            for bounds, shard in entries[name].shards.items():
                if bounds not in chunks and math.prod(entries[name].shape):
                    raise self._readers[shard].error(
                        f"the part {bounds} of {name} is missing"
                    )
        return {name: list(chunks.values()) for name, chunks in found.items()}

    def read_chunk(self, chunk, array):
        """Reads a chunk into its part of an array."""
        reader = self._readers[chunk.shard]
        # The ellipsis makes a view of a scalar, too.
        part = array[*(slice(*bounds) for bounds in chunk.bounds), ...]
        # Parts of whole rows are read in place.
        direct = part.flags.c_contiguous
        flat = part.reshape(-1) if direct else np.empty(part.size, part.dtype)
        start = 0
        for position, size in chunk.pieces:
            reader.seek(position)
            reader.read_into(flat[start : start + size])
            start += size
        if not direct:
            part[...] = flat.reshape(part.shape)
        self._done += flat.nbytes
        self._progress(self._done, self._total)


def _scan(reader, by_number, entries):
    """Number, slices and pieces of all chunks in a shard."""
    for _ in range(reader.map_header()):
        key = reader.string()
        if key == CHUNKS_KEY:
            reader.skip(1)  # True.
            continue
        if not key.isdecimal() or len(key) > 9:
            raise reader.error(f"the number of an array is {key!r}")
        name = by_number.get(int(key))
        dtype = None if name is None else entries[name].dtype
        for _ in range(reader.array_header()):
            if reader.array_header() != 2:
                raise reader.error("a chunk is no pair")
            count = reader.array_header()
            pieces = [_piece(reader, dtype) for _ in range(count)]
            yield int(key), _read_slices(reader), pieces


def _piece(reader, dtype):
    """`(position, elements)` of a flat array, which is passed over."""
    kind, length = reader.extension_header()
    end = reader.tell() + length
    if kind != NDARRAY:
        raise reader.error(f"an array is an extension of type {kind}")
    if reader.array_header() != 3 or reader.array_header() != 1:
        raise reader.error("a piece of an array is not flat")
    size = _integer(reader)
    name = reader.string()
    length = reader.bytes_header()
    if dtype is not None and DTYPES.get(name) != dtype:
        raise reader.error(f"an array is of dtype {name!r}, not {dtype}")
    dtype = DTYPES.get(name)
    position = reader.tell()
    good = dtype is not None and length == size * dtype.itemsize
    if not good or position + length != end:
        raise reader.error(
            f"{length} bytes stand for {size} elements of {name!r}"
        )
    reader.skip(length)
    return position, size


def _integer(reader):
    """The unsigned integer that starts here."""
    code = reader.read(1)[0]
    if code < 0x80:
        return code
    lengths = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}
    if code not in lengths:
        raise reader.error(f"a size should start, not a byte {code:#04x}")
    return int.from_bytes(reader.read(lengths[code]), "big")


def _read_slices(reader):
    """`(start, stop, step)` per axis of the slices that start here."""
    msgpack = require("msgpack", "checkpoints")
    kind, length = reader.extension_header()
    if kind != SLICES or length > HEADER:
        raise reader.error("the place of a chunk is missing")
    data = reader.read(length)
    try:
        return [tuple(msgpack.unpackb(one)) for one in msgpack.unpackb(data)]
    except _errors(msgpack) as error:
        raise reader.error(f"a slice cannot be read: {error}") from error


def _check_chunk(reader, name, entry, chunk):
    """Raises unless the index expects this chunk, of this size, here."""
    expected = entry.shards.get(chunk.bounds) == chunk.shard
    sides = [stop - start for start, stop in chunk.bounds or ()]
    count = sum(count for _, count in chunk.pieces)
    if not expected or count != math.prod(sides):
        raise reader.error(
            f"the part {chunk.bounds} of {name} is not what the index expects"
        )
