"""An exported folder as TF Serving sees it: TensorFlow's C API, no Python.

TF Serving loads a SavedModel by the C++ loader that `libtensorflow_cc` holds,
and so does this module, by `ctypes`. It imports neither Keras nor Python's
TensorFlow, so that it runs by itself as well:

    python served.py FOLDER [--rounds 20] [--save outputs.npz]

replays the requests of the folder's warm-up file and prints, as JSON, what
came out.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import importlib
import importlib.util
import json
import pathlib
import resource
import sys
import time
import types

import numpy as np

WARMUP = pathlib.Path("assets.extra", "tf_serving_warmup_requests")
CARD = pathlib.Path("assets.extra", "model_card.json")
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

    Example:

    >>> served = ServedModel("served/1")  # doctest: +SKIP
    >>> served("serving_default", images=images)  # doctest: +SKIP
    """

    def __init__(self, folder):
        self.tf = _library()
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
        self._check(OSError)
        graph = buffer.contents
        content = ctypes.string_at(graph.data, graph.length)
        self.tf.TF_DeleteBuffer(buffer)
        self.signatures = _signatures(content)

    def __call__(self, signature, **inputs):
        known, wanted = self.signatures[signature]
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
        """Frees the weights."""
        self.tf.TF_CloseSession(self.session, self.status)
        self.tf.TF_DeleteSession(self.session, self.status)
        self.tf.TF_DeleteGraph(self.graph)
        self.tf.TF_DeleteStatus(self.status)

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


def _library():
    """TensorFlow's shared library with the types of what is called."""
    spec = importlib.util.find_spec("tensorflow")
    if spec is None:
        raise OSError(
            "TensorFlow must be installed. Received: none. "
            "Install it with: pip install 'keras_vmoe[serving]'"
        )
    folder = pathlib.Path(spec.submodule_search_locations[0])
    framework = folder / "libtensorflow_framework.so.2"
    ctypes.CDLL(str(framework), ctypes.RTLD_GLOBAL)
    tf = ctypes.CDLL(str(folder / "libtensorflow_cc.so.2"))
    tf.TF_NewBuffer.restype = ctypes.POINTER(Buffer)
    tf.TF_Message.restype = ctypes.c_char_p
    for name in ("TF_Dim", "TF_TensorByteSize", "TF_StringGetSize"):
        getattr(tf, name).restype = ctypes.c_int64
    for name in (
        "TF_NewStatus",
        "TF_NewGraph",
        "TF_NewSessionOptions",
        "TF_LoadSessionFromSavedModel",
        "TF_GraphOperationByName",
        "TF_AllocateTensor",
        "TF_TensorData",
        "TF_StringGetDataPointer",
    ):
        getattr(tf, name).restype = ctypes.c_void_p
    for name, count in (
        ("TF_GetCode", 1),
        ("TF_Message", 1),
        ("TF_DeleteSessionOptions", 1),
        ("TF_DeleteGraph", 1),
        ("TF_DeleteStatus", 1),
        ("TF_CloseSession", 2),
        ("TF_DeleteSession", 2),
        ("TF_DeleteTensor", 1),
        ("TF_TensorData", 1),
        ("TF_TensorType", 1),
        ("TF_TensorByteSize", 1),
        ("TF_NumDims", 1),
        ("TF_StringInit", 1),
        ("TF_StringDealloc", 1),
        ("TF_StringGetSize", 1),
        ("TF_StringGetDataPointer", 1),
    ):
        getattr(tf, name).argtypes = [ctypes.c_void_p] * count
    pointer, number = ctypes.c_void_p, ctypes.c_int
    tf.TF_DeleteBuffer.argtypes = [ctypes.POINTER(Buffer)]
    tf.TF_Dim.argtypes = [pointer, number]
    tf.TF_GraphOperationByName.argtypes = [pointer, ctypes.c_char_p]
    tf.TF_StringCopy.argtypes = [pointer, ctypes.c_char_p, ctypes.c_size_t]
    tf.TF_AllocateTensor.argtypes = [
        number, ctypes.POINTER(ctypes.c_int64), number, ctypes.c_size_t,
    ]  # fmt: skip
    tf.TF_LoadSessionFromSavedModel.argtypes = [
        pointer, pointer, ctypes.c_char_p, ctypes.POINTER(ctypes.c_char_p),
        number, pointer, ctypes.POINTER(Buffer), pointer,
    ]  # fmt: skip
    tf.TF_SessionRun.argtypes = [
        pointer, pointer, ctypes.POINTER(Output), ctypes.POINTER(pointer),
        number, ctypes.POINTER(Output), ctypes.POINTER(pointer), number,
        pointer, number, pointer, pointer,
    ]  # fmt: skip
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


