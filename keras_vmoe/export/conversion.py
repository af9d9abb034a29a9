"""What exports to ONNX and LiteRT have in common."""

import pathlib

import numpy as np

from keras_vmoe import _files
from keras_vmoe._extras import require
from keras_vmoe.data.tensorflow_runtime import import_tensorflow
from keras_vmoe.export import process
from keras_vmoe.export.arguments import check_path
from keras_vmoe.export.errors import named_errors
from keras_vmoe.export.settings import ConvertSettings
from keras_vmoe.export.settings import Signature
from keras_vmoe.export.variants import check_model
from keras_vmoe.export.variants import check_quantization
from keras_vmoe.export.variants import default_dials
from keras_vmoe.export.variants import has_classes
from keras_vmoe.export.variants import routed
from keras_vmoe.models.cloning import clone_around

LARGEST = 2**31  # Bytes of a file of either format.
TOLERANCE = 1e-5  # Of a runtime's outputs, where the largest is 1.
REQUIRED = {
    "onnx": ("tensorflow", "tf2onnx", "onnxruntime"),
    "litert": ("tensorflow", "ai_edge_litert"),
}
ADVICE = (
    "Export it by `export.saved_model`, or try other routing or a model of "
    "float32."
)
BATCHES = (1, 3)  # What a runtime is asked before a file gets its name.


def convert(format, model, path, kinds, quantize_experts, **dials):
    """Writes a model as one file, which a runtime has agreed with.

    Args:
        format: `"onnx"` or `"litert"`.
        model: A Keras model.
        path: Where to write; ends in the format's suffix.
        kinds: What the format can quantize to.
        quantize_experts: One of `kinds` or None.
        **dials: Arguments of `models.set_routing`; None leaves one.

    Returns:
        `pathlib.Path` of the file.
    """
    check_path("path", path)
    path = pathlib.Path(path)
    suffix = {"onnx": ".onnx", "litert": ".tflite"}[format]
    if path.suffix != suffix:
        raise ValueError(
            f"The file must end in {suffix!r}. Received: path={str(path)!r}."
        )
    check_model(model)
    check_quantization(model, quantize_experts, kinds)
    size = sum(np.prod(x.shape) * 4 for x in model.weights)
    if size >= LARGEST:
        raise ValueError(
            "A file of this format holds less than 2 GB. Received: a model of "
            f"{size / 1e9:.1f} GB. Serve it by `export.saved_model`."
        )
    for module in REQUIRED[format]:
        require(module, format)
    model = clone_around(model)
    dials = default_dials(model, **dials)
    routed(model, dials)  # Raises where the model cannot take a dial.
    settings = ConvertSettings(Signature(**dials), quantize_experts)
    with _files.creating(path) as partial:
        process.write(format, model, settings, partial)
    return path


def one_output(model, core):
    """A traced function of `images` with one output, and its name.

    Args:
        model: The model.
        core: Function that `endpoints.traced_model` made of it.

    Returns:
        A `tf.function` from `(B, H, W, C)` to a dict of one entry.
    """
    tf = import_tensorflow()
    name = "logits" if has_classes(model) else "features"
    spec = tf.TensorSpec((None, *model.input_shape[1:]), name="images")

    @tf.function(input_signature=[spec], autograph=False)
    def call(images):
        return {name: core(images)[name]}

    return call


def check_runtime(name, run, call, shape):
    """Raises unless a runtime says what the model says.

    Args:
        name: Name of the runtime.
        run: Function from `(B, H, W, C)` to the outputs by the runtime.
        call: The function that was converted.
        shape: `(H, W, C)`.
    """
    generator = np.random.default_rng(0)
    for batch in BATCHES:
        images = generator.uniform(-1, 1, (batch, *shape)).astype("float32")
        (right,) = (x.numpy() for x in call(images).values())
        with named_errors(name, ADVICE):
            difference = np.abs(run(images) - right).max()
        if not difference <= TOLERANCE * max(1, np.abs(right).max()):
            raise ValueError(
                f"{name} must agree with the model. Received: outputs that "
                f"differ by {difference:.1e}. {ADVICE}"
            )
