"""What computes in a process, for the others to compare."""

import hashlib
import importlib
import pathlib

import keras

from keras_vmoe.version import __version__

SOURCES = pathlib.Path(__file__).parents[1]


def versions():
    """The versions of all that decides what a process computes.

    The package's is followed by a hash of its source files, which tells two
    states of a working copy apart.

    Returns:
        Dict from `"keras_vmoe"`, `"keras"` and the backend's name to strings.

    Example:

    >>> versions()["keras"] == keras.__version__
    True
    """
    backend = keras.backend.backend()
    return {
        "keras_vmoe": f"{__version__} ({_hash_of(SOURCES)})",
        "keras": keras.__version__,
        backend: importlib.import_module(backend).__version__,
    }


def _hash_of(folder):
    """Of all Python files of a folder, and of their names."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        found.update(str(path.relative_to(folder)).encode())
        found.update(path.read_bytes())
    return found.hexdigest()[:12]
