"""One function for all formats of ViT checkpoints."""

import pathlib

from keras_vmoe.checkpoints.orbax import read_orbax
from keras_vmoe.checkpoints.sharded import read_vmoe
from keras_vmoe.checkpoints.vit_npz import read_vit_npz


def read(path, progress=None):
    """Reads a checkpoint of a ViT or V-MoE in any of the formats known here.

    Args:
        path: A `.npz` file (`read_vit_npz`), the folder of an Orbax checkpoint
            (`read_orbax`), or the prefix of a sharded one (`read_vmoe`).
        progress: Optional function of `(bytes so far, bytes in all)`, called
            while a sharded checkpoint is read.

    Returns:
        Dict from the V-MoE program's names to numpy arrays.

    Raises:
        FileNotFoundError, CheckpointError, ImportError: As the functions named
            above.

    Example:

    >>> arrays = read("checkpoints/vmoe_b16")  # doctest: +SKIP
    """
    if str(path).endswith(".npz"):
        return read_vit_npz(path)
    if "://" not in str(path) and pathlib.Path(path).is_dir():
        return read_orbax(path)
    return read_vmoe(path, progress)
