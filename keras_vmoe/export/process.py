"""Exports run under the TensorFlow backend, here or in a child process.

    python -m keras_vmoe.export.process WRITER FOLDER OUT [MODULE ...]

runs the child. FOLDER holds the model and the settings.
"""

import contextlib
import importlib
import json
import logging
import os
import pathlib
import pickle
import subprocess
import sys
import tempfile
import textwrap
import threading
import warnings

import keras

from keras_vmoe import models
from keras_vmoe._extras import require
from keras_vmoe._keras import all_layers
from keras_vmoe.export.agreement import LONGEST
from keras_vmoe.export.agreement import agree
from keras_vmoe.models.cloning import clone_around

MODEL, SETTINGS = "model.keras", "settings.pickle"
ERROR = "keras_vmoe export: "  # Starts the line of output with an error.
ADVICE = (
    "Put custom layers and functions into an importable module (not "
    "the script itself), register them with "
    "keras.saving.register_keras_serializable, use keras.ops in them, and keep "
    "their state in weights or in their config. Replace a Lambda with such a "
    "layer."
)
ERRORS = {error.__name__: error for error in (ValueError, OSError, ImportError)}


def write(writer, model, settings, path):
    """Writes a model in another format, and checks the result.

    Args:
        writer: Module-level function of model, settings and path.
        model: A Keras model.
        settings: `Settings`.
        path: `pathlib.Path` that does not exist.

    Raises:
        ValueError: If the model cannot be built under TensorFlow, or if the
            export does not reproduce its outputs.
        OSError: If the disk is full.
    """
    require("tensorflow", "tensorflow")
    model = clone_around(model)  # Uncompiled, with new layers.
    if keras.backend.backend() == "tensorflow":
        with _quiet():
            writer(model, settings, path)
    else:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
            models.save(model, pathlib.Path(folder, MODEL))
            pathlib.Path(folder, SETTINGS).write_bytes(pickle.dumps(settings))
            modules = sorted(_modules(model))
            name = f"{writer.__module__}:{writer.__name__}"
            _run_process([name, folder, str(path), *modules])
    agree(path, model, settings)


@contextlib.contextmanager
def _quiet():
    """Hides TensorFlow's warning that a served function has no gradients."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def named_errors(expected, advice):
    """Turns errors of layers and converters, of any type, into a ValueError.

    Args:
        expected: What was expected.
        advice: Sentence that says how to fix it.
    """
    try:
        yield
    except (OSError, MemoryError):  # The machine's, not the model's.
        raise
    except Exception as error:
        cause = error  # Follow the chain to the first, without Keras's words.
        while cause.__cause__ is not None or cause.__context__ is not None:
            cause = cause.__cause__ or cause.__context__
        words = textwrap.shorten(f"{type(cause).__name__}: {cause}", LONGEST)
        raise ValueError(f"{expected}. Received: {words} {advice}") from error


def _modules(model):
    """Returns the modules of a model's layers and registered objects."""
    config = model.to_json()
    registered = keras.saving.get_custom_objects().items()
    found = [x for name, x in registered if f'"{name}"' in config]
    found += map(type, all_layers(model))
    return {x.__module__ for x in found}


def _run_process(arguments):
    """Runs `main` under the TensorFlow backend, and raises its errors here."""
    environment = {
        **os.environ,
        "KERAS_BACKEND": "tensorflow",
        "CUDA_VISIBLE_DEVICES": "-1",  # This process holds the GPUs.
        "PYTHONPATH": os.pathsep.join(x or os.getcwd() for x in sys.path),
    }
    theirs, ours = os.pipe()  # Closed when this process ends.
    try:
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-m", __spec__.name, *arguments],
            env=environment,
            stdin=theirs,
            capture_output=True,
            text=True,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    if done.returncode == 0:
        return
    lines = [x for x in done.stdout.splitlines() if x.startswith(ERROR)]
    if not lines:
        raise RuntimeError(
            "The export under TensorFlow must succeed. Received: exit status "
            f"{done.returncode} with:\n{done.stderr[-2000:]}"
        )
    kind, *words = json.loads(lines[-1].removeprefix(ERROR))
    raise ERRORS[kind](*words)


def main(arguments):
    """Runs in the child process; prints an error as a line of JSON."""
    writer, folder, path, *modules = arguments
    module, _, name = writer.partition(":")
    folder = pathlib.Path(folder)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            settings = pickle.loads((folder / SETTINGS).read_bytes())  # noqa: S301
            model = _load(folder / MODEL, modules)
            writer = getattr(importlib.import_module(module), name)
            writer(model, settings, pathlib.Path(path))
    except tuple(ERRORS.values()) as error:
        kind = next(x for x in ERRORS if isinstance(error, ERRORS[x]))
        number = getattr(error, "errno", None)
        words = [str(error)] if number is None else [number, error.strerror]
        print(f"\n{ERROR}{json.dumps([kind, *words])}", flush=True)
        return 1
    return 0


def _end_with_parent():
    """Ends this process when its parent ends, for whatever reason."""
    while os.read(0, 1):
        pass
    os._exit(1)


def _load(path, modules):
    """Imports the modules of the layers, then loads the model."""
    expected = "The model must load under TensorFlow in a new process"
    with named_errors(expected, ADVICE):
        for module in modules:
            importlib.import_module(module)
        return models.load(path, compile=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
