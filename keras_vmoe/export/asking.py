"""Asks an exported folder or file, in a process of its runtime alone.

    python asking.py PATH REQUESTS ANSWERS

REQUESTS and ANSWERS are `.npz` files of arrays by `signature/request/name`.
"""

import sys

import numpy as np


def main(path, requests, answers):
    """Writes the answers to requests.

    Args:
        path: Folder of a SavedModel, or `.onnx` or `.tflite` file.
        requests: Name of the file to read.
        answers: Name of the file to write.
    """
    suffix = path.rpartition(".")[2]
    runtimes = {"onnx": onnx_runtime, "tflite": litert}
    ask = runtimes.get(suffix, tensorflow)(path)
    found = {}
    with np.load(requests) as asked:
        for key, value in asked.items():
            signature, request, name = key.split("/")
            answer = ask(signature, {name: value})
            found |= {f"{signature}/{request}/{k}": x for k, x in answer}
    np.savez(answers, **found)


def tensorflow(path):
    """A function from signature and inputs to pairs of names and outputs."""
    import tensorflow as tf

    model = tf.saved_model.load(path)

    def ask(signature, inputs):
        inputs = {k: tf.constant(x) for k, x in inputs.items()}
        outputs = model.signatures[signature](**inputs)
        for name, value in outputs.items():
            strings = value.dtype == tf.string
            yield name, value.numpy().astype(bytes) if strings else value

    return ask


def onnx_runtime(path):
    """As `tensorflow`, of a file without names of signatures."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    names = [x.name for x in session.get_outputs()]
    return lambda _, inputs: zip(names, session.run(names, inputs), strict=True)


def litert(path):
    """As `tensorflow`."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(path)

    def ask(signature, inputs):
        return interpreter.get_signature_runner(signature)(**inputs).items()

    return ask


if __name__ == "__main__":
    sys.path.pop(0)  # This room, whose modules are no libraries.
    # TensorFlow would import it, and by it a backend: a server has neither.
    sys.modules["keras"] = None
    main(*sys.argv[1:])
