"""What must be said before Keras, and TensorFlow with it, is imported."""

import os
import pathlib
import sys

from keras_vmoe._checks import nearest

BACKENDS = ("jax", "tensorflow", "torch")
PROGRAM = pathlib.Path(*sys.argv[:1]).stem  # Embedded, Python has none.
IS_MODULE = sys.orig_argv[1:3] == ["-m", "keras_vmoe.cli"]
IS_COMMAND = PROGRAM == "keras-vmoe" or IS_MODULE

if IS_COMMAND:  # Its output is for people.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
backend = os.environ.get("KERAS_BACKEND") or BACKENDS[0]
if backend not in (*BACKENDS, "numpy"):  # Enough for `data`.
    message = (
        f"KERAS_BACKEND must be one of {', '.join(BACKENDS)}. "
        f"Received: KERAS_BACKEND={backend}."
        f"{nearest(backend, BACKENDS)}"
    )
    if IS_COMMAND:
        message += " It is read before --backend: unset it, or set it right."
        sys.exit(f"keras-vmoe: error: {message}")
    raise ImportError(message)
