"""Files of a run, written so that each is always whole."""

import contextlib
import csv
import errno
import io
import math
import os

from keras_vmoe import distribution
from keras_vmoe import models

# What HDF5 and zip files take beside the numbers: one kilobyte per variable was
# measured.
SLACK, SLACK_PER_VARIABLE = 2**16, 2**12
# Where a file system cannot set space aside: it is then found out by writing.
UNABLE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


def write_csv(path, rows):
    """Writes rows as CSV, atomically.

    Args:
        path: `pathlib.Path` to write.
        rows: List of dicts; the columns are all their keys, in order.

    Raises:
        OSError: As `write_file`.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue())


def write_file(path, text):
    """Writes a text file, atomically.

    Args:
        path: `pathlib.Path` to write.
        text: String.

    Raises:
        OSError: If it cannot be written; what was there before is kept.
    """
    partial = path.with_name(f".{path.name}.partial")
    with named(path):
        try:
            partial.write_text(text, newline="")
            commit(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def save_model(model, path):
    """Saves a model atomically, if there is space for all of it.

    Args:
        model: A Keras model.
        path: `pathlib.Path` to write, ending in `.keras`.

    Raises:
        OSError: If it cannot be written; what was there before is kept.
    """
    with named(path):
        if distribution.is_first_process():
            reserve(path.parent, size_of(model))
        models.save(model, path)
        if distribution.is_first_process():
            _to_disk(path)


@contextlib.contextmanager
def named(path):
    """Lets a file that cannot be written be one message that names it.

    Args:
        path: The file that is written inside of a `with`.

    Raises:
        OSError: If writing raises one, or h5py its RuntimeError.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"A file must be written whole. Received: {path} ({error}). What "
            "was there before is kept; free some space and run the command "
            "again."
        ) from error


def reserve(folder, size):
    """Raises unless a file of a size fits into a folder, before it is written.

    HDF5 cannot be refused space half-way: it prints hundreds of errors and
    crashes the process when it closes the file.

    Args:
        folder: `pathlib.Path`.
        size: Bytes.

    Raises:
        OSError: If the disk is full, or the file larger than is allowed.
    """
    scratch = folder / ".space.partial"
    try:
        with open(scratch, "wb") as file:
            _allocate(file, size)
    except OSError as error:
        if error.errno not in UNABLE:
            raise
    finally:
        scratch.unlink(missing_ok=True)


def _allocate(file, size):
    """Gives a file its blocks, by writing them where nothing else can."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    for start in range(0, size, 2**20):
        file.write(bytes(min(2**20, size - start)))


def size_of(model):
    """Bytes that a file of a model and its optimizer takes, at the most."""
    variables = distribution.variables_of(model)
    numbers = sum(
        math.prod(x.shape) * (8 if str(x.dtype).endswith("64") else 4)
        for x in variables
    )
    return numbers + SLACK + SLACK_PER_VARIABLE * len(variables)


def commit(partial, path):
    """Gives a written file its name, so that a loss of power spares one.

    Args:
        partial: `pathlib.Path` of the file.
        path: `pathlib.Path` in the same folder.
    """
    _to_disk(partial)
    partial.replace(path)
    if os.name != "nt":  # Where a folder cannot be opened.
        _to_disk(path.parent)


def _to_disk(path):
    """Waits until a file or folder is on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
