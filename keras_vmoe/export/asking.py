"""Runs an exported folder or file, in a process that has only its runtime.

    python asking.py PATH REQUESTS ANSWERS

REQUESTS and ANSWERS are `.npz` files of arrays by `signature/request/name`.
"""

import sys
from typing import Any

import numpy as np


def main(path: str, requests: str, answers: str) -> None:
    """Writes the answers to requests.

    Args:
        path: Folder of a SavedModel, or `.onnx` or `.tflite` file.
        requests: Name of the file to read.
        answers: Name of the file to write.
    """
    suffix = path.rpartition(".")[2]
    runtime = {"onnx": onnx, "tflite": litert}.get(suffix, saved_model)
    found: dict[str, Any] = {}
    ask = runtime(path)
    with np.load(requests) as asked:
        for key, value in asked.items():
            signature, request, name = key.split("/")
            for output, x in ask(signature, {name: value}).items():
                x = np.asarray(x)
                x = x.astype(bytes) if x.dtype == object else x
                found[f"{signature}/{request}/{output}"] = x
    np.savez(answers, **found)


def saved_model(path):
    """A function from signature and inputs to outputs by name."""
    import tensorflow as tf

    model = tf.saved_model.load(path)
    return lambda signature, inputs: model.signatures[signature](
        **{k: tf.constant(x) for k, x in inputs.items()}
    )


def onnx(path):
    """As `saved_model`, for a file whose one signature has no name."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    names = [x.name for x in session.get_outputs()]
    return lambda _, inputs: dict(
        zip(names, session.run(names, inputs), strict=True)
    )


def litert(path):
    """As `saved_model`."""
    from ai_edge_litert.interpreter import Interpreter

    get_runner = Interpreter(path).get_signature_runner
    return lambda signature, inputs: get_runner(signature)(**inputs)


if __name__ == "__main__":
    sys.path.pop(0)  # The folder of this file, which would hide libraries.
    # TensorFlow would import Keras and a backend: a server has neither.
    sys.modules["keras"] = None  # type: ignore[assignment]
    main(*sys.argv[1:])
