"""Files of checkpoints, local or remote: read completely or refused."""

import contextlib
import os
import pathlib
import struct

import numpy as np

from keras_vmoe._extras import require

MAX_COMPRESSION = 1040  # Of zeros by deflate: a little less.
# What libraries raise for corrupt files.
CORRUPT = (
    ArithmeticError, AttributeError, EOFError, LookupError,
    NotImplementedError, OSError, RuntimeError, SyntaxError, TypeError,
    ValueError,
)  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint is truncated, corrupt or of another format."""


@contextlib.contextmanager
def open_checkpoint(path):
    """Opens a file of a checkpoint for reading.

    Args:
        path: A local path, or one with a scheme such as `gs://`, which is
            opened by TensorFlow.

    Yields:
        A `Reader`.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If it cannot be opened, or is a folder.
        ImportError: If a remote path is given without TensorFlow.
    """
    path = os.fspath(path)
    if "://" not in path:
        try:
            file = open(path, "rb")
        except FileNotFoundError as error:
            raise _missing(path) from error
        with file:
            yield Reader(file, path, os.fstat(file.fileno()).st_size)
        return
    tensorflow = require("tensorflow", "tensorflow")
    try:
        size = tensorflow.io.gfile.stat(path).length
    except tensorflow.errors.NotFoundError as error:
        raise FileNotFoundError(f"There is no file {path}.") from error
    except tensorflow.errors.OpError as error:
        raise OSError(
            "A remote checkpoint must be readable by TensorFlow. "
            f"Received: {path} ({error.message})."
        ) from error
    with tensorflow.io.gfile.GFile(path, "rb") as file:
        yield Reader(file, path, size)


def _missing(path):
    """The error for a local file that is not there."""
    folder = pathlib.Path(path).parent
    found = sorted(str(p.with_suffix("")) for p in folder.glob("*.index"))
    return FileNotFoundError(
        "A checkpoint is named by its prefix, without `.index` and `.data-...`,"
        f" and all its files must be there. Received: {path}, which does not "
        f"exist. Checkpoints in its folder: {found or 'none'}."
    )


class Reader:
    """Reads bytes and MessagePack headers, never beyond the end of the file.

    Arrays are read directly into their memory. A MessagePack library returns
    copies: a checkpoint of one large array would take three times its size.

    Attributes:
        path: Name of the file, for messages.
        size: Bytes of the file.
    """

    def __init__(self, file, path, size):
        self._file = file
        self.path = path
        self.size = size

    def error(self, problem):
        """A `CheckpointError` about this file."""
        return CheckpointError(
            f"The checkpoint file must be whole. Received: {self.path}, where "
            f"{problem} (byte {self._file.tell()} of {self.size}). Copy or "
            "download it again."
        )

    def tell(self):
        return self._file.tell()

    def seek(self, position):
        self._file.seek(position)

    def check_left(self, length):
        """Raises unless `length` more bytes are in the file."""
        left = self.size - self._file.tell()
        if length > left:
            raise self.error(f"{length} bytes must follow and {left} are there")

    def read(self, length):
        """The next `length` bytes."""
        self.check_left(length)
        data = self._file.read(length)
        if len(data) != length:
            raise self.error("the file ends early")
        return data

    def advance(self, length):
        """Passes over `length` bytes."""
        self.check_left(length)
        self._file.seek(self._file.tell() + length)

    def read_into(self, array):
        """Fills a contiguous array with the next bytes."""
        self.check_left(array.nbytes)
        target = memoryview(array.reshape(-1).view(np.uint8))
        if not hasattr(self._file, "readinto"):  # A remote file.
            target[:] = self.read(array.nbytes)
        elif self._file.readinto(target) != array.nbytes:
            raise self.error("the file ends early")

    def map_header(self):
        """Number of entries of the map that starts here."""
        return self._header("map", 0x80, 0x0F, {0xDE: ">H", 0xDF: ">I"})

    def array_header(self):
        """Number of items of the array that starts here."""
        return self._header("array", 0x90, 0x0F, {0xDC: ">H", 0xDD: ">I"})

    def string(self):
        """The string that starts here."""
        formats = {0xD9: ">B", 0xDA: ">H", 0xDB: ">I"}
        data = self.read(self._header("string", 0xA0, 0x1F, formats))
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise self.error("a name is not in UTF-8") from None

    def bytes_header(self):
        """Length of the byte string that starts here."""
        formats = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I"}
        return self._header("byte string", None, 0, formats)

    def extension_header(self):
        """`(type, length)` of the extension that starts here."""
        code = self.read(1)[0]
        formats = {0xC7: ">B", 0xC8: ">H", 0xC9: ">I"}
        if 0xD4 <= code <= 0xD8:
            length = 1 << (code - 0xD4)
        elif code in formats:
            length = self._number(formats[code])
        else:
            raise self.error(f"an array should start, not a byte {code:#04x}")
        kind = self._number(">b")
        self.check_left(length)
        return kind, length

    def integer(self):
        """The unsigned integer that starts here."""
        formats = {0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q"}
        return self._header("size", 0x00, 0x7F, formats)

    def _header(self, what, small, mask, formats):
        code = self.read(1)[0]
        if small is not None and code & ~mask == small:
            return code & mask
        if code in formats:
            return self._number(formats[code])
        raise self.error(f"a {what} should start, not a byte {code:#04x}")

    def _number(self, layout):
        return struct.unpack(layout, self.read(struct.calcsize(layout)))[0]
