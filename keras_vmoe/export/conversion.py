"""`onnx` and `litert`: one file for ONNX Runtime or LiteRT.

A file takes `images` `(B, H, W, C)` float32, normalized as in training, and
returns `logits` `(B, classes)`, or `features` from a model without classes. It
appears under its name once its runtime has reproduced the model's outputs.
"""

import os
import pathlib
import tempfile
from typing import Literal

import keras
import numpy as np

from keras_vmoe import _files
from keras_vmoe._extras import require
from keras_vmoe.data.tensorflow_runtime import import_tensorflow
from keras_vmoe.export import process
from keras_vmoe.export.endpoints import traced_model
from keras_vmoe.export.saved_model import write_graph
from keras_vmoe.export.settings import Settings
from keras_vmoe.export.settings import Signature
from keras_vmoe.export.settings import check_path
from keras_vmoe.export.variants import KINDS
from keras_vmoe.export.variants import check_model
from keras_vmoe.export.variants import check_quantization
from keras_vmoe.export.variants import default_dials
from keras_vmoe.export.variants import has_classes
from keras_vmoe.export.variants import moe_layers_of
from keras_vmoe.export.variants import quantized
from keras_vmoe.export.variants import routed
from keras_vmoe.export.variants import with_quantized_experts

OPSET = 18
LARGEST = 2**31  # Bytes that a file of either format may have.
# Suffix, quantized types of the experts, and required packages.
FORMATS = {
    "onnx": (".onnx", KINDS, ("tf2onnx", "onnxruntime")),
    "litert": (".tflite", ("int8",), ("ai_edge_litert",)),
}
ADVICE = "Use `export.saved_model`, or try other routing or a model in float32."


def onnx(
    model: keras.Model,
    path: str | os.PathLike[str],
    images_per_group: int | Literal["batch"] = 1,
    capacity_factor: float | Literal["dropless"] | None = None,
    num_selected_experts: int | None = None,
    batch_priority: bool | None = None,
    quantize_experts: Literal["int8", "float16"] | None = None,
) -> pathlib.Path:
    """Exports a model to ONNX, from any backend, for batches of any size.

    Args:
        model: A functional or sequential Keras model.
        path: File to write, ending in `.onnx`; must not exist.
        images_per_group: Images that are routed together, or "batch"; see
            `saved_model` for what larger groups mean.
        capacity_factor: Capacity of the experts, or "dropless"; None means
            the model's.
        num_selected_experts: K; None means the model's.
        batch_priority: Whether to route confident tokens first; None means the
            model's setting.
        quantize_experts: `"int8"` or `"float16"`: type in which the experts'
            kernels are stored. ONNX Runtime computes with them in float32.

    Returns:
        `pathlib.Path` of the file.

    Raises:
        ValueError: If the model or an argument does not fit, or if ONNX Runtime
            cannot run the model or does not reproduce its outputs.
        FileExistsError: If the file exists.
        ImportError: If the extra `onnx` is not installed.

    Example:

    >>> import keras
    >>> model = keras.Sequential(
    ...     [keras.Input((8, 8, 3)), keras.layers.Flatten(),
    ...      keras.layers.Dense(10)])
    >>> onnx(model, "model.onnx").as_posix()
    'model.onnx'
    """
    return _convert(
        write_onnx, model, path, quantize_experts,
        images_per_group=images_per_group, capacity_factor=capacity_factor,
        num_selected_experts=num_selected_experts,
        batch_priority=batch_priority,
    )  # fmt: skip


def litert(
    model: keras.Model,
    path: str | os.PathLike[str],
    images_per_group: int | Literal["batch"] = 1,
    capacity_factor: float | Literal["dropless"] | None = None,
    num_selected_experts: int | None = None,
    batch_priority: bool | None = None,
    quantize_experts: Literal["int8"] | None = None,
) -> pathlib.Path:
    """Exports a model to LiteRT (formerly TensorFlow Lite), from any backend.

    The file's signature is `serving_default`. Its batch size is 1 until
    `resize_tensor_input` changes it.

    Args:
        model: A functional or sequential Keras model.
        path: File to write, ending in `.tflite`; must not exist.
        images_per_group: See `onnx`.
        capacity_factor: See `onnx`.
        num_selected_experts: See `onnx`.
        batch_priority: See `onnx`.
        quantize_experts: `"int8"`: type in which the experts' kernels are
            stored. (LiteRT would convert float16 back to float32.)

    Returns:
        `pathlib.Path` of the file.

    Raises:
        ValueError: If the model or an argument does not fit, or if LiteRT
            cannot run the model or does not reproduce its outputs.
        FileExistsError: If the file exists.
        ImportError: If the extra `litert` is not installed.
    """
    return _convert(
        write_litert, model, path, quantize_experts,
        images_per_group=images_per_group, capacity_factor=capacity_factor,
        num_selected_experts=num_selected_experts,
        batch_priority=batch_priority,
    )  # fmt: skip


