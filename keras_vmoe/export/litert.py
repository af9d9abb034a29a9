"""`litert`: one file for LiteRT, once TensorFlow Lite."""

import pathlib
import tempfile

from keras_vmoe._extras import require
from keras_vmoe.data.tensorflow_runtime import import_tensorflow
from keras_vmoe.export.conversion import ADVICE
from keras_vmoe.export.conversion import check_runtime
from keras_vmoe.export.conversion import convert
from keras_vmoe.export.conversion import one_output
from keras_vmoe.export.errors import named_errors
from keras_vmoe.export.saved_model import write_graph
from keras_vmoe.export.variants import routed
from keras_vmoe.export.variants import with_small_experts


def litert(
    model,
    path,
    images_per_group=1,
    capacity_factor=None,
    num_selected_experts=None,
    batch_priority=None,
    quantize_experts=None,
):
    """Exports a model to LiteRT, from every backend.

    The file takes `images` `(B, H, W, C)` float32, normalised as in training,
    and gives `logits` `(B, classes)`, or `features` of a model without
    classes, by its signature `serving_default`; the batch is 1 until
    `resize_tensor_input` sets another. The file
    gets its name after LiteRT gave the model's outputs. See `saved_model` for
    what `images_per_group` means.

    Args:
        model: A functional or sequential Keras model.
        path: File to write, ending in `.tflite`; must not exist.
        images_per_group: Images that are routed together, or "batch".
        capacity_factor: Room of the experts, or "dropless"; None means that of
            the model.
        num_selected_experts: K; None means that of the model.
        batch_priority: Whether confident tokens are served first; None means
            as in the model.
        quantize_experts: `"int8"`: how the kernels of experts are stored.
            (Those of float16 would be folded into float32.)

    Returns:
        `pathlib.Path` of the file.

    Raises:
        ValueError: If the model or an argument does not fit, or if LiteRT
            cannot run the model or disagrees with it.
        FileExistsError: If the file exists.
        ImportError: If the extra `litert` is not installed.

    Example:

    >>> import keras
    >>> model = keras.Sequential(
    ...     [keras.Input((8, 8, 3)), keras.layers.Flatten(),
    ...      keras.layers.Dense(10)])
    >>> litert(model, "model.tflite").as_posix()
    'model.tflite'
    """
    return convert(
        "litert",
        model,
        path,
        ("int8",),
        quantize_experts,
        images_per_group=images_per_group,
        capacity_factor=capacity_factor,
        num_selected_experts=num_selected_experts,
        batch_priority=batch_priority,
    )


def write_litert(model, settings, path):
    """Writes a LiteRT file, under the TensorFlow backend.

    Args:
        model: A model, not compiled.
        settings: `ConvertSettings`.
        path: `pathlib.Path` that does not exist.
    """
    from keras_vmoe.export.endpoints import traced_model

    tf = import_tensorflow()
    if settings.quantize_experts is not None:
        model = with_small_experts(model, settings.quantize_experts)
    model = routed(model, settings.signature.routing)
    core = traced_model(model)
    call = one_output(model, core)
    runtime = require("ai_edge_litert.interpreter", "litert")
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        # From a folder, which alone gives inputs and outputs their names.
        folder = pathlib.Path(temporary, "1")
        write_graph(folder, {"serving_default": call.get_concrete_function()})
        with named_errors("LiteRT", ADVICE):
            converter = tf.lite.TFLiteConverter.from_saved_model(str(folder))
            path.write_bytes(converter.convert())
            interpreter = runtime.Interpreter(str(path))
    check_runtime(
        "LiteRT",
        lambda images: _run(interpreter, images),
        call,
        model.input_shape[1:],
    )


def _run(interpreter, images):
    (inputs,), (outputs,) = (
        interpreter.get_input_details(),
        interpreter.get_output_details(),
    )
    interpreter.resize_tensor_input(inputs["index"], images.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(inputs["index"], images)
    interpreter.invoke()
    return interpreter.get_tensor(outputs["index"])
