"""Replays the warm-up requests of an exported folder by the C API.

    python replay.py FOLDER [--rounds 20] [--save answers.npz]

prints, as JSON, what loading and answering them took.
"""

import argparse
import importlib
import json
import pathlib
import time

import numpy as np

# As a script this has no package around it, and imports no Keras.
if __package__:
    from tests.export import c_api as runtime
else:
    import c_api as runtime

WARMUP = pathlib.Path("assets.extra", "tf_serving_warmup_requests")


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
    if proto.dtype == runtime.STRING:
        return list(proto.string_val)
    array = np.frombuffer(proto.tensor_content, runtime.DTYPES[proto.dtype])
    return array.reshape(runtime.shape_of(proto.tensor_shape))


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
