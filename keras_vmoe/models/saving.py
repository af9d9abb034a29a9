"""`.keras` files: written atomically, checked before reading."""

import math
import os
import pathlib
import zipfile

import keras

from keras_vmoe import _files
from keras_vmoe.distribution import _processes

# Overhead of HDF5 and zip files: one kilobyte per variable was measured.
SLACK, SLACK_PER_VARIABLE = 2**16, 2**12


def save(model: keras.Model, path: str | os.PathLike[str]) -> pathlib.Path:
    """Saves a model atomically: `path` is a complete file or absent.

    The file is written next to `path` under another name and then renamed: a
    full disk or a killed process leaves the previous file. With several
    processes all must call this, and the first writes.

    Args:
        model: A Keras model.
        path: Where to write, ending in `.keras`.

    Returns:
        The path, a `pathlib.Path`.

    Raises:
        ValueError: If `path` does not end in `.keras`.
        OSError: If the file cannot be written; the previous one is kept.

    Example:

    >>> save(model, "model.keras")  # doctest: +SKIP
    """
    path = pathlib.Path(path)
    _check_suffix(path)
    parts = path.with_name(f"{_files.PARTIAL}{path.name}.parts")
    variables = _processes.variables_of(model)
    with _processes.gathered(variables, parts) as writes:
        if writes:
            with _files.replacing(path, size_of(model)) as partial:
                model.save(partial)
    return path


def size_of(model):
    """An upper bound on the bytes of a model's file, optimizer included."""
    variables = _processes.variables_of(model)
    numbers = sum(
        math.prod(x.shape) * (8 if str(x.dtype).endswith("64") else 4)
        for x in variables
    )
    return numbers + SLACK + SLACK_PER_VARIABLE * len(variables)


def load(path: str | os.PathLike[str], compile: bool = True) -> keras.Model:
    """Loads a `.keras` file after checking that it is complete.

    Args:
        path: A `.keras` file.
        compile: Whether to restore optimizer, loss and metrics as well. A file
            that was compiled under another backend keeps that backend's
            `jit_compile`, which PyTorch takes for `torch.compile`.

    Returns:
        The model, compiled if it was saved compiled and `compile` is True.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not a model, truncated or corrupt.

    Example:

    >>> model = load("model.keras")  # doctest: +SKIP
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"A model file must exist. Received: path={str(path)!r}"
            f"{', a folder' if path.is_dir() else ''}. `keras-vmoe train` "
            "writes `model.keras` into its run folder."
        )
    _check_suffix(path)
    corruption = _corruption(path)
    if corruption:
        raise ValueError(
            f"The model file must be complete, but {corruption}. "
            f"Received: path={str(path)!r} of {path.stat().st_size} bytes. "
            "It may be truncated or corrupt: copy it again."
        )
    return keras.saving.load_model(path, compile=compile)


def _check_suffix(path):
    if path.suffix != ".keras":
        raise ValueError(
            f"A model file must end in '.keras'. Received: path={str(path)!r}. "
            "Name the model before other files."
        )


def _corruption(path):
    """What is wrong with a zip file, or None."""
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.testzip()
            if "config.json" not in archive.namelist():
                return "it is a zip archive without a model in it"
    except (zipfile.BadZipFile, EOFError) as error:
        return f"it is not a complete zip archive ({error})"
    return f"its member {member!r} is corrupt" if member else None
