"""Writes the reference program's sharded format, from its description."""

import math

import msgpack
import numpy as np


def ext(kind, *values):
    return msgpack.ExtType(kind, msgpack.packb(values))


def slices(bounds):
    parts = (msgpack.packb((start, stop, None)) for start, stop in bounds)
    return msgpack.packb(tuple(parts))


def flat_piece(array):
    return ext(1, array.shape, array.dtype.name, array.tobytes())


def grid(shape, cuts):
    """Bounds of the parts when each axis is cut into so many."""
    parts = [()]
    for size, count in zip(shape, cuts, strict=True):
        edges = np.linspace(0, size, count + 1).astype(int).tolist()
        bounds = list(zip(edges[:-1], edges[1:], strict=True))
        parts = [(*part, b) for part in parts for b in bounds]
    return parts


def write(prefix, arrays, shards=1, cuts=None, piece=None, version="20220622"):
    """Writes a checkpoint.

    Args:
        prefix: `pathlib.Path` without endings.
        arrays: Dict from name to array.
        shards: Number of `.data` files; parts go to them in turn.
        cuts: Dict from name to the number of parts of each axis.
        piece: Elements of a flat piece; None for one piece per part.
        version: What the index says; None for no version.
    """
    tree, contents, turn = {}, [{} for _ in range(shards)], 0
    names = sorted(arrays, key=lambda name: name.split("/"))
    for number, name in enumerate(names):
        array = arrays[name]
        bounds = grid(array.shape, (cuts or {}).get(name, (1,) * array.ndim))
        owners = []
        for part in bounds:
            flat = array[tuple(slice(*b) for b in part)].reshape(-1)
            step = piece or max(1, flat.size)
            pieces = [
                flat_piece(flat[i : i + step])
                for i in range(0, flat.size, step)
            ]
            chunk = [pieces, msgpack.ExtType(6, slices(part))]
            owners.append(turn % shards)
            contents[turn % shards].setdefault(str(number), []).append(chunk)
            turn += 1
        shape = msgpack.packb((array.shape, array.dtype.name, False, {}))
        leaf = ext(8, shape, tuple(map(slices, bounds)), tuple(owners))
        *path, last = name.split("/")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = leaf
    index = {"shard_count": shards, "index": tree}
    if version is not None:
        index["version"] = version
    prefix.with_name(prefix.name + ".index").write_bytes(msgpack.packb(index))
    for shard, content in enumerate(contents):
        content = {"__msgpack_array_chunk_a87ca2__": True, **content}
        name = f"{prefix.name}.data-{shard:05d}-of-{shards:05d}"
        with open(prefix.with_name(name), "wb") as file:
            packer = msgpack.Packer()
            file.write(packer.pack_map_header(len(content)))
            for key, value in content.items():
                file.write(packer.pack(key))
                file.write(packer.pack(value))


def nbytes(arrays):
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays.values())
