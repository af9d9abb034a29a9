"""The `.npz` checkpoints of the original vision transformers (augreg)."""

import io
import math
import re
import zipfile
import zlib

import numpy as np

from keras_vmoe.checkpoints.files import CORRUPT
from keras_vmoe.checkpoints.files import MAX_COMPRESSION
from keras_vmoe.checkpoints.files import CheckpointError

# Their names, and those of the same arrays in V-MoE's program.
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
MAX_HEADER = 1 << 16
READ_HEADER = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def read_npz(path):
    """Reads a local `.npz` file by V-MoE's names, after checking all of it."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            names = {x.filename.removesuffix(".npy") for x in members}
            if not names or len(names) < len(members):
                raise ValueError("it holds no arrays, or one name twice")
            for member in members:
                _check_member(archive, member)
        with np.load(path, allow_pickle=False) as file:
            return {_name(name): file[name] for name in file.files}
    except FileNotFoundError:
        raise
    except (*CORRUPT, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(
            "The checkpoint must be a whole .npz file of arrays. "
            f"Received: {path} ({error}). Copy or download it again."
        ) from error


def _name(name):
    for theirs, ours in NAMES:
        name = name.replace(theirs, ours)
    return re.sub(r"^opt/target/|^params/", "", name)


def _check_member(archive, member):
    """Raises unless a member is an array that its bytes can hold."""
    most = MAX_COMPRESSION * max(1, member.compress_size)
    if member.file_size > most:
        raise ValueError(
            f"{member.filename} claims {member.file_size} bytes in "
            f"{member.compress_size}"
        )
    with archive.open(member) as file:
        header = io.BytesIO(file.read(MAX_HEADER))
    version = np.lib.format.read_magic(header)
    shape, _, dtype = READ_HEADER[version](header)
    size = math.prod(shape) * dtype.itemsize
    is_plain = dtype.kind in "biufcV" and dtype.itemsize
    if not is_plain or size > member.file_size:
        raise ValueError(
            f"{member.filename} claims shape {shape} of {dtype} in "
            f"{member.compress_size} bytes"
        )
