"""Exports run under the TensorFlow backend: here, or in a process of its own.

    python -m keras_vmoe.export.process WRITER FOLDER OUT [MODULE ...]

is that process. FOLDER has the model and the settings.
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
from keras_vmoe.export.agreement import LONGEST
from keras_vmoe.export.agreement import agree
from keras_vmoe.export.variants import layers_of
from keras_vmoe.models.cloning import clone_around

MODEL, SETTINGS = "model.keras", "settings.pickle"
ERROR = "keras_vmoe export: "  # Begins the line that tells one; disks are full.
ADVICE = (
    "Put layers and functions of your own into a module that can be imported "
    "(not the script itself), register them by "
    "keras.saving.register_keras_serializable, use keras.ops in them, and keep "
    "what they know in weights or in their configuration. In the place of a "
    "Lambda take such a layer."
)
ERRORS = {error.__name__: error for error in (ValueError, OSError, ImportError)}
# What Python raises of layers and converters that cannot do something.
FAILURES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError,
    RuntimeError, TypeError, ValueError,
)  # fmt: skip


def write(writer, model, settings, path):
    """Writes a model in another format, and checks what was written.

    Args:
        writer: Function of a module, from model, settings and path.
        model: A Keras model.
        settings: `Settings`.
        path: `pathlib.Path` that does not exist.

    Raises:
        ValueError: If the model cannot be built under TensorFlow, or if what
            was written says something else.
        OSError: If the disk is full.
    """
    require("tensorflow", "tensorflow")
    model = clone_around(model)  # Not compiled, its graph our own.
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
    """TensorFlow warns of gradients that a served function does not have."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def named_errors(expected, advice, *kinds):
    """Errors of layers and converters as one of ours.

    Theirs are of many kinds, which have nothing in common.

    Args:
        expected: What must work.
        advice: Sentence that says how to mend it.
        *kinds: Further errors than Python's own.
    """
    try:
        yield
    except (*FAILURES, *kinds) as error:
        cause = error  # What it began with, without what Keras adds.
        while cause.__cause__ is not None or cause.__context__ is not None:
            cause = cause.__cause__ or cause.__context__
        words = textwrap.shorten(f"{type(cause).__name__}: {cause}", LONGEST)
        raise ValueError(f"{expected}. Received: {words} {advice}") from error


def _modules(model):
    """Modules of all that is registered with Keras and stands in a model."""
    config = model.to_json()
    registered = keras.saving.get_custom_objects().items()
    found = [x for name, x in registered if f'"{name}"' in config]
    found += map(type, layers_of(model))
    return {x.__module__ for x in found}


def _run_process(arguments):
    """Runs `main` under the TensorFlow backend, and raises its errors here."""
    environment = {
        **os.environ,
        "KERAS_BACKEND": "tensorflow",
        "CUDA_VISIBLE_DEVICES": "-1",  # They belong to this process.
        "PYTHONPATH": os.pathsep.join(x or os.getcwd() for x in sys.path),
    }
    theirs, ours = os.pipe()  # It ends with this process.
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
            "The export under TensorFlow must end well. Received: exit status "
            f"{done.returncode} and this:\n{done.stderr[-2000:]}"
        )
    kind, *words = json.loads(lines[-1].removeprefix(ERROR))
    raise ERRORS[kind](*words)


def main(arguments):
    """The process: prints an error as a line of JSON."""
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
    """Ends this process when the other has, however that came."""
    while os.read(0, 1):
        pass
    os._exit(1)


def _load(path, modules):
    """The model, after the modules of its layers."""
    expected = "The model must load under TensorFlow in a new process"
    with named_errors(expected, ADVICE):
        for module in modules:
            importlib.import_module(module)
        return models.load(path, compile=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
