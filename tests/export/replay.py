"""Replays the warm-up requests of an exported folder, without Keras.

    python replay.py FOLDER [--rounds 20] [--save answers.npz]

prints, as JSON, what loading and answering them took.
"""

import argparse
import importlib
import json
import pathlib
import time

import numpy as np

# As a script this has no package around it, whose import would load Keras.
if __package__:
    from keras_vmoe.export import served as runtime
else:
    import served as runtime

WARMUP = pathlib.Path("assets.extra", "tf_serving_warmup_requests")


def newest_version(directory):
    """The folder itself if it holds a SavedModel, else its highest version."""
    directory = pathlib.Path(directory)
    if (directory / "saved_model.pb").exists():
        return directory
    versions = [
        path
        for path in directory.glob("*/saved_model.pb")
        if path.parent.name.isdigit()
    ]
    if not versions:
        raise FileNotFoundError(
            "There must be a SavedModel, or folders of versions with one. "
            f"Received: {str(directory)!r}. `keras-vmoe export` makes one."
        )
    return max(versions, key=lambda path: int(path.parent.name)).parent


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
    with runtime.tensorflow_protos():
        name = "tensorflow_serving.apis.prediction_log_pb2"
        make = importlib.import_module(name).PredictionLog
    requests = []
    for record in _records(path.read_bytes()):
        log = make()
        try:
            log.ParseFromString(record)
        except Exception as error:  # Of protobuf, which is not imported here.
            raise ValueError(
                "Warm-up requests must be records of TF Serving. Received: "
                f"{str(path)!r}, which is damaged ({error})."
            ) from error
        request = log.predict_log.request
        inputs = {k: _values(x) for k, x in request.inputs.items()}
        requests.append((request.model_spec.signature_name, inputs))
    return requests


def _records(content):
    """Records of a TFRecord file: length, checksum, bytes, checksum."""
    while content:
        length = int.from_bytes(content[:8], "little")
        if len(content) < 16 + length:
            raise ValueError(
                "Warm-up requests must be whole. Received: a file that ends "
                "within one."
            )
        yield content[12 : 12 + length]
        content = content[16 + length :]


def _values(proto):
    """The array, or the list of bytes, of a TensorProto."""
    if proto.dtype == runtime.STRING:
        return list(proto.string_val)
    array = np.frombuffer(proto.tensor_content, runtime.DTYPES[proto.dtype])
    return array.reshape(runtime.shape_of(proto.tensor_shape))


def graph_bytes(meta_graph, signature):
    """Bytes of the graph that a signature runs.

    Args:
        meta_graph: A MetaGraphDef.
        signature: Name of a signature.
    """
    library = meta_graph.graph_def.library.function
    functions = {f.signature.name: f for f in library}
    nodes = {node.name: node for node in meta_graph.graph_def.node}
    outputs = meta_graph.signature_def[signature].outputs.values()
    waiting = [nodes[x.name.partition(":")[0]] for x in outputs]
    found = {}
    while waiting:
        for value in waiting.pop().attr.values():
            name = value.func.name
            if name in functions and name not in found:
                found[name] = functions[name].ByteSize()
                waiting += functions[name].node_def
    return sum(found.values())


def memory(what):
    """Bytes of this process, by what Linux calls them; NaN elsewhere.

    (`getrusage` would count those of the process that started this one.)

    Args:
        what: `"VmRSS"`, now, or `"VmHWM"`, at the peak.
    """
    status = pathlib.Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else ()
    for line in lines:
        name, _, value = line.partition(":")
        if name == what:
            return 1024 * int(value.split()[0])
    return float("nan")


def replay(folder, rounds):
    """Answers the warm-up requests, and takes the time.

    Args:
        folder: Folder of one version.
        rounds: How often to answer each request for its time.

    Returns:
        A dict of what is known of the folder, and a list of the answers.
    """
    runtime.library()  # Which takes memory of its own.
    before = memory("VmRSS")
    start = time.perf_counter()
    served = runtime.ServedModel(folder)
    seconds = time.perf_counter() - start
    peak = memory("VmHWM")
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
        "load_bytes": peak - before,
        "graph_bytes": {
            name: graph_bytes(served.meta_graph, name)
            for name in served.signatures
        },
        "requests": requests,
    }
    return facts, answers


def main():
    """The command; see the head of this file."""
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
