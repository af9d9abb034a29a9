"""Orbax checkpoints, as newer versions of the reference program save them."""

import math
import pathlib

import numpy as np

from keras_vmoe._extras import require
from keras_vmoe.checkpoints.files import CheckpointError

MAX_COMPRESSION = 1040  # As of `.npz` files.
STATE = "state"  # What the program calls the folder of the training state.


def read_orbax(directory):
    """Reads an Orbax checkpoint of the reference program.

    Args:
        directory: The folder of one step, such as `workdir/ckpt/1000`, or that
            of the training state in it.

    Returns:
        Dict from the reference's names to numpy arrays, as of `read_vmoe`. Of a
        training state only the parameters are returned.

    Raises:
        FileNotFoundError: If there is no such folder.
        CheckpointError: If Orbax cannot read it.
        ImportError: If orbax-checkpoint is missing, which needs JAX.

    Example:

    >>> arrays = read_orbax("workdir/ckpt/1000")  # doctest: +SKIP
    """
    orbax = require("orbax.checkpoint", "checkpoints")
    if "://" in str(directory):
        raise ValueError(
            "`directory` must be a local folder. "
            f"Received: directory={str(directory)!r}. Copy it first."
        )
    directory = pathlib.Path(directory).resolve()
    if not directory.is_dir():
        raise FileNotFoundError(f"There is no folder {directory}.")
    sharded = sorted(path.stem for path in directory.glob("*.index"))
    if sharded:
        raise ValueError(
            "The folder must hold an Orbax checkpoint. "
            f"Received: {directory}, with the sharded checkpoints {sharded}. "
            f"Name one of them: {directory / sharded[0]}."
        )
    if (directory / STATE).is_dir():
        directory = directory / STATE
    try:
        tree = _restore(orbax, directory)
    except Exception as error:  # Orbax and its libraries raise all kinds.
        raise CheckpointError(
            "The folder must be a whole Orbax checkpoint. "
            f"Received: {directory} ({type(error).__name__}: {error})."
        ) from error
    tree = tree.get("params", tree) if isinstance(tree, dict) else {}
    arrays = dict(_flatten(tree))
    if not arrays:
        raise CheckpointError(
            "The checkpoint must hold a tree of arrays by name. "
            f"Received: {directory}, which holds none."
        )
    return arrays


def _restore(orbax, directory):
    """The tree of a checkpoint, as numpy arrays on any number of devices."""
    import jax

    with orbax.PyTreeCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(directory).item_metadata
        if metadata is None:
            raise ValueError("its metadata are missing")
        metadata = metadata.tree
        claimed = sum(
            math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
            for leaf in jax.tree.leaves(metadata)
            if getattr(leaf, "shape", None) is not None
        )
        files = (f for f in directory.rglob("*") if f.is_file())
        held = sum(file.stat().st_size for file in files)
        if claimed > MAX_COMPRESSION * held:
            raise ValueError(f"{held} bytes claim to hold {claimed}")
        arguments = jax.tree.map(
            lambda _: orbax.RestoreArgs(restore_type=np.ndarray), metadata
        )
        return checkpointer.restore(directory, restore_args=arguments)


def _flatten(tree, prefix=""):
    if not isinstance(tree, dict):
        tree = dict(enumerate(tree))
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, (dict, list, tuple)):
            yield from _flatten(value, f"{name}/")
        elif value is not None:
            yield name, np.asarray(value)
