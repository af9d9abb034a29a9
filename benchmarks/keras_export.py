"""What files of Keras's own `model.export` answer, against `predict`.

    KERAS_BACKEND=tensorflow python benchmarks/keras_export.py tf_saved_model
    KERAS_BACKEND=jax python benchmarks/keras_export.py tf_saved_model
    KERAS_BACKEND=tensorflow python benchmarks/keras_export.py onnx
    KERAS_BACKEND=tensorflow python benchmarks/keras_export.py litert

A functional model around a `MoEMLP`, for every router and size of groups, asked
for batches that are less, as large and more than a group. ONNX files are
written with relu: the converter lacks the exact GELU.
"""

import argparse
import pathlib
import tempfile

import keras
import numpy as np

from keras_vmoe import layers

FORMATS = {"tf_saved_model": "model", "onnx": "m.onnx", "litert": "m.tflite"}
BATCHES = (1, 2, 3, 8, 9, 17)
ROUTERS = {
    "top-K": lambda: layers.TopKRouter(4, 2),
    "priority": lambda: layers.TopKRouter(
        4, 2, capacity_factor=0.5, batch_priority=True
    ),
    "dropless": lambda: layers.TopKRouter(4, 2, capacity_factor="dropless"),
    "expert choice": lambda: layers.ExpertChoiceRouter(4, 2.0),
    "soft": lambda: layers.SoftRouter(4, num_slots=2),
    "balanced by a bias": lambda: layers.BiasBalancedRouter(4, 2),
}
CASES = [(name, 8) for name in ROUTERS] + [
    ("top-K", 1),
    ("top-K", 3),
    ("top-K", "batch"),
    ("priority", "batch"),
    ("dropless", 1),
    ("expert choice", 1),
    ("expert choice", "batch"),
]


def make(router, images_per_group, activation):
    """A model of a user's own."""
    tokens = keras.Input((4, 8))
    moe = layers.MoEMLP(
        4,
        16,
        ROUTERS[router](),
        images_per_group=images_per_group,
        activation=activation,
    )
    x = keras.layers.GlobalAveragePooling1D()(moe(tokens))
    return keras.Model(tokens, keras.layers.Dense(3)(x))


def opened(path, kind):
    """A function from a batch to the answer of a file."""
    if kind == "tf_saved_model":
        import tensorflow as tf

        served = tf.saved_model.load(str(path))
        return lambda x: served.serve(x).numpy()
    if kind == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path))
        (entry,) = session.get_inputs()
        return lambda x: session.run(None, {entry.name: x})[0]
    from ai_edge_litert.interpreter import Interpreter

    def answer(x):
        interpreter = Interpreter(str(path))
        (entry,) = interpreter.get_input_details()
        interpreter.resize_tensor_input(entry["index"], x.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(entry["index"], x)
        interpreter.invoke()
        (exit_,) = interpreter.get_output_details()
        return interpreter.get_tensor(exit_["index"])

    return answer


def main():
    """Prints the largest difference for each router and size of groups."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("format", choices=FORMATS)
    kind = parser.parse_args().format
    activation = "relu" if kind == "onnx" else "gelu"
    generator = np.random.default_rng(0)
    for router, images_per_group in CASES:
        model = make(router, images_per_group, activation)
        model(np.zeros((5, 4, 8), "float32"))
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, FORMATS[kind])
            model.export(path, format=kind, verbose=False)
            answer = opened(path, kind)
            errors = []
            for batch in BATCHES:
                x = generator.normal(size=(batch, 4, 8)).astype("float32")
                right = model.predict(x, batch_size=batch, verbose=0)
                errors.append(np.abs(answer(x) - right).max())
        print(f"{router:20} {images_per_group!s:6} {max(errors):.1e}")


if __name__ == "__main__":
    main()
