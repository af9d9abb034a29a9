"""Exports run under the TensorFlow backend: here, or in a process of its own.

    python -m keras_vmoe.export.process FORMAT MODEL SETTINGS OUT [MODULE ...]

is that process.
"""

import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import warnings

import keras

from keras_vmoe import models
from keras_vmoe._extras import require
from keras_vmoe.export.errors import shortened

# Where a format is written: a module of this room, its settings and function.
FORMATS = {
    "saved_model": ("saved_model", "ServedSettings", "write_version"),
    "onnx": ("onnx", "ConvertSettings", "write_onnx"),
    "litert": ("litert", "ConvertSettings", "write_litert"),
}
ERRORS = {error.__name__: error for error in (ValueError, OSError, ImportError)}


def write(format, model, settings, path):
    """Writes a model in another format.

    Args:
        format: One of `FORMATS`.
        model: A Keras model that is not compiled.
        settings: What the format's function takes, with `to_json`.
        path: `pathlib.Path` that does not exist.

    Raises:
        ValueError: If the model cannot be built under TensorFlow.
        OSError: If the disk is full.
    """
    require("tensorflow", "tensorflow")
    if keras.backend.backend() == "tensorflow":
        _writer(format)(model, settings, path)
        return
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        folder = pathlib.Path(folder)
        models.save(model, folder / "model.keras")
        (folder / "settings.json").write_text(settings.to_json())
        files = (folder / "model.keras", folder / "settings.json", path)
        _run_process([format, *map(str, files), *sorted(_modules(model))])


def _modules(model):
    """Modules of all that is registered with Keras and stands in a model."""
    config = model.to_json()
    registered = keras.saving.get_custom_objects().items()
    found = [x for name, x in registered if f'"{name}"' in config]
    found += map(type, model._flatten_layers())
    return {x.__module__ for x in found}


def _run_process(arguments):
    """Runs `main` under the TensorFlow backend, and raises its errors here."""
    environment = {
        **os.environ,
        "KERAS_BACKEND": "tensorflow",
        "CUDA_VISIBLE_DEVICES": "-1",  # They belong to this process.
        "PYTHONPATH": os.pathsep.join(x or os.getcwd() for x in sys.path),
    }
    command = [sys.executable, "-m", "keras_vmoe.export.process", *arguments]
    done = subprocess.run(  # noqa: S603
        command, env=environment, capture_output=True, text=True
    )
    if done.returncode == 0:
        return
    lines = done.stdout.strip().splitlines()
    try:
        error = json.loads(lines[-1])
    except (IndexError, ValueError):
        raise RuntimeError(
            "The export under TensorFlow must end well. Received: exit status "
            f"{done.returncode} and this:\n{done.stderr[-2000:]}"
        ) from None
    if error["errno"] is not None:
        raise OSError(error["errno"], error["message"])
    raise ERRORS[error["kind"]](error["message"])


def _writer(format):
    module, _, function = FORMATS[format]
    module = importlib.import_module(f"keras_vmoe.export.{module}")
    return getattr(module, function)


def _settings(format, text):
    kind = FORMATS[format][1]
    module = importlib.import_module("keras_vmoe.export.settings")
    return getattr(module, kind).from_json(text)


def main(arguments):
    """The process: prints an error as one line of JSON."""
    format, model, settings, path, *modules = arguments
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            settings = _settings(format, pathlib.Path(settings).read_text())
            model = _load(model, modules)
            _writer(format)(model, settings, pathlib.Path(path))
    except tuple(ERRORS.values()) as error:
        kinds = (kind for kind in ERRORS if isinstance(error, ERRORS[kind]))
        number = getattr(error, "errno", None)
        message = str(error) if number is None else error.strerror
        found = {"kind": next(kinds), "message": message, "errno": number}
        print(json.dumps(found))
        return 1
    return 0


def _load(path, modules):
    """The model, under TensorFlow, after the modules of its layers."""
    try:
        for module in modules:
            importlib.import_module(module)
        return models.load(path, compile=False)
    except (AttributeError, TypeError, ValueError, ImportError) as error:
        raise ValueError(
            "The model must load under the TensorFlow backend in a new "
            f"process. Received: {_cause(error)} Put layers and functions of "
            "your own into a module that can be imported (not the script "
            "itself), register them by "
            "keras.saving.register_keras_serializable, and use keras.ops in "
            "them. In the place of a Lambda take such a layer."
        ) from error


def _cause(error):
    """The words of what an error began with, without what Keras adds."""
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__
    return f"{type(error).__name__}: {shortened(error)}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
