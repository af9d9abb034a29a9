"""`onnx`: one file for ONNX Runtime."""

import numpy as np

from keras_vmoe._extras import require
from keras_vmoe.export.conversion import ADVICE
from keras_vmoe.export.conversion import check_runtime
from keras_vmoe.export.conversion import convert
from keras_vmoe.export.conversion import one_output
from keras_vmoe.export.errors import named_errors
from keras_vmoe.export.quantization import KINDS
from keras_vmoe.export.quantization import quantized
from keras_vmoe.export.variants import moe_layers_of
from keras_vmoe.export.variants import routed

OPSET = 18


def onnx(
    model,
    path,
    images_per_group=1,
    capacity_factor=None,
    num_selected_experts=None,
    batch_priority=None,
    quantize_experts=None,
):
    """Exports a model to ONNX, from every backend.

    The file takes `images` `(B, H, W, C)` float32, normalised as in training,
    with any B from 1 on, and gives `logits` `(B, classes)`, or `features` of a
    model without classes. It gets its name after ONNX Runtime gave the model's
    outputs. See `saved_model` for what `images_per_group` means.

    Args:
        model: A functional or sequential Keras model.
        path: File to write, ending in `.onnx`; must not exist.
        images_per_group: Images that are routed together, or "batch".
        capacity_factor: Room of the experts, or "dropless"; None means that of
            the model.
        num_selected_experts: K; None means that of the model.
        batch_priority: Whether confident tokens are served first; None means
            as in the model.
        quantize_experts: `"int8"` or `"float16"`: how the kernels of experts
            are stored. ONNX Runtime computes with them in float32.

    Returns:
        `pathlib.Path` of the file.

    Raises:
        ValueError: If the model or an argument does not fit, or if ONNX Runtime
            cannot run the model or disagrees with it.
        FileExistsError: If the file exists.
        ImportError: If the extra `onnx` is not installed.

    Example:

    >>> from keras_vmoe.models import ViTMoE
    >>> model = ViTMoE(
    ...     image_size=16, patch_size=4, hidden_dim=16, num_layers=2,
    ...     num_heads=2, mlp_dim=32, num_classes=10,
    ...     moe={"layers": [1], "num_experts": 4})
    >>> onnx(model, "model.onnx").as_posix()
    'model.onnx'
    """
    return convert(
        "onnx",
        model,
        path,
        KINDS,
        quantize_experts,
        images_per_group=images_per_group,
        capacity_factor=capacity_factor,
        num_selected_experts=num_selected_experts,
        batch_priority=batch_priority,
    )


def write_onnx(model, settings, path):
    """Writes an ONNX file, under the TensorFlow backend.

    Args:
        model: A model, not compiled.
        settings: `ConvertSettings`.
        path: `pathlib.Path` that does not exist.
    """
    from keras.src.export.tf2onnx_lib import patch_tf2onnx

    from keras_vmoe.export.endpoints import traced_model

    patch_tf2onnx()  # It does not know NumPy 2.
    tf2onnx = require("tf2onnx", "onnx")
    runtime = require("onnxruntime", "onnx")
    model = routed(model, settings.signature.routing)
    call = one_output(model, traced_model(model))
    with named_errors("ONNX Runtime", ADVICE):
        proto, _ = tf2onnx.convert.from_function(
            call,
            input_signature=call.input_signature,
            opset=OPSET,
            custom_op_handlers={"Erfc": (_erfc, [])},
        )
    if settings.quantize_experts is not None:
        _shrink(proto.graph, _kernels(model), settings.quantize_experts)
        call = None
    _name(proto.graph)
    path.write_bytes(proto.SerializeToString())
    with named_errors("ONNX Runtime", ADVICE):
        session = runtime.InferenceSession(str(path))
    check_runtime(
        "ONNX Runtime",
        lambda images: session.run(None, {"images": images})[0],
        call or _small(model, settings),
        model.input_shape[1:],
    )


def _small(model, settings):
    """What the file must say when its experts are quantized."""
    from keras_vmoe.export.endpoints import traced_model
    from keras_vmoe.export.variants import with_small_experts

    model = with_small_experts(model, settings.quantize_experts)
    return one_output(model, traced_model(model))


def _erfc(context, node, name, arguments):
    """`1 - erf(x)`, which exact gelu is made of and ONNX does not have."""
    from tf2onnx.utils import make_name

    (output,), shapes = node.output, node.output_shapes
    dtypes = node.output_dtypes
    erf = context.make_node("Erf", [node.input[0]])
    one = context.make_const(make_name("one"), np.array(1, "float32"))
    context.remove_node(node.name)
    context.make_node(
        "Sub",
        [one.output[0], erf.output[0]],
        outputs=[output],
        name=name,
        shapes=shapes,
        dtypes=dtypes,
    )


def _name(graph):
    """Gives the file's only input and output the names of the docs."""
    graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    graph.output[0].type.tensor_type.shape.dim[0].dim_param = "batch"


def _kernels(model):
    """The experts' kernels by their bytes, whole and expert by expert."""
    kernels = {}
    for layer in moe_layers_of(model):
        for name in ("hidden_kernel", "output_kernel"):
            kernel = np.asarray(getattr(layer.experts, name).value)
            for part in (kernel, *kernel):
                kernels[part.tobytes()] = f"{layer.name}/{name}"
    return kernels


def _shrink(graph, kernels, kind):
    """Stores kernels in fewer bytes, with what turns them back before them.

    TensorFlow's converter would fold quantized kernels into numbers again.
    """
    import onnx as library

    make, numpy = library.helper, library.numpy_helper
    found, nodes = set(), []
    for initializer in list(graph.initializer):
        values = numpy.to_array(initializer)
        if values.tobytes() not in kernels:
            continue
        found.add(kernels[values.tobytes()])
        graph.initializer.remove(initializer)
        name = initializer.name
        small, scale = quantized(values, kind)
        graph.initializer.append(numpy.from_array(small, f"{name}/{kind}"))
        cast = name if scale is None else f"{name}/cast"
        nodes.append(
            make.make_node(
                "Cast", [f"{name}/{kind}"], [cast], to=library.TensorProto.FLOAT
            )
        )
        if scale is not None:
            factor = numpy.from_array(scale, f"{name}/scale")
            graph.initializer.append(factor)
            nodes.append(make.make_node("Mul", [cast, factor.name], [name]))
    missing = set(kernels.values()) - found
    if missing:
        raise ValueError(
            "Every kernel of the experts must be found to be quantized. "
            f"Received: a graph without {sorted(missing)}. Leave "
            "`quantize_experts` out."
        )
    for node in reversed(nodes):
        graph.node.insert(0, node)