def _convert(writer, model, path, quantize_experts, **dials):
    """Checks arguments and writes the file."""
    extra = writer.__name__.removeprefix("write_")
    suffix, kinds, modules = FORMATS[extra]
    check_path("path", path)
    path = pathlib.Path(path)
    if path.suffix != suffix:
        raise ValueError(
            f"The file must end in {suffix!r}. Received: path={str(path)!r}."
        )
    check_model(model)
    check_quantization(model, quantize_experts, kinds)
    size = sum(np.prod(x.shape) * 4 for x in model.weights)
    if size >= LARGEST:
        raise ValueError(
            "A file of this format must be smaller than 2 GB. Received: a "
            f"model of {size / 1e9:.1f} GB. Use `export.saved_model`."
        )
    for module in ("tensorflow", *modules):
        require(module, extra)
    dials = default_dials(model, **dials)
    routed(model, dials)  # Raises if the model has no such dial.
    signatures = {"serving_default": Signature(**dials)}
    settings = Settings(signatures, quantize_experts)
    with _files.creating(path) as partial:
        process.write(writer, model, settings, partial)
    return path


def write_onnx(model, settings, path):
    """Writes an ONNX file, under the TensorFlow backend.

    Args:
        model: A model, not compiled.
        settings: `Settings`.
        path: `pathlib.Path` that does not exist.
    """
    # Keras has no public name for the patch that its own export applies.
    from keras.src.export.tf2onnx_lib import patch_tf2onnx

    patch_tf2onnx()  # It predates NumPy 2.
    tf2onnx = require("tf2onnx", "onnx")
    call = _call(model, settings)
    with process.named_errors("ONNX must support the model", ADVICE):
        proto, _ = tf2onnx.convert.from_function(
            call,
            input_signature=call.input_signature,
            opset=OPSET,
            custom_op_handlers={"Erfc": (_erfc, [])},
        )
    if settings.quantize_experts is not None:
        _quantize(proto.graph, _kernels(model), settings.quantize_experts)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    path.write_bytes(proto.SerializeToString())


def write_litert(model, settings, path):
    """Writes a LiteRT file, under the TensorFlow backend.

    Args:
        model: A model, not compiled.
        settings: `Settings`.
        path: `pathlib.Path` that does not exist.
    """
    tf = import_tensorflow()
    if settings.quantize_experts is not None:
        model = with_quantized_experts(model, settings.quantize_experts)
    call = _call(model, settings).get_concrete_function()
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        # Only a converter from a folder keeps the names of inputs and outputs.
        folder = pathlib.Path(temporary, "1")
        write_graph(folder, {"serving_default": call})
        with process.named_errors("LiteRT must support the model", ADVICE):
            converter = tf.lite.TFLiteConverter.from_saved_model(str(folder))
            path.write_bytes(converter.convert())


def _call(model, settings):
    """A `tf.function` from `images` to one named output."""
    tf = import_tensorflow()
    routing = settings.signatures["serving_default"].routing
    core = traced_model(routed(model, routing))
    name = "logits" if has_classes(model) else "features"
    spec = tf.TensorSpec((None, *model.input_shape[1:]), name="images")

    @tf.function(input_signature=[spec], autograph=False)
    def call(images):
        return {name: core(images)[name]}

    return call


def _erfc(context, node, name, arguments):
    """`1 - erf(x)`: the exact GELU uses `erfc`, which ONNX lacks."""
    from tf2onnx.utils import make_name

    (output,), kinds = node.output, node.output_dtypes
    shapes = node.output_shapes
    erf = context.make_node("Erf", [node.input[0]])
    one = context.make_const(make_name("one"), np.array(1, "float32"))
    context.remove_node(node.name)
    context.make_node(
        "Sub", [one.output[0], erf.output[0]], outputs=[output], name=name,
        shapes=shapes, dtypes=kinds,
    )  # fmt: skip


def _kernels(model):
    """Names of the experts' kernels by their bytes, whole and by expert."""
    kernels = {}
    for layer in moe_layers_of(model):
        for name in ("hidden_kernel", "output_kernel"):
            kernel = np.asarray(getattr(layer.experts, name))
            for part in (kernel, *kernel):
                kernels[part.tobytes()] = f"{layer.name}/{name}"
    return kernels


def _quantize(graph, kernels, kind):
    """Stores kernels quantized, and adds the nodes that dequantize them.

    Quantized before, TensorFlow's converter would fold them into float32.
    """
    import onnx as library

    make, numpy = library.helper, library.numpy_helper
    float32, found, nodes = library.TensorProto.FLOAT, set(), []
    for initializer in list(graph.initializer):
        values = numpy.to_array(initializer)
        if values.tobytes() not in kernels:
            continue
        found.add(kernels[values.tobytes()])
        graph.initializer.remove(initializer)
        name = initializer.name
        stored = f"{name}/{kind}"
        values, scale = quantized(values, kind)
        graph.initializer.append(numpy.from_array(values, stored))
        cast = name if scale is None else f"{name}/cast"
        nodes.append(make.make_node("Cast", [stored], [cast], to=float32))
        if scale is not None:
            factor = numpy.from_array(scale, f"{name}/scale")
            graph.initializer.append(factor)
            nodes.append(make.make_node("Mul", [cast, factor.name], [name]))
    missing = set(kernels.values()) - found
    if missing:
        raise ValueError(
            "The graph must hold every kernel that is to be quantized. "
            f"Received: a graph without {sorted(missing)}. Omit "
            "`quantize_experts`."
        )
    for node in reversed(nodes):
        graph.node.insert(0, node)
