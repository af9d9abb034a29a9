"""Whole `.keras` files: written atomically, checked before they are read."""

import pathlib
import zipfile

import keras

from keras_vmoe import distribution


def save(model, path):
    """Saves a model so that `path` is always a whole file or none.

    The file is written beside `path` under another name and then renamed: a
    full disk or a killed process leaves the file that was there before. Of
    several processes all must call this, and the first writes.

    Args:
        model: A Keras model.
        path: Where to write, ending in `.keras`.

    Returns:
        The path, a `pathlib.Path`.

    Raises:
        ValueError: If `path` does not end in `.keras`.

    Example:

    >>> save(model, "model.keras")  # doctest: +SKIP
    """
    path = pathlib.Path(path)
    if path.suffix != ".keras":
        raise ValueError(
            f"A model file must end in '.keras'. Received: path={str(path)!r}."
        )
    partial = path.with_name(f".{path.stem}.partial.keras")
    with distribution.gathered(distribution.variables_of(model)) as writes:
        if writes:
            try:
                model.save(partial)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
    return path


def load(path, compile=True):
    """Loads a `.keras` file after checking that it is whole.

    Args:
        path: A `.keras` file.
        compile: Whether to restore optimizer, loss and metrics as well. A file
            that was compiled under another backend keeps that backend's
            `jit_compile`, which PyTorch takes for `torch.compile`.

    Returns:
        The model, compiled if it was saved so and `compile` says so.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no model, or cut short or damaged.

    Example:

    >>> model = load("model.keras")  # doctest: +SKIP
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"A model file must exist. Received: path={str(path)!r}. "
            "`keras-vmoe train` writes `model.keras` into its run folder."
        )
    if path.suffix != ".keras":
        raise ValueError(
            f"A model file must end in '.keras'. Received: path={str(path)!r}. "
            "Name the model first, other files behind it."
        )
    damage = _damage(path)
    if damage:
        raise ValueError(
            f"The model file must be whole, but {damage}. "
            f"Received: path={str(path)!r} of {path.stat().st_size} bytes. "
            "It was cut short or damaged in a copy: copy it again."
        )
    return keras.saving.load_model(path, compile=compile)


def _damage(path):
    """What is wrong with a zip file, or None."""
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.testzip()
            if "config.json" not in archive.namelist():
                return "it is a zip archive without a model in it"
    except (zipfile.BadZipFile, EOFError) as error:
        return f"it is not a complete zip archive ({error})"
    return f"its member {member!r} is damaged" if member else None
