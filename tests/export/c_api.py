"""An exported folder as TF Serving sees it: TensorFlow's C API, no Python.

TF Serving loads a SavedModel by the C++ loader that `libtensorflow_cc` holds,
and so does this module, by `ctypes`. It imports neither Keras nor Python's
TensorFlow.
"""

import contextlib
import ctypes
import dataclasses
import importlib
import importlib.util
import pathlib
import sys
import types

import numpy as np

STRING = 7  # TensorFlow's number of the type.
DTYPES = {
    1: "float32",
    2: "float64",
    3: "int32",
    4: "uint8",
    6: "int8",
    9: "int64",
    10: "bool",
    19: "float16",
}
TSTRING_BYTES = 24


class RefusedRequest(ValueError):
    """A request that TensorFlow answers with an error."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """An input or an output of a signature.

    Attributes:
        tensor: Name of the graph's tensor.
        dtype: TensorFlow's number of the type.
        shape: Tuple; None for a size that is not known.
    """

    tensor: str
    dtype: int
    shape: tuple


class Output(ctypes.Structure):
    """`TF_Output`: one of the tensors that an operation makes."""

    _fields_ = [("operation", ctypes.c_void_p), ("index", ctypes.c_int)]


class Buffer(ctypes.Structure):
    """`TF_Buffer`: bytes."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("length", ctypes.c_size_t),
        ("deallocator", ctypes.c_void_p),
    ]


