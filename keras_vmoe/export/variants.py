"""Checks of a model, and its variants: routed, answering, quantized."""

import os

import keras

from keras_vmoe import layers
from keras_vmoe import models
from keras_vmoe._checks import check_choice
from keras_vmoe._keras import all_layers
from keras_vmoe.distribution import _processes
from keras_vmoe.layers.experts import MLPExperts
from keras_vmoe.layers.experts import quantized as quantized_to_int8
from keras_vmoe.models.cloning import clone_around
from keras_vmoe.models.cloning import is_graph

# Layers and operations whose outputs are not logits.
ACTIVATIONS = (
    "Softmax", "Sigmoid", "ReLU", "Relu", "LeakyReLU", "ELU", "PReLU",
)  # fmt: skip
KINDS = ("int8", "float16")
ONE_BY_ONE = ("images_per_group", 1)  # As dense models always do.


def check_model(model):
    """Raises unless this is a built model from images to logits."""
    if isinstance(model, (str, os.PathLike)):
        raise ValueError(
            "`model` must be a Keras model. Received: the path "
            f"{str(model)!r}. Load it with `models.load`."
        )
    if _processes.num_processes() > 1:
        raise ValueError(
            "A model is exported from a single process. Received: "
            f"{_processes.num_processes()} of them. Save the model with "
            "`models.save`, and load and export it in one process."
        )
    if not is_graph(model) or not model.built:
        raise ValueError(
            "`model` must be a built functional or sequential Keras model. "
            f"Received: model={model!r}. Build it from `keras.Input`."
        )
    shapes = [tuple(x.shape[1:]) for x in model.inputs]
    one = len(shapes) == len(model.outputs) == 1 and len(shapes[0]) == 3
    if not one or None in shapes[0]:
        raise ValueError(
            "`model` must map one batch of images of a known size, "
            f"(B, H, W, C), to one output. Received: inputs {shapes} and "
            f"{len(model.outputs)} outputs. Build it with its image size."
        )
    if not keras.backend.is_float_dtype(model.inputs[0].dtype):
        raise ValueError(
            "`model` must take floating-point images. Received: inputs of type "
            f"{model.inputs[0].dtype}. Build it from a float32 `keras.Input`, "
            "and export it with Preprocessing(mean=0, std=1) if that is pixels."
        )
    _check_logits(model)


def _check_logits(model):
    last = last_of(model)
    activation = getattr(last, "activation", keras.activations.linear)
    squashes = type(last).__name__ in ACTIVATIONS
    if squashes or activation is not keras.activations.linear:
        received = f"a {type(last).__name__} with an activation at the end"
    elif not keras.backend.is_float_dtype(model.outputs[0].dtype):
        received = f"outputs of type {model.outputs[0].dtype}"
    elif len(model.output_shape) != 2:
        received = f"outputs of shape {model.output_shape}"
    else:
        return
    raise ValueError(
        "`model` must return logits, one vector per image. Received: "
        f"{received}. Pool, end with a `Dense` without activation, and train "
        "with a loss that has from_logits=True."
    )


def moe_layers_of(model):
    """All MoE layers, those in nested models included."""
    return [x for x in all_layers(model) if isinstance(x, layers.MoEMLP)]


def last_of(model):
    """The operation that produces the outputs, also in nested models."""
    last, _ = _last_here(model)
    return last_of(last) if is_graph(last) else last


def _last_here(model):
    """The last operation that changes more than the type, and its inputs.

    A layer may be called several times; only Keras's private history tells
    which call made the outputs.
    """
    operation, node, _ = model.outputs[0]._keras_history
    while True:
        inputs = operation._inbound_nodes[node].input_tensors
        if not _changes_nothing(operation):
            return operation, inputs
        operation, node, _ = inputs[0]._keras_history


def _changes_nothing(operation):
    linear = keras.activations.linear
    return type(operation).__name__ in ("Cast", "Identity", "Dropout") or (
        isinstance(operation, keras.layers.Activation)
        and operation.activation is linear
    )