def _signatures(meta_graph):
    """Inputs and outputs of every signature, from a serialized MetaGraphDef."""
    with tensorflow_protos():
        name = "tensorflow.core.protobuf.meta_graph_pb2"
        proto = importlib.import_module(name).MetaGraphDef()
    proto.ParseFromString(meta_graph)

    def infos(tensors):
        return {
            name: TensorInfo(x.name, x.dtype, _shape(x.tensor_shape))
            for name, x in sorted(tensors.items())
        }

    return {
        name: (infos(signature.inputs), infos(signature.outputs))
        for name, signature in proto.signature_def.items()
        if not name.startswith("__")  # TensorFlow's own.
    }


def _shape(proto):
    return tuple(None if dim.size < 0 else dim.size for dim in proto.dim)


def read_requests(folder):
    """The requests of a folder's warm-up file.

    Args:
        folder: Folder of one version.

    Returns:
        List of `(signature, inputs)`, with arrays and lists of bytes by name;
        empty without such a file.
    """
    path = pathlib.Path(folder) / WARMUP
    if not path.exists():
        return []
    with tensorflow_protos():
        name = "tensorflow_serving.apis.prediction_log_pb2"
        make = importlib.import_module(name).PredictionLog
    requests = []
    for record in _records(path.read_bytes()):
        log = make()
        log.ParseFromString(record)
        request = log.predict_log.request
        inputs = {k: _values(x) for k, x in request.inputs.items()}
        requests.append((request.model_spec.signature_name, inputs))
    return requests


def _records(content):
    """Records of a TFRecord file: length, checksum, bytes, checksum."""
    while content:
        length = int.from_bytes(content[:8], "little")
        yield content[12 : 12 + length]
        content = content[16 + length :]


def _values(proto):
    """The array, or the list of bytes, of a TensorProto."""
    if proto.dtype == STRING:
        return list(proto.string_val)
    array = np.frombuffer(proto.tensor_content, DTYPES[proto.dtype])
    return array.reshape(_shape(proto.tensor_shape))


def replay(folder, rounds):
    """Answers the warm-up requests, and takes the time.

    Args:
        folder: Folder of one version.
        rounds: How often to answer each request for its time.

    Returns:
        A dict of what is known of the folder, and a list of the answers.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    served = ServedModel(folder)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    requests, answers = [], []
    for signature, inputs in read_requests(folder):
        answers.append(served(signature, **inputs))
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            served(signature, **inputs)
            times.append(1e3 * (time.perf_counter() - start))
        quartiles = np.percentile(times or [np.nan], [25, 50, 75]).tolist()
        batch = len(next(iter(inputs.values())))
        requests.append(
            {"signature": signature, "batch": batch, "ms": quartiles}
        )
    facts = {
        "load_seconds": seconds,
        "load_bytes": 1024 * (peak - before),  # Linux counts in KiB.
        "signatures": {
            name: {"inputs": list(inputs), "outputs": list(outputs)}
            for name, (inputs, outputs) in served.signatures.items()
        },
        "requests": requests,
    }
    return facts, answers


def main():
    """Replays a folder's warm-up requests; see the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--save", help="File for the answers.")
    arguments = parser.parse_args()
    facts, answers = replay(arguments.folder, arguments.rounds)
    if arguments.save:
        arrays = {
            f"{i}/{name}": value.astype(bytes)
            if value.dtype == object
            else value
            for i, answer in enumerate(answers)
            for name, value in answer.items()
        }
        np.savez(arguments.save, **arrays)
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
