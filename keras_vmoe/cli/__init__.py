"""The command `keras-vmoe`."""

import io
import os
import pathlib
import shlex
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from collections.abc import Sequence

import keras

from keras_vmoe import training
from keras_vmoe._extras import require
from keras_vmoe.cli.evaluating import compare
from keras_vmoe.cli.evaluating import fewshot
from keras_vmoe.cli.evaluating import probe
from keras_vmoe.cli.evaluating import robustness
from keras_vmoe.cli.evaluating import sweep
from keras_vmoe.cli.exporting import export_model
from keras_vmoe.cli.inspecting import inspect
from keras_vmoe.cli.opening import restart
from keras_vmoe.cli.papers import convert
from keras_vmoe.cli.papers import presets
from keras_vmoe.cli.running import evaluate
from keras_vmoe.cli.running import predict
from keras_vmoe.cli.running import train
from keras_vmoe.distribution import _processes
from keras_vmoe.training.checkpointing import Checkpoints
from keras_vmoe.training.run_folder import CHECKPOINTS
from keras_vmoe.training.run_folder import CONFIG

COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "fewshot": fewshot,
    "probe": probe,
    "robustness": robustness,
    "sweep": sweep,
    "compare": compare,
    "inspect": inspect,
    "export": export_model,
    "convert": convert,
    "presets": presets,
}
ALARM = getattr(signal, "SIGALRM", None)  # Windows has none.
SECONDS = 5  # Until a stop that code has swallowed, as imports do, is repeated.
# Errors that users can fix are printed as one message; any other is a bug and
# keeps its traceback.
USER_ERRORS = (
    ImportError,
    OSError,
    ValueError,
    training.callbacks.NonFiniteLossError,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `keras-vmoe` and returns its exit status.

    The status is 1 after a printed error, 130 after Ctrl-C and 143 after
    SIGTERM.

    Args:
        arguments: Command line without the program's name; None means
            `sys.argv`.
    """
    # Before TensorFlow, whose messages the errors repeat, reads the images.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # Names in any alphabet.
            stream.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    formatwarning = warnings.formatwarning
    # Source lines would not help users.
    warnings.formatwarning = lambda x, *_: f"keras-vmoe: warning: {x}\n"
    status, settings = 1, {}
    stops, previous = [], {}

    def stop(number, frame):
        if number != ALARM:
            stops.append(number)
        _ring_in(SECONDS)
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        for number in filter(None, (signal.SIGINT, signal.SIGTERM, ALARM)):
            previous[number] = signal.signal(number, stop)
    try:
        require("jsonargparse", "cli")
        from keras_vmoe.cli.parser import parse

        name, settings, backend = parse(COMMANDS, arguments)
        if backend not in (None, keras.backend.backend()):
            restart(backend, arguments)
        COMMANDS[name](**settings)
        status = 0
    except BaseException as error:
        # Libraries in C++ turn a KeyboardInterrupt into errors of their own.
        if stops:
            _ring_in(0)
            status = 128 + stops[0]
            words = _how_to_resume(**settings)
            print(f"\nkeras-vmoe: stopped{words}", file=sys.stderr)
        elif isinstance(error, USER_ERRORS):
            print(f"keras-vmoe: error: {error}", file=sys.stderr)
        else:
            raise
    finally:
        if stops:  # All of it may have been swallowed.
            _ring_in(0)
        warnings.formatwarning = formatwarning
        for number, handler in previous.items():
            signal.signal(number, handler)
        if _processes.num_processes() > 1:
            if sys.exc_info()[1] is not None:
                traceback.print_exc()
            _processes.leave(status)
    return status


def _ring_in(seconds):
    if ALARM:
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _how_to_resume(config=None, seeds=(), **_):
    """What a stopped run has saved, and the command that resumes it."""
    if config is None:
        return ""
    if seeds:
        return ". Repeat the command to resume"
    run_dir = pathlib.Path(config.run_dir)
    done = max(Checkpoints(run_dir / CHECKPOINTS).epochs(), default=0)
    if not done:
        return " before its first epoch was saved"
    command = f"keras-vmoe train --config {shlex.quote(str(run_dir / CONFIG))}"
    return f" after epoch {done} of {config.epochs}. Resume with: {command}"
