"""Files of Keras: weights of a model of another image size."""

import pathlib
import shutil
import tempfile

import h5py

from keras_vmoe import models
from keras_vmoe.checkpoints.assignment import check_model
from keras_vmoe.checkpoints.assignment import fit_positions
from keras_vmoe.checkpoints.assignment import grid_of

KERAS_FILES = (".weights.h5", ".keras")
# Where Keras writes the variables of `LearnedPositions`.
POSITIONS = "layers/learned_positions/vars"


def load_keras(model, path, grid=None):
    """Loads a file of Keras into a `ViTMoE`, its learned positions resized.

    The arguments are those of `checkpoints.load`.
    """
    check_model(model, models.ViTMoE)
    path = pathlib.Path(path)
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder, "copy.weights.h5")
        if path.suffix == ".keras":
            source = models.load(path, compile=False)
            source.save_weights(copy)
            grid = grid or grid_of(source)
        else:
            shutil.copyfile(path, copy)
        with h5py.File(copy, "r+") as file:
            if POSITIONS in file:
                stored = file[POSITIONS]
                resized = fit_positions(stored["0"][()], model, grid)
                del stored["0"]
                stored["0"] = resized
        model.load_weights(copy)
    return model
