"""Checkpoints, from which a killed training run resumes."""

import itertools
import json
import pathlib
import shutil
import zlib

import keras

from keras_vmoe import _files
from keras_vmoe._checks import check_sizes
from keras_vmoe._warnings import warn
from keras_vmoe.distribution import _processes
from keras_vmoe.distribution import _shards
from keras_vmoe.models.saving import size_of

NAME = "epoch_{:06d}"
WEIGHTS, PARTS, STATE = ".weights.h5", ".parts", ".json"
UNFINISHED = "*.orbax-checkpoint-tmp*"  # Folders of killed processes.
# Errors from a corrupt state file or a missing weights file.
CORRUPT = (FileNotFoundError, KeyError, TypeError, ValueError)


# Not `keras.callbacks.BackupAndRestore` or `ModelCheckpoint`: a kill while they
# write replaces the last good file with a corrupt one, they keep neither the
# noise nor the history, and several processes would all write.
class Checkpoints:
    """The checkpoints in a folder, one per epoch; the newest are kept.

    A checkpoint is a Keras weights file, with the weights, the optimizer state
    and the seeds of the routers' noise. A small state file next to it has its
    checksum. Several processes write an Orbax folder instead, each its own
    parts, and the state file has the sizes of the files. The state file is
    written last: a checkpoint without one does not count. Any number of
    processes can read both kinds.

    Args:
        folder: Folder of the checkpoints, created with the first.
        keep: Number of checkpoints to keep, at least 1.
    """

    def __init__(self, folder, keep=2):
        check_sizes(keep=keep)
        self.folder = pathlib.Path(folder)
        self.keep = keep

    def save(self, model, epoch, state):
        """Saves a checkpoint and a state, then removes the oldest ones.

        A full disk raises an OSError and leaves the others unchanged.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / NAME.format(epoch)
        if _processes.num_processes() == 1:
            found = _save_file(model, path.with_suffix(WEIGHTS))
        else:
            found = _save_parts(model, path.with_suffix(PARTS))
        if found is None:  # The first process writes the rest.
            return
        state = {**state, "epoch": epoch, **found}
        text = json.dumps(state, default=lambda array: array.tolist())
        _files.write_text(path.with_suffix(STATE), text)
        for old in self.epochs()[: -self.keep]:
            path = self.folder / NAME.format(old)
            # The state file first: without it the weights do not count.
            path.with_suffix(STATE).unlink(missing_ok=True)
            path.with_suffix(WEIGHTS).unlink(missing_ok=True)
            shutil.rmtree(path.with_suffix(PARTS), ignore_errors=True)

    def restore(self, model):
        """Restores the newest intact checkpoint and warns of corrupt ones.

        Returns the saved state, with `epoch` and with arrays as lists, or None
        without a checkpoint. The model must be compiled and have the same
        variables, or a ValueError is raised.
        """
        for epoch in reversed(self.epochs()):
            path = self.folder / NAME.format(epoch)
            try:
                state = json.loads(path.with_suffix(STATE).read_text())
                if "files" in state:
                    _check_parts(path.with_suffix(PARTS), state["files"])
                elif state["crc32"] != _checksum(path.with_suffix(WEIGHTS)):
                    raise ValueError("its checksum is wrong")
            except CORRUPT as error:
                warn(
                    f"The checkpoint {path} is corrupt ({error}) and is "
                    "skipped."
                )
                # The file is kept, but no longer counts as a checkpoint.
                if _processes.is_first_process():
                    path.with_suffix(STATE).replace(
                        path.with_suffix(".corrupt")
                    )
                continue
            model.optimizer.build(model.trainable_variables)
            if "files" in state:
                _load_parts(model, path.with_suffix(PARTS), state["variables"])
            else:
                model.load_weights(path.with_suffix(WEIGHTS))
            return state
        return None

    def epochs(self):
        """Returns the epochs of all checkpoints, in order."""
        stems = (path.stem for path in self.folder.glob(f"epoch_*{STATE}"))
        return sorted(int(stem.removeprefix("epoch_")) for stem in stems)


class SaveCheckpoint(keras.callbacks.Callback):
    """Saves a checkpoint after every epoch, with its history and routing."""

    def __init__(self, checkpoints, history, routing):
        super().__init__()
        self.checkpoints = checkpoints
        self.history = history
        self.routing = routing

    def on_epoch_end(self, epoch, logs=None):
        state = {"rows": self.history.rows, "routing": self.routing.epochs}
        self.checkpoints.save(self.model, epoch + 1, state)


def _save_file(model, path):
    """Writes a weights file; returns the entries of its state file."""
    with _files.replacing(path, size_of(model)) as partial:
        model.save_weights(partial, overwrite=True)
        return {"crc32": _checksum(partial)}


def _save_parts(model, folder):
    """Writes a folder with parts from every process.

    Returns the entries of its state file to the first process, None to the
    others.
    """
    is_first = _processes.is_first_process()
    if is_first:
        for unfinished in folder.parent.glob(UNFINISHED):
            shutil.rmtree(unfinished, ignore_errors=True)
    variables = _processes.variables_of(model)
    _shards.save(folder, variables)
    if not is_first:
        return None
    files = {
        file.relative_to(folder).as_posix(): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    return {"files": files, "variables": _names(variables)}


def _names(variables):
    """The path and the shape of each variable."""
    return [[x.path, list(x.shape)] for x in variables]


def _check_parts(folder, files):
    """Raises unless all files exist with their recorded sizes."""
    for name, size in files.items():
        held = (folder / name).stat().st_size
        if held != size:
            raise ValueError(f"{name} has {held} of {size} bytes")


def _load_parts(model, folder, names):
    """Assigns the variables of a folder; all processes must take part."""
    variables = _processes.variables_of(model)
    nothing = ["no variable", None]
    pairs = itertools.zip_longest(_names(variables), names, fillvalue=nothing)
    for mine, theirs in pairs:
        if mine[1] != theirs[1]:  # Paths may hold automatic names.
            raise ValueError(
                "A checkpoint must have the model's variables. Received: "
                f"{folder}, with {theirs} where the model has {mine}. Restore "
                "it into the model that it was saved from."
            )
    _shards.restore(folder, variables)


def _checksum(path):
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum
