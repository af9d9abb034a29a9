"""Variables of several processes on a shared disk, stored by Orbax.

Each process writes and reads its own parts, one variable at a time.
"""

import contextlib

import numpy as np

from keras_vmoe._extras import require


def save(folder, variables):
    """Writes variables to a folder; all processes must call it.

    Args:
        folder: `pathlib.Path`; it has this name once it is complete.
        variables: Keras variables.
    """
    largest = max(x.value.nbytes for x in variables)
    with _checkpointer(largest) as checkpointer:
        values = {_name(i): _value(x) for i, x in enumerate(variables)}
        checkpointer.save(folder.resolve(), values, force=True)


def restore(folder, variables):
    """Assigns the values that `save` wrote to variables of the same shapes.

    Processes, devices and shardings may differ; all processes must call it.
    """
    with _reader(folder) as read:
        for i, variable in enumerate(variables):
            value = variable.value
            is_spread = not getattr(value, "is_fully_addressable", True)
            sharding = value.sharding if is_spread else None
            variable.assign(read(i, sharding))


class Stored:
    """An array in a folder, read whenever NumPy asks for it."""

    def __init__(self, folder, index):
        self.folder = folder
        self.index = index

    def __array__(self, dtype=None, copy=None):
        with _reader(self.folder) as read:
            return np.asarray(read(self.index), dtype)


def _name(index):
    return f"{index:05d}"


def _value(variable):
    """An array as Orbax takes it: spread over the processes, or NumPy's."""
    value = variable.value
    return np.asarray(value) if value.is_fully_addressable else value


def _checkpointer(largest=None, **processes):
    """Orbax's checkpointer, which copies about `largest` bytes at a time."""
    orbax = require("orbax.checkpoint", "checkpoints")
    gigabytes = None if largest is None else (largest + 1024) / 1e9
    options = orbax.options.MultiprocessingOptions(**processes)
    handler = orbax.PyTreeCheckpointHandler(
        save_device_host_concurrent_gb=gigabytes,
        multiprocessing_options=options,
    )
    return orbax.Checkpointer(handler, multiprocessing_options=options)


@contextlib.contextmanager
def _reader(folder):
    """A function that reads a variable, whole or in a sharding.

    It waits for no other process.
    """
    orbax = require("orbax.checkpoint", "checkpoints")
    import jax

    this = jax.process_index()
    alone = {"primary_host": this, "active_processes": {this}}
    with _checkpointer(
        barrier_sync_key_prefix=str(this), **alone
    ) as checkpointer:

        def read(index, sharding=None):
            how = orbax.RestoreArgs(restore_type=np.ndarray)
            if sharding is not None:
                how = orbax.ArrayRestoreArgs(sharding=sharding)
            name = _name(index)
            options = orbax.args.PyTreeRestore(
                item={name: 0},
                restore_args={name: how},
                partial_restore=True,
            )
            return checkpointer.restore(folder.resolve(), args=options)[name]

        yield read
