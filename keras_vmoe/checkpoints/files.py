"""Checkpoint files, local or remote: read completely or rejected."""

import contextlib
import os
import pathlib
import struct

import numpy as np

from keras_vmoe._extras import require

MAX_COMPRESSION = 1040  # A little more than deflate reaches, with zeros.
# What libraries raise for corrupt files.
CORRUPT = (
    ArithmeticError, AttributeError, EOFError, LookupError,
    NotImplementedError, OSError, RuntimeError, SyntaxError, TypeError,
    ValueError,
)  # fmt: skip


# MessagePack: the code of small values, the bits of the value in it, and the
# formats of larger ones.
HEADERS = {
    "map": (0x80, 0x0F, {0xDE: ">H", 0xDF: ">I"}),
    "array": (0x90, 0x0F, {0xDC: ">H", 0xDD: ">I"}),
    "string": (0xA0, 0x1F, {0xD9: ">B", 0xDA: ">H", 0xDB: ">I"}),
    "byte string": (None, 0x00, {0xC4: ">B", 0xC5: ">H", 0xC6: ">I"}),
    "integer": (0x00, 0x7F, {0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q"}),
}
EXTENSIONS = {0xC7: ">B", 0xC8: ">H", 0xC9: ">I"}


class CheckpointError(ValueError):
    """A checkpoint is truncated, corrupt or of another format."""


@contextlib.contextmanager
def open_checkpoint(path):
    """Opens a checkpoint file as a `Reader`.

    TensorFlow opens paths with a scheme, such as `gs://`.
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
    """The error for a missing local file."""
    folder = pathlib.Path(path).parent
    found = sorted(str(p.with_suffix("")) for p in folder.glob("*.index"))
    return FileNotFoundError(
        "A checkpoint is named by its prefix, without `.index` and `.data-...`,"
        f" and all its files must exist. Received: {path}, which does not "
        f"exist. Checkpoints in its folder: {found or 'none'}."
    )


class Reader:
    """Reads bytes and MessagePack headers, never past the end of the file.

    Bytes are read directly into arrays. MessagePack libraries return copies: a
    checkpoint of one large array would take three times its size.
    """

    def __init__(self, file, path, size):
        self._file, self.path, self.size = file, path, size
        self.tell, self.seek = file.tell, file.seek

    def error(self, problem):
        """A `CheckpointError` about this file."""
        return CheckpointError(
            f"The checkpoint file must be whole. Received: {self.path}, where "
            f"{problem} (byte {self.tell()} of {self.size}). Copy or "
            "download it again."
        )

    def check_left(self, length):
        """Raises unless the file has `length` more bytes."""
        left = self.size - self.tell()
        if length > left:
            raise self.error(f"{length} bytes must follow and {left} are left")

    def read(self, length):
        """The next `length` bytes."""
        self.check_left(length)
        data = self._file.read(length)
        if len(data) != length:
            raise self.error("the file ends early")
        return data

    def advance(self, length):
        """Skips `length` bytes."""
        self.check_left(length)
        self.seek(self.tell() + length)

    def read_into(self, array):
        """Fills a contiguous array with the next bytes."""
        self.check_left(array.nbytes)
        target = memoryview(array.reshape(-1).view(np.uint8))
        if not hasattr(self._file, "readinto"):  # A remote file.
            target[:] = self.read(array.nbytes)
        elif self._file.readinto(target) != array.nbytes:
            raise self.error("the file ends early")

    def header(self, kind):
        """Reads the number in the header of the next value.

        Args:
            kind: `"map"` (its entries), `"array"` (its items), `"string"` or
                `"byte string"` (its bytes), or `"integer"` (its value).
        """
        small, mask, formats = HEADERS[kind]
        code = self.read(1)[0]
        if code & ~mask == small:
            return code & mask
        if code in formats:
            return self._number(formats[code])
        raise self.error(f"no {kind} starts with the byte {code:#04x}")

    def string(self):
        """Reads the next string."""
        data = self.read(self.header("string"))
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise self.error("a name is not in UTF-8") from None

    def extension_header(self):
        """Reads the `(type, length)` of the next extension."""
        code = self.read(1)[0]
        if 0xD4 <= code <= 0xD8:
            length = 1 << (code - 0xD4)
        elif code in EXTENSIONS:
            length = self._number(EXTENSIONS[code])
        else:
            raise self.error(f"no array starts with the byte {code:#04x}")
        kind = self._number(">b")
        self.check_left(length)
        return kind, length

    def _number(self, layout):
        return struct.unpack(layout, self.read(struct.calcsize(layout)))[0]
