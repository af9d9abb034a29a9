"""Keras files: weights of a model of another image size."""

import dataclasses
import pathlib
import shutil
import tempfile

import h5py
import numpy as np

from keras_vmoe import models
from keras_vmoe._warnings import warn
from keras_vmoe.checkpoints.assignment import check_model
from keras_vmoe.checkpoints.assignment import fit_positions
from keras_vmoe.checkpoints.assignment import grid_of
from keras_vmoe.checkpoints.assignment import some
from keras_vmoe.layers.positions import pair

KERAS_FILES = (".weights.h5", ".keras")
# Where Keras writes the variables of `LearnedPositions`.
POSITIONS = "layers/learned_positions/vars"


def load_keras(model, path, grid=None):
    """Loads a Keras file into a `ViTMoE`, and resizes its learned positions.

    Takes the arguments of `checkpoints.load`. Leaves out the head of a `.keras`
    file with other classes.
    """
    if isinstance(model, models.ConvNeXtMoE):
        raise TypeError(
            "Keras files are only read into a ViTMoE here, to resize its "
            f"positions. Received: model={model.name!r}, a ConvNeXtMoE. "
            "`models.load` opens its .keras files, `model.load_weights` reads "
            ".weights.h5, and `checkpoints.load_keras_applications` takes a "
            "model of keras.applications."
        )
    check_model(model, models.ViTMoE)
    config, path = model.get_config(), pathlib.Path(path)
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "copy.weights.h5")
        if path.suffix == ".keras":
            source = models.load(path, compile=False)
            source.save_weights(file)
            grid = grid or grid_of(source)
            config["num_classes"] = source.num_classes
            config["preprocessing"] = dataclasses.asdict(source.preprocessing)
        else:
            shutil.copyfile(path, file)
        _resize(file, model, grid)
        loaded = type(model).from_config(config)
        _compare(file, loaded, path)
        loaded.load_weights(file)
    model.preprocessing = loaded.preprocessing
    if loaded.num_classes == model.num_classes:
        model.set_weights(loaded.get_weights())
        return model
    if model.num_classes is not None:
        warn(
            f"The head of the file has {loaded.num_classes or 0} classes and "
            f"that of the model {model.num_classes}: the model keeps its own."
        )
    for layer in model.layers:
        if layer.name != "head":
            layer.set_weights(loaded.get_layer(layer.name).get_weights())
    return model


def _compare(file, model, path):
    """Raises, before a weight changes, unless a file fits the model.

    Keras would ignore weights that the model lacks.
    """
    own = file.with_name("own.weights.h5")
    model.save_weights(own)
    found, expected = _shapes(file), _shapes(own)
    names = found.keys() | expected.keys()
    words = [
        f"{name} {found.get(name, 'missing')} for {expected.get(name, 'none')}"
        for name in sorted(names)
        if found.get(name) != expected.get(name)
    ]
    if words:
        raise ValueError(
            "The file must hold the weights of a model with equal settings. "
            f"Received: {path}, where these differ: {some(words)}. Make the "
            "model with the settings of the file."
        )


def _shapes(file):
    """Shapes of a model's weights in a file, by path."""
    shapes = {}

    def see(name, item):
        if isinstance(item, h5py.Dataset) and not name.startswith("optimizer"):
            shapes[name] = item.shape

    with h5py.File(file) as weights:
        weights.visititems(see)
    return shapes


def _resize(file, model, grid):
    """Resizes the positions in a file of weights to the patches of a model."""
    with h5py.File(file, "r+") as weights:
        learned = model.position_embedding == "learned"
        if POSITIONS not in weights or not learned:
            return
        stored, name = weights[POSITIONS], "0"
        rows, columns = new_grid = grid_of(model)
        if "grid" in stored:  # Not in files of version 0.1.0.
            own = tuple(map(int, stored["grid"]))
            if pair("grid", grid or own) != own:
                raise ValueError(
                    "`grid` must match the file. "
                    f"Received: grid={grid} for {own}. Leave it out."
                )
            grid = own
            del stored["grid"]
        shape = tuple(model.get_layer("positions").embedding.shape)
        resized = None
        if grid is not None or rows == columns:
            resized = fit_positions(stored[name][()], model, grid)
        if np.shape(resized) != shape:
            raise ValueError(
                "`grid`, the (rows, columns) of the file's patches, must be "
                "given unless its images and the model's are square. Received: "
                f"grid={grid} for positions of shape {stored[name].shape}."
            )
        del stored[name]
        stored[name], stored["grid"] = resized, new_grid
