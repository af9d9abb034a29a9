"""Checkpoints of a run: what a killed training continues from."""

import json
import pathlib
import zlib

import keras

from keras_vmoe import _files
from keras_vmoe._checks import check_sizes
from keras_vmoe._warnings import warn
from keras_vmoe.distribution import _processes
from keras_vmoe.models.saving import size_of

NAME = "epoch_{:06d}"
WEIGHTS, STATE = ".weights.h5", ".json"
# What a corrupt state file raises, or a missing weights file.
CORRUPT = (FileNotFoundError, KeyError, TypeError, ValueError)


# Not `keras.callbacks.BackupAndRestore` or `ModelCheckpoint`: a kill while they
# write leaves a corrupt file in place of the last good one, they keep neither
# the noise nor the history, and several processes would all write.
class Checkpoints:
    """The checkpoints in a folder, one per epoch; the newest are kept.

    A checkpoint is a Keras weights file, with the weights, the optimizer state
    and the seeds of the routers' noise, and next to it a small state file with
    its checksum. The state file is written last: a checkpoint without one does
    not count.

    Args:
        folder: Folder of the checkpoints; made when the first is saved.
        keep: How many to keep, at least 1.
    """

    def __init__(self, folder, keep=2):
        check_sizes(keep=keep)
        self.folder = pathlib.Path(folder)
        self.keep = keep

    def save(self, model, epoch, state):
        """Saves a checkpoint and a state, then removes the oldest ones.

        On a full disk it raises an OSError, and the others stay as they are.
        """
        variables = _processes.variables_of(model)
        with _processes.gathered(variables) as writes:
            if writes:
                self._write(model, epoch, state)

    def _write(self, model, epoch, state):
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / NAME.format(epoch)
        weights = path.with_suffix(WEIGHTS)
        with _files.replacing(weights, size_of(model)) as partial:
            model.save_weights(partial, overwrite=True)
            checksum = _checksum(partial)
        state = {**state, "epoch": epoch, "crc32": checksum}
        text = json.dumps(state, default=lambda array: array.tolist())
        _files.write_text(path.with_suffix(STATE), text)
        for old in self.epochs()[: -self.keep]:
            path = self.folder / NAME.format(old)
            # The state file first: without it the weights do not count.
            path.with_suffix(STATE).unlink(missing_ok=True)
            path.with_suffix(WEIGHTS).unlink(missing_ok=True)

    def restore(self, model):
        """Restores the newest intact checkpoint and warns of corrupt ones.

        Returns the state that was saved, with `epoch` and with arrays as lists;
        None without a checkpoint. The model must be compiled.
        """
        for epoch in reversed(self.epochs()):
            path = self.folder / NAME.format(epoch)
            weights = path.with_suffix(WEIGHTS)
            try:
                state = json.loads(path.with_suffix(STATE).read_text())
                if state["crc32"] != _checksum(weights):
                    raise ValueError("its checksum is wrong")
            except CORRUPT as error:
                warn(
                    f"The checkpoint {weights} is corrupt ({error}) and is "
                    "skipped."
                )
                # The file is kept, but no longer counts as a checkpoint.
                if _processes.is_first_process():
                    path.with_suffix(STATE).replace(
                        path.with_suffix(".corrupt")
                    )
                continue
            model.optimizer.build(model.trainable_variables)
            model.load_weights(weights)
            return state
        return None

    def epochs(self):
        """The epochs of all checkpoints, in order."""
        stems = (path.stem for path in self.folder.glob(f"epoch_*{STATE}"))
        return sorted(int(stem.removeprefix("epoch_")) for stem in stems)


class SaveCheckpoint(keras.callbacks.Callback):
    """Saves a checkpoint after every epoch, with what `state()` returns."""

    def __init__(self, checkpoints, state):
        super().__init__()
        self.checkpoints = checkpoints
        self.state = state

    def on_epoch_end(self, epoch, logs=None):
        self.checkpoints.save(self.model, epoch + 1, self.state())


def _checksum(path):
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum
