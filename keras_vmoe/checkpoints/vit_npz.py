"""The `.npz` checkpoints of the original vision transformers (augreg)."""

import math
import re
import zipfile
import zlib

import numpy as np

from keras_vmoe.checkpoints.files import CheckpointError
from keras_vmoe.checkpoints.vmoe import load_vmoe

# Their names, and those of the V-MoE program for the same arrays.
NAMES = (
    ("Transformer/encoderblock_", "Encoder/encoderblock_"),
    ("Transformer/", "Encoder/"),
    ("MultiHeadDotProductAttention_1/", "SelfAttention/"),
    ("LayerNorm_2/", "LayerNorm_1/"),
    ("MlpBlock_3/", "Mlp/"),
    ("MAPHead_0/", "MapHead/"),
    ("MultiHeadDotProductAttention_0/", "MultiHeadDotProductAttention/"),
    ("MapHead/LayerNorm_0/", "MapHead/LayerNorm/"),
    ("MapHead/MlpBlock_0/", "MapHead/Mlp/"),
)
# What zipfile, zlib and numpy raise for damaged files.
DAMAGE = (
    ArithmeticError, EOFError, LookupError, NotImplementedError, OSError,
    RuntimeError, SyntaxError, ValueError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
MAX_COMPRESSION = 1040  # Of zeros by deflate: a little less.
MAX_HEADER = 1 << 16
READ_HEADER = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def read_vit_npz(path):
    """Reads a `.npz` checkpoint of a ViT, by the V-MoE program's names.

    Args:
        path: A local `.npz` file.

    Returns:
        Dict from name to numpy array, as of `checkpoints.read_vmoe`.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is cut short, damaged or of another kind.

    Example:

    >>> arrays = read_vit_npz("ViT-B_16.npz")  # doctest: +SKIP
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [
                m.filename.removesuffix(".npy") for m in archive.infolist()
            ]
            if not names or len(set(names)) < len(names):
                raise ValueError("it holds no arrays, or one name twice")
            for member in archive.infolist():
                _check_member(archive, member)
        with np.load(path, allow_pickle=False) as file:
            return {_name(name): file[name] for name in file.files}
    except FileNotFoundError:
        raise
    except DAMAGE as error:
        raise CheckpointError(
            "The checkpoint must be a whole .npz file of arrays. "
            f"Received: {path} ({error}). Copy or download it again."
        ) from error


def load_vit_npz(model, path):
    """Assigns a `.npz` checkpoint of a dense ViT to a model.

    Args:
        model: A dense `ViTMoE`; `vmoe_config(read_vit_npz(path))` finds its
            arguments, and `models.upcycle` makes a MoE model of it.
        path: A local `.npz` file.

    Returns:
        The model.

    Raises:
        TypeError, ValueError, FileNotFoundError: As `load_vmoe`.

    Example:

    >>> load_vit_npz(model, "ViT-B_16.npz")  # doctest: +SKIP

    Reference:
        [Steiner et al., 2021](https://arxiv.org/abs/2106.10270).
    """
    return load_vmoe(model, read_vit_npz(path))


def _name(name):
    for theirs, ours in NAMES:
        name = name.replace(theirs, ours)
    # Blocks of the first releases count their parts from 0.
    return re.sub(r"^opt/target/|^params/", "", name)


def _check_member(archive, member):
    """Raises if a member is no array, or claims more than it can hold."""
    most = MAX_COMPRESSION * max(1, member.compress_size)
    if member.file_size > most:
        raise ValueError(
            f"{member.filename} claims {member.file_size} bytes in "
            f"{member.compress_size}"
        )
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        length = int.from_bytes(
            file.read(2 if version == (1, 0) else 4), "little"
        )
        if length > MAX_HEADER:
            raise ValueError(f"{member.filename} has a head of {length} bytes")
    with archive.open(member) as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = READ_HEADER[version](file)
    size = math.prod(shape) * dtype.itemsize
    if (
        dtype.kind not in "biufcV"
        or size > member.file_size
        or not dtype.itemsize
    ):
        raise ValueError(
            f"{member.filename} claims shape {shape} of {dtype} in "
            f"{member.compress_size} bytes"
        )
