"""Orbax checkpoints, as newer versions of the reference program save them."""

import math

import numpy as np

from keras_vmoe._extras import require
from keras_vmoe.checkpoints.files import CORRUPT
from keras_vmoe.checkpoints.files import MAX_COMPRESSION
from keras_vmoe.checkpoints.files import CheckpointError

STATE = "state"  # The program's folder of the training state.
# One of these is in the folder of every checkpoint, whatever its version.
MARKS = (STATE, "_METADATA", "_CHECKPOINT_METADATA", "checkpoint")


def holds_orbax(folder):
    """Whether a folder looks like an Orbax checkpoint."""
    return any((folder / mark).exists() for mark in MARKS)


def read_orbax(folder):
    """Reads arrays by name from a step's folder, or from the state in it."""
    orbax = require("orbax.checkpoint", "checkpoints")
    import jax

    folder = folder.resolve()
    if (folder / STATE).is_dir():
        folder = folder / STATE
    try:
        tree = _restore(orbax, folder)
    except CORRUPT as error:
        raise CheckpointError(
            "The folder must be a whole Orbax checkpoint. "
            f"Received: {folder} ({type(error).__name__}: {error})."
        ) from error
    tree = tree.get("params", tree) if isinstance(tree, dict) else {}
    arrays = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
    if not arrays:
        raise CheckpointError(
            "The checkpoint must hold a tree of arrays by name. "
            f"Received: {folder}, which holds none."
        )
    return arrays


def _restore(orbax, folder):
    """The tree of a checkpoint, as numpy arrays on any number of devices."""
    import jax

    with orbax.PyTreeCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(folder).item_metadata
        if metadata is None:
            raise ValueError("its metadata are missing")
        metadata = metadata.tree
        claimed = sum(
            math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
            for leaf in jax.tree.leaves(metadata)
            if getattr(leaf, "shape", None) is not None
        )
        files = (f for f in folder.rglob("*") if f.is_file())
        held = sum(file.stat().st_size for file in files)
        if claimed > MAX_COMPRESSION * held:
            raise ValueError(f"{held} bytes claim to hold {claimed}")
        arguments = jax.tree.map(
            lambda _: orbax.RestoreArgs(restore_type=np.ndarray), metadata
        )
        return checkpointer.restore(folder, restore_args=arguments)