class ServedModel:
    """A SavedModel in a session of TensorFlow's C API.

    Args:
        folder: Folder of one version, with a `saved_model.pb`.

    Call arguments:
        signature: Name of the signature.
        **inputs: An array for each of its inputs; a list of bytes for strings.
            They go to TensorFlow as they are, wrong ones as well.

    Returns:
        Dict of NumPy arrays by output name.

    Raises:
        OSError: If TensorFlow is not installed or cannot load the folder.
        RefusedRequest: If TensorFlow refuses a request.
        ValueError: If there is no such signature, or no longer a model.

    Runs on Linux, where TensorFlow's library has the name it is looked for.
    """

    def __init__(self, folder):
        self.tf = library()
        self.status = self.tf.TF_NewStatus()
        self.graph = self.tf.TF_NewGraph()
        options = self.tf.TF_NewSessionOptions()
        buffer = self.tf.TF_NewBuffer()
        tags = (ctypes.c_char_p * 1)(b"serve")
        self.session = self.tf.TF_LoadSessionFromSavedModel(
            options,
            None,
            str(folder).encode(),
            tags,
            1,
            self.graph,
            buffer,
            self.status,
        )
        self.tf.TF_DeleteSessionOptions(options)
        content = buffer.contents
        content = ctypes.string_at(content.data, content.length)
        self.tf.TF_DeleteBuffer(buffer)
        try:
            self._check(OSError)
        except OSError:
            self.close()
            raise
        self.meta_graph = _meta_graph(content)
        self.signatures = _signatures(self.meta_graph)

    def __call__(self, signature, **inputs):
        known, wanted = self._known(signature, inputs)
        infos = [known[name] for name in inputs]
        feeds = self._outputs(infos)
        fetches = self._outputs(wanted.values())
        got = (ctypes.c_void_p * len(wanted))()
        with contextlib.ExitStack() as stack:
            values = [
                stack.enter_context(self._tensor(np.asarray(value, object)))
                if info.dtype == STRING
                else stack.enter_context(self._tensor(np.asarray(value)))
                for value, info in zip(inputs.values(), infos, strict=True)
            ]
            tensors = (ctypes.c_void_p * len(values))(*values)
            self.tf.TF_SessionRun(
                self.session, None, feeds, tensors, len(values),
                fetches, got, len(wanted), None, 0, None, self.status,
            )  # fmt: skip
        self._check(RefusedRequest)
        try:
            return {
                name: self._array(tensor)
                for name, tensor in zip(wanted, got, strict=True)
            }
        finally:
            for tensor in got:
                self.tf.TF_DeleteTensor(tensor)

    def close(self):
        """Frees the weights; a closed model answers no more."""
        if self.session:
            self.tf.TF_CloseSession(self.session, self.status)
            self.tf.TF_DeleteSession(self.session, self.status)
        if self.graph:
            self.tf.TF_DeleteGraph(self.graph)
            self.tf.TF_DeleteStatus(self.status)
        self.session = self.graph = None

    def _known(self, signature, inputs):
        """The inputs and outputs of a signature, if it can be asked this."""
        if not self.session:
            raise ValueError(
                "A closed model answers no more. Received: a request for "
                f"{signature!r}. Load the folder again."
            )
        known, wanted = self.signatures.get(signature, ({}, {}))
        if not known or set(inputs) != set(known):
            raise ValueError(
                "A request must name a signature and its inputs. Received: "
                f"{signature!r} with {sorted(inputs)}. There are "
                f"{ {k: sorted(x) for k, (x, _) in self.signatures.items()} }."
            )
        return known, wanted

    def _check(self, error):
        if self.tf.TF_GetCode(self.status):
            raise error(self.tf.TF_Message(self.status).decode())

    def _outputs(self, infos):
        """`TF_Output`s by names such as `"call:0"`."""
        outputs = []
        for info in infos:
            name, _, index = info.tensor.partition(":")
            operation = self.tf.TF_GraphOperationByName(
                self.graph, name.encode()
            )
            outputs.append(Output(operation, int(index)))
        return (Output * len(outputs))(*outputs)

    @contextlib.contextmanager
    def _tensor(self, array):
        """A tensor of TensorFlow's with the values of an array."""
        dims = (ctypes.c_int64 * array.ndim)(*array.shape)
        strings = array.dtype == object
        names = {name: number for number, name in DTYPES.items()}
        bytes_only = strings and all(isinstance(x, bytes) for x in array.flat)
        if not bytes_only and array.dtype.name not in names:
            raise RefusedRequest(
                f"Inputs must be bytes or of {sorted(names)}. Received: "
                f"{array.dtype.name} in an array of shape {array.shape}. "
                "Convert them."
            )
        dtype = STRING if strings else names[array.dtype.name]
        size = TSTRING_BYTES * array.size if strings else array.nbytes
        tensor = self.tf.TF_AllocateTensor(dtype, dims, array.ndim, size)
        start = self.tf.TF_TensorData(tensor)
        places = range(array.size if strings else 0)
        if not strings:
            content = np.ascontiguousarray(array).tobytes()
            ctypes.memmove(start, content, len(content))
        for i, value in zip(places, array.flat, strict=False):
            self.tf.TF_StringInit(start + TSTRING_BYTES * i)
            self.tf.TF_StringCopy(start + TSTRING_BYTES * i, value, len(value))
        try:
            yield tensor
        finally:
            for i in places:
                self.tf.TF_StringDealloc(start + TSTRING_BYTES * i)
            self.tf.TF_DeleteTensor(tensor)

    def _array(self, tensor):
        """The values of a tensor of TensorFlow's."""
        dims = self.tf.TF_NumDims(tensor)
        shape = tuple(self.tf.TF_Dim(tensor, i) for i in range(dims))
        start = self.tf.TF_TensorData(tensor)
        dtype = self.tf.TF_TensorType(tensor)
        if dtype != STRING:
            content = ctypes.string_at(start, self.tf.TF_TensorByteSize(tensor))
            return np.frombuffer(content, DTYPES[dtype]).reshape(shape).copy()
        array = np.empty(int(np.prod(shape)), object)
        for i in range(len(array)):
            place = start + TSTRING_BYTES * i
            data = self.tf.TF_StringGetDataPointer(place)
            size = self.tf.TF_StringGetSize(place)
            array[i] = ctypes.string_at(data, size)
        return array.reshape(shape)


