"""What must be said before Keras, and TensorFlow with it, is imported."""

import os
import pathlib
import signal
import sys

from keras_vmoe._checks import nearest

BACKENDS = ("jax", "tensorflow", "torch")
PROGRAM = pathlib.Path(*sys.argv[:1]).stem  # Embedded, Python has none.
IS_MODULE = sys.orig_argv[1:3] == ["-m", "keras_vmoe.cli"]
IS_COMMAND = PROGRAM == "keras-vmoe" or IS_MODULE


def _stop(number, frame):
    """Ends a command that is still being imported."""
    print("\nkeras-vmoe: stopped", file=sys.stderr, flush=True)
    os._exit(128 + number)


if IS_COMMAND:  # Its output is for people.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for _number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_number, _stop)
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
