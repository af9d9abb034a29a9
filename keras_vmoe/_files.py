"""Files and folders that are written completely or not at all."""

import contextlib
import errno
import glob
import os
import pathlib
import shutil
import socket
import tempfile
import time

PARTIAL = ".partial."  # Prefix of the names of unfinished files.
STALE_SECONDS = 24 * 3600  # Nothing takes so long to write.
# From file systems that cannot reserve space: only writing tells.
UNABLE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


def write_text(path, text):
    """Writes a text file atomically.

    Args:
        path: `pathlib.Path` to write.
        text: String.

    Raises:
        OSError: If it cannot be written; what was there before is kept.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


@contextlib.contextmanager
def replacing(path, size=0):
    """A name to write a file under, which then replaces another.

    After a kill, a full disk or a loss of power the previous file is still
    there. Another process that writes the same file waits.

    Args:
        path: `pathlib.Path` of the file.
        size: Bytes that are reserved on the disk before anything is written.

    Yields:
        `pathlib.Path` with the suffixes of `path`.

    Raises:
        OSError: If writing raises one, or h5py its RuntimeError.
    """
    partial = path.with_name(PARTIAL + path.name)
    lock = partial.with_name(f"{partial.name}.lock")
    try:
        with _held(lock, waits=True):  # Two would write into one file,
            try:
                reserve(path.parent, size)
                yield partial
                _to_disk(partial)
                partial.replace(path)
            finally:  # or remove each other's.
                partial.unlink(missing_ok=True)
            if os.name != "nt":  # Where a folder cannot be opened.
                _to_disk(path.parent)
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"A file must be written completely. Received: {path} ({error}). "
            "The previous file is kept; free some space and run the command "
            "again."
        ) from error


@contextlib.contextmanager
def creating(path):
    """A name to write a new file or folder under, which is then renamed.

    Args:
        path: `pathlib.Path` that must not exist; its parent is made.

    Yields:
        `pathlib.Path` of the same name in a scratch folder beside it.

    Raises:
        FileExistsError: If the path exists.
        OSError: If nothing can be written there.
    """
    _check_new(path)
    with scratch(path.parent, path.name) as folder:
        try:
            yield folder / path.name
            _check_new(path)  # Others may have been faster.
            _name(folder / path.name, path)
        except OSError as error:
            if error.errno is None:  # One of ours.
                raise
            _check_new(path)
            raise OSError(
                "A file or folder must be written completely. Received: "
                f"{str(path)!r} ({error.strerror}), of which nothing is left. "
                "Free some space, or choose another folder."
            ) from error


@contextlib.contextmanager
def scratch(parent, name):
    """A temporary folder, removed with its contents.

    Those that killed processes left for the same name a day ago are removed,
    too.

    Args:
        parent: `pathlib.Path` of the folder around it; made if there is none.
        name: What it is for.

    Yields:
        `pathlib.Path` of the folder.

    Raises:
        OSError: If `parent` cannot be written to.
    """
    is_new = not parent.exists()
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(dir=parent, prefix=f"{PARTIAL}{name}.")
    except OSError as error:
        _remove_empty(parent, is_new)
        raise type(error)(
            "The folder must be one that can be written to. Received: "
            f"{str(parent)!r} ({error.strerror}). Choose another one."
        ) from error
    try:
        yield pathlib.Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _remove_stale(parent, name)
        _remove_empty(parent, is_new)


def lock_of(folder):
    """The file that is there while a process holds a folder, or was killed."""
    return folder / f"{PARTIAL}lock"


@contextlib.contextmanager
def locked(folder):
    """Holds a folder for this process alone, until it leaves or dies.

    Args:
        folder: `pathlib.Path` of a folder that exists.

    Raises:
        BlockingIOError: If another process holds it.
    """
    path = lock_of(folder)
    try:
        with _held(path) as file:
            if file is not None:
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
            yield
    except _Taken as error:
        raise BlockingIOError(
            "A run folder belongs to one process at a time. Received: "
            f"{str(folder)!r}, which {error.args[0] or 'another'} writes to. "
            "Wait for it or name another folder."
        ) from error


class _Taken(Exception):
    """A lock file is held by a process, of which it says something."""


@contextlib.contextmanager
def _held(path, waits=False):
    """Holds a lock file, which is removed in the end and dies with a process.

    Yields:
        The file, or None where there are no locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows.
        yield None
        return
    with contextlib.ExitStack() as stack:
        while True:
            file = stack.enter_context(open(path, "a+"))
            try:
                how = fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB)
                fcntl.flock(file, how)
            except BlockingIOError as error:
                file.seek(0)
                raise _Taken(file.read()) from error
            except OSError as error:  # A file system without locks.
                if error.errno not in (*UNABLE, errno.ENOLCK):
                    raise
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                    break  # Or another has just removed it.
        try:
            yield file
        finally:
            path.unlink(missing_ok=True)


def reserve(folder, size):
    """Raises unless a file of a size fits into a folder, before it is written.

    HDF5 does not survive a full disk: it prints hundreds of errors and crashes
    the process when it closes the file.

    Args:
        folder: `pathlib.Path`.
        size: Bytes.

    Raises:
        OSError: If the disk is full, or the file larger than is allowed.
    """
    if not size:
        return
    path = folder / f"{PARTIAL}space"
    try:
        with open(path, "wb") as file:
            _allocate(file, size)
    except OSError as error:
        if error.errno not in UNABLE:
            raise
    finally:
        path.unlink(missing_ok=True)


def _allocate(file, size):
    """Allocates the blocks of a file, by writing them if there is no call."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    for start in range(0, size, 2**20):
        file.write(bytes(min(2**20, size - start)))


def _to_disk(path):
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _name(source, path):
    """Gives a whole file or folder a name that nothing has."""
    if source.is_file():
        # Renamed, it would replace a file that another has just written.
        try:
            os.link(source, path)
            return
        except OSError as error:  # A file system without links.
            if error.errno not in (*UNABLE, errno.EPERM):
                raise
    os.rename(source, path)


def _remove_stale(parent, name):
    for leftover in parent.glob(f"{glob.escape(PARTIAL + name)}.*"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)


def _remove_empty(folder, is_new):
    """Removes a new folder in which nothing was written."""
    if is_new:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _check_new(path):
    """Raises if something has this name."""
    if path.exists():
        raise FileExistsError(
            "Nothing is overwritten. Received: "
            f"{str(path)!r}, which exists. Choose another version or name."
        )