POINTER, TEXT = ctypes.c_void_p, ctypes.c_char_p
INT, LONG, SIZE = ctypes.c_int, ctypes.c_int64, ctypes.c_size_t
MANY = ctypes.POINTER
# What each function gives and takes.
FUNCTIONS = {
    "TF_AllocateTensor": (POINTER, INT, MANY(LONG), INT, SIZE),
    "TF_CloseSession": (None, POINTER, POINTER),
    "TF_DeleteBuffer": (None, MANY(Buffer)),
    "TF_DeleteGraph": (None, POINTER),
    "TF_DeleteSession": (None, POINTER, POINTER),
    "TF_DeleteSessionOptions": (None, POINTER),
    "TF_DeleteStatus": (None, POINTER),
    "TF_DeleteTensor": (None, POINTER),
    "TF_Dim": (LONG, POINTER, INT),
    "TF_GetCode": (INT, POINTER),
    "TF_GraphOperationByName": (POINTER, POINTER, TEXT),
    "TF_LoadSessionFromSavedModel": (
        POINTER, POINTER, POINTER, TEXT, MANY(TEXT), INT, POINTER,
        MANY(Buffer), POINTER,
    ),
    "TF_Message": (TEXT, POINTER),
    "TF_NewBuffer": (MANY(Buffer),),
    "TF_NewGraph": (POINTER,),
    "TF_NewSessionOptions": (POINTER,),
    "TF_NewStatus": (POINTER,),
    "TF_NumDims": (INT, POINTER),
    "TF_SessionRun": (
        None, POINTER, POINTER, MANY(Output), MANY(POINTER), INT,
        MANY(Output), MANY(POINTER), INT, POINTER, INT, POINTER, POINTER,
    ),
    "TF_StringCopy": (None, POINTER, TEXT, SIZE),
    "TF_StringDealloc": (None, POINTER),
    "TF_StringGetDataPointer": (POINTER, POINTER),
    "TF_StringGetSize": (SIZE, POINTER),
    "TF_StringInit": (None, POINTER),
    "TF_TensorByteSize": (SIZE, POINTER),
    "TF_TensorData": (POINTER, POINTER),
    "TF_TensorType": (INT, POINTER),
}  # fmt: skip


def library():
    """TensorFlow's shared library with the types of what is called."""
    spec = importlib.util.find_spec("tensorflow")
    if spec is None:
        raise OSError(
            "TensorFlow must be installed. Received: none. "
            "Install it with: pip install 'keras_vmoe[serving]'"
        )
    folder = pathlib.Path(spec.submodule_search_locations[0])
    # Without RTLD_GLOBAL: other libraries would take its symbols for theirs.
    ctypes.CDLL(str(folder / "libtensorflow_framework.so.2"))
    tf = ctypes.CDLL(str(folder / "libtensorflow_cc.so.2"))
    for name, (result, *arguments) in FUNCTIONS.items():
        function = getattr(tf, name)
        function.restype, function.argtypes = result, arguments
    return tf


@contextlib.contextmanager
def tensorflow_protos():
    """Lets TensorFlow's protos be imported without TensorFlow itself."""
    if "tensorflow" in sys.modules:
        yield
        return
    spec = importlib.util.find_spec("tensorflow")
    package = types.ModuleType("tensorflow")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["tensorflow"] = package
    try:
        yield
    finally:
        for name in list(sys.modules):
            if name.partition(".")[0] == "tensorflow":
                del sys.modules[name]


def _meta_graph(content):
    with tensorflow_protos():
        name = "tensorflow.core.protobuf.meta_graph_pb2"
        proto = importlib.import_module(name).MetaGraphDef()
    proto.ParseFromString(content)
    return proto


def _signatures(proto):
    """Inputs and outputs of every signature of a MetaGraphDef."""

    def infos(tensors):
        return {
            name: TensorInfo(x.name, x.dtype, shape_of(x.tensor_shape))
            for name, x in sorted(tensors.items())
        }

    return {
        name: (infos(signature.inputs), infos(signature.outputs))
        for name, signature in sorted(proto.signature_def.items())
        if not name.startswith("__")  # TensorFlow's own.
    }


def shape_of(proto):
    """The shape of a TensorShapeProto; None for unknown sizes."""
    return tuple(None if dim.size < 0 else dim.size for dim in proto.dim)
