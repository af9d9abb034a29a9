"""Warnings that show the line of the user, not one of this package."""

import sys
import traceback
import warnings


def warn(message):
    """Warns at the line that called this package, however deep this is."""
    names = [
        frame.f_globals.get("__name__", "")
        for frame, _ in traceback.walk_stack(sys._getframe())
    ]
    ours = [i for i, x in enumerate(names) if x.split(".")[0] == "keras_vmoe"]
    warnings.warn(message, stacklevel=max(ours) + 2)