def features_of(model):
    """The input of the `Dense` that makes the logits; None without one."""
    last, inputs = _last_here(model)
    return inputs[0] if isinstance(last, keras.layers.Dense) else None


def has_classes(model):
    """Whether the model returns logits, or only features."""
    return getattr(model, "num_classes", True) is not None


def default_dials(model, **dials):
    """The dials that are set; a dense model must have none."""
    dials = {k: v for k, v in dials.items() if v is not None}
    if moe_layers_of(model):
        return dials
    turned = {k: v for k, v in dials.items() if (k, v) != ONE_BY_ONE}
    if turned:
        raise ValueError(
            "A dense model has nothing to route. Received: "
            f"{', '.join(f'{k}={v!r}' for k, v in turned.items())} with "
            f"{model.name!r}. Omit it."
        )
    return {}


def routes_alone(model):
    """Whether every image is its own routing group."""
    return all(x.images_per_group == 1 for x in moe_layers_of(model))


def routed(model, dials):
    """The model with the dials of a signature, around the same weights.

    Args:
        model: A model, dense ones included.
        dials: Arguments of `models.set_routing`. A group of one image changes
            nothing in a model that routes each image alone.

    Returns:
        A model.

    Raises:
        ValueError: If the model has no such dial.
    """
    if routes_alone(model) and dials.get("images_per_group") == 1:
        dials = {k: v for k, v in dials.items() if k != "images_per_group"}
    return models.set_routing(model, **dials) if dials else model


def answering(model):
    """A model that returns a dict of all outputs of signatures.

    Args:
        model: A model.

    Returns:
        A model from images to `features` `(B, D)`, if it has a head, and
        `logits` `(B, classes)`, if it has classes; float32.
    """
    outputs = {"logits": model.outputs[0], "features": features_of(model)}
    if not has_classes(model):
        outputs = {"features": model.outputs[0]}
    outputs = {
        name: keras.ops.cast(x, "float32")
        for name, x in outputs.items()
        if x is not None
    }
    return keras.Model(model.inputs[0], outputs)


def check_quantization(model, kind, kinds):
    """Raises unless a model's experts can be quantized to this type."""
    check_choice("quantize_experts", kind, (None, *kinds))
    experts = [layer.experts for layer in moe_layers_of(model)]
    good = experts and all(
        type(x) is MLPExperts and x.quantization_mode is None for x in experts
    )
    if kind is not None and not good:
        found = {
            f"{type(x).__name__} of {x.dtype_policy.name}" for x in experts
        }
        raise ValueError(
            "Only `MLPExperts` can be quantized, and only once. Received: "
            f"quantize_experts={kind!r} with {sorted(found) or 'a dense model'}"
            ". Omit it."
        )


class HalfExperts(MLPExperts):
    """Experts whose kernels are stored in float16, and cast when used."""

    kernel_dtype = "float16"  # type: ignore[assignment]  # The base has None.


def with_quantized_experts(model, kind):
    """The model with quantized experts; all other weights are shared.

    Args:
        model: A model with MoE layers.
        kind: `"int8"` or `"float16"`.

    Returns:
        A model.
    """

    def change(layer):
        bank = HalfExperts if kind == "float16" else MLPExperts
        experts = bank.from_config(layer.experts.get_config())
        experts.build((None, layer.num_experts, None, layer.features))
        experts.set_weights(layer.experts.get_weights())
        if kind == "int8":
            experts.quantize(kind)
        return layer.sharing(experts=experts)

    return clone_around(model, change)


def quantized(kernel, kind):
    """A kernel in the form stored in a file.

    Args:
        kernel: `(D, F)` or `(E, D, F)` float32 array.
        kind: `"int8"` or `"float16"`.

    Returns:
        The kernel, and the scale `(..., 1, F)` to multiply it by; None for
        float16.
    """
    if kind == "float16":
        return kernel.astype(kind), None
    values, scale = quantized_to_int8(kernel.reshape(-1, *kernel.shape[-2:]))
    scale = 1 / scale.reshape(*kernel.shape[:-2], 1, -1)
    return values.reshape(kernel.shape), scale.astype("float32")
