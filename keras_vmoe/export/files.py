"""Names that appear when what they name is whole."""

import contextlib
import os
import pathlib
import shutil
import tempfile


@contextlib.contextmanager
def new_path(parent, name):
    """A path to write to, which gets its name when all went well.

    Args:
        parent: `pathlib.Path`; made if there is none.
        name: Name in it, which must not exist.

    Yields:
        `pathlib.Path` of a file or folder to make.

    Raises:
        FileExistsError: If the name exists.
        OSError: If nothing can be written there.
    """
    final = parent / name
    _check_new(final)
    with _partial(parent, name) as partial:
        try:
            yield partial / name
            _check_new(final)  # Others may have been faster.
            os.rename(partial / name, final)
        except OSError as error:
            if error.errno is None:  # It says all already.
                raise
            _check_new(final)
            raise OSError(
                "The export must be written whole. Received: "
                f"{str(final)!r} ({error.strerror}), of which nothing is left. "
                "Free space on the disk, or choose another place."
            ) from error


@contextlib.contextmanager
def _partial(parent, name):
    """A folder in another, which goes with all that it still holds."""
    is_new = not parent.exists()
    try:
        parent.mkdir(parents=True, exist_ok=True)
        partial = tempfile.mkdtemp(
            dir=parent, prefix=f".{name}.", suffix=".partial"
        )
    except OSError as error:
        _remove_empty(parent, is_new)
        raise OSError(
            "The folder must be one that can be written to. Received: "
            f"{str(parent)!r} ({error.strerror}). Choose another one."
        ) from error
    try:
        yield pathlib.Path(partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _remove_empty(parent, is_new)


def _remove_empty(folder, is_new):
    """Removes a folder of ours in which nothing came to be."""
    if is_new:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _check_new(path):
    """Raises if something has this name."""
    if path.exists():
        raise FileExistsError(
            "An export overwrites nothing. Received: "
            f"{str(path)!r}, which exists. Choose another version or name."
        )
