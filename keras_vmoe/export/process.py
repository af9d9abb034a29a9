"""Exports run under the TensorFlow backend: here, or in a process of its own.

    python -m keras_vmoe.export.process FORMAT FOLDER OUT [MODULE ...]

is that process. FOLDER has the model, the settings and what the model says.
"""

import contextlib
import importlib
import json
import logging
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import warnings

import keras
import numpy as np
from keras import ops

from keras_vmoe import models
from keras_vmoe._extras import require
from keras_vmoe.export.check import distance
from keras_vmoe.export.check import tolerance_of
from keras_vmoe.export.errors import shortened
from keras_vmoe.export.variants import answering
from keras_vmoe.export.variants import routed

# Where a format is written: a module of this room, its settings and function.
FORMATS = {
    "saved_model": ("saved_model", "ServedSettings", "write_version"),
    "onnx": ("onnx", "ConvertSettings", "write_onnx"),
    "litert": ("litert", "ConvertSettings", "write_litert"),
}
MODEL, SETTINGS = "model.keras", "settings.json"
ANSWERS = "answers.npz"
ERROR = "keras_vmoe export: "  # Begins the line that tells one; disks are full.
BATCH = 4  # Images that the model is asked on both sides.
ROUNDING = 100  # How much more an accelerator rounds than a CPU.
ADVICE = (
    "Put layers and functions of your own into a module that can be imported "
    "(not the script itself), register them by "
    "keras.saving.register_keras_serializable, use keras.ops in them, and keep "
    "what they know in weights or in their configuration. In the place of a "
    "Lambda take such a layer."
)
ERRORS = {error.__name__: error for error in (ValueError, OSError, ImportError)}


def write(format, model, settings, path):
    """Writes a model in another format.

    Args:
        format: One of `FORMATS`.
        model: A Keras model that is not compiled.
        settings: What the format's function takes, with `to_json`.
        path: `pathlib.Path` that does not exist.

    Raises:
        ValueError: If the model cannot be built under TensorFlow, or says
            something else there.
        OSError: If the disk is full.
    """
    require("tensorflow", "tensorflow")
    settings = type(settings).from_json(settings.to_json())  # As the process.
    if keras.backend.backend() == "tensorflow":
        with _quiet():
            _writer(format)(model, settings, path)
        return
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        folder = pathlib.Path(folder)
        models.save(model, folder / MODEL)
        (folder / SETTINGS).write_text(settings.to_json())
        np.savez(folder / ANSWERS, **_answers(model, settings.routing))
        modules = sorted(_modules(model))
        _run_process([format, str(folder), str(path), *modules])


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


def _answers(model, dials):
    """What the model says of a few images, the same on every backend.

    Returns:
        Dict of the outputs as arrays, and `tolerance`.
    """
    shape = (BATCH, *model.input_shape[1:])
    images = np.random.default_rng(0).uniform(-1, 1, shape).astype("float32")
    with _full_precision():
        outputs = answering(routed(model, dials))(images, training=False)
    places = {str(x.device).lower() for x in outputs.values()}
    rounding = 1 if all("cpu" in place for place in places) else ROUNDING
    arrays = {k: ops.convert_to_numpy(x) for k, x in outputs.items()}
    return {**arrays, "tolerance": tolerance_of(model) * rounding}


@contextlib.contextmanager
def _full_precision():
    """Accelerators may round products of float32 to fewer bits."""
    if keras.backend.backend() == "jax":
        import jax

        with jax.default_matmul_precision("float32"):
            yield
    elif keras.backend.backend() == "torch":
        import torch

        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    else:
        yield


def _check_reloaded(given, right):
    """Raises unless the model says here what it said on its backend.

    A token whose choice hangs on the last bit may go to another expert here;
    but hardly one of every image.
    """
    tolerance = given.pop("tolerance")
    nearest = min(
        max(distance(given[name][i], right[name][i]) for name in given)
        for i in range(BATCH)
    )
    if not nearest <= max(tolerance, right["tolerance"]):
        raise ValueError(
            "The model must say under TensorFlow what it says on its own "
            f"backend. Received: outputs that differ by {nearest:.1e} or "
            f"more. {ADVICE}"
        )


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
    theirs, ours = os.pipe()  # It ends with this process.
    try:
        done = subprocess.run(  # noqa: S603
            command,
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
    error = json.loads(lines[-1].removeprefix(ERROR))
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
    """The process: prints an error as a line of JSON."""
    format, folder, path, *modules = arguments
    folder = pathlib.Path(folder)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            settings = _settings(format, (folder / SETTINGS).read_text())
            model, given = _load(folder / MODEL, modules, settings.routing)
            with np.load(folder / ANSWERS) as right:
                _check_reloaded(given, dict(right))
            _writer(format)(model, settings, pathlib.Path(path))
    except tuple(ERRORS.values()) as error:
        kinds = (kind for kind in ERRORS if isinstance(error, ERRORS[kind]))
        number = getattr(error, "errno", None)
        message = str(error) if number is None else error.strerror
        found = {"kind": next(kinds), "message": message, "errno": number}
        print(f"\n{ERROR}{json.dumps(found)}", flush=True)
        return 1
    return 0


def _end_with_parent():
    """Ends this process when the other has, however that came."""
    while os.read(0, 1):
        pass
    os._exit(1)


def _load(path, modules, dials):
    """The model, after the modules of its layers, and its answers here."""
    try:
        for module in modules:
            importlib.import_module(module)
        model = models.load(path, compile=False)
        return model, _answers(model, dials)
    except Exception as error:
        raise ValueError(
            "The model must load under the TensorFlow backend in a new "
            f"process. Received: {_cause(error)} {ADVICE}"
        ) from error


def _cause(error):
    """The words of what an error began with, without what Keras adds."""
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__
    return f"{type(error).__name__}: {shortened(error)}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
