"""The command `keras-vmoe`."""

import os
import sys
import traceback

from keras_vmoe import training
from keras_vmoe._extras import require
from keras_vmoe.cli.exporting import export_model
from keras_vmoe.cli.opening import restart
from keras_vmoe.cli.papers import convert
from keras_vmoe.cli.papers import presets
from keras_vmoe.cli.parser import make_parser
from keras_vmoe.cli.parser import normalized
from keras_vmoe.cli.parser import recipe_of
from keras_vmoe.cli.running import evaluate
from keras_vmoe.cli.running import predict
from keras_vmoe.cli.running import train
from keras_vmoe.distribution import _processes

COMMANDS = {
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "export": lambda settings, arguments: _export(settings, arguments),
    "convert": convert,
    "presets": presets,
}
# What users can mend is printed as one message; anything else is a bug and
# keeps its traceback.
USER_ERRORS = (
    ImportError,
    OSError,
    ValueError,
    training.callbacks.NonFiniteLossError,
)


def main(arguments=None):
    """Runs `keras-vmoe`.

    Args:
        arguments: Command line without the program's name; None means that of
            the process.

    Returns:
        Exit status: 0, or 1 after an error whose message was printed.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    arguments = normalized(arguments)
    try:
        jsonargparse = require("jsonargparse", "cli")
        parser = make_parser(jsonargparse, recipe_of(arguments))
        settings = parser.instantiate(parser.parse_args(arguments))
        command = settings.subcommand
        COMMANDS[command](settings[command], arguments)
    except USER_ERRORS as error:
        print(f"keras-vmoe: error: {error}", file=sys.stderr)
        _leave_others()
        return 1
    except Exception:
        if _processes.num_processes() > 1:
            traceback.print_exc()
        _leave_others()
        raise
    return 0


def _export(settings, arguments):  # merge: goes with typed commands.
    settings = dict(vars(settings))
    if settings["backend"] not in (None, keras.backend.backend()):
        restart(settings["backend"], arguments)
    del settings["backend"]
    export_model(**settings)


def _leave_others():
    """Ends this process at once if it is one of several.

    JAX would wait for the others, which may wait for this one.
    """
    if _processes.num_processes() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
