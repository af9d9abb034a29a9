"""What a model costs: parameters, multiply-adds, memory of activations."""

import contextlib
import dataclasses
import functools
import math
import typing
import warnings

import keras
from keras.src.backend.common import global_state

from keras_vmoe import layers
from keras_vmoe import routing


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of a model.

    Attributes:
        params: Parameters.
        active_params: Parameters that work on one token: of the experts of a
            MoE layer, as many as a token visits on average.
        macs: Multiply-adds of matrix products and convolutions per image, the
            papers' "FLOPs", at the model's capacity factors, empty slots
            included.
        activation_bytes: Outputs of all layers for one image in their compute
            dtype, buffers and hidden features of experts included: an estimate
            of what a training step keeps per image.
    """

    params: int
    active_params: int
    macs: int
    activation_bytes: int


class Work(typing.NamedTuple):
    """What one layer does for one image.

    Attributes:
        multiply_adds: Those of matrix products and convolutions.
        values: Numbers that it makes besides its output.
    """

    multiply_adds: int = 0
    values: int = 0


def cost(model):
    """Counts what a model costs, from its graph.

    Walks the graph with the shapes of one image. Layers of Keras with a kernel,
    and the layers of this package, are counted; another layer with a matrix
    gets a warning.

    Args:
        model: A functional or sequential Keras model with one image input of
            known size.

    Returns:
        A `Cost`.

    Raises:
        ValueError: If the model has no graph or unknown sizes.

    Example:

    >>> from keras_vmoe.models import ConvNeXtMoE
    >>> cost(ConvNeXtMoE(depths=[1], dims=[8], num_classes=10, image_size=8))
    Cost(params=1490, active_params=1490, macs=5232, activation_bytes=1512)

    Reference:
        [Riquelme et al., 2021](https://arxiv.org/abs/2106.05974), section 3.
    """
    graph = _graph(model)
    if graph is None or not model.built:
        raise ValueError(
            "`model` must be a functional or sequential Keras model, built "
            f"from `keras.Input`. Received: model={model!r}."
        )
    shapes = [tuple(tensor.shape[1:]) for tensor in model.inputs]
    if any(None in shape for shape in shapes):
        raise ValueError(
            "The sizes of an image must be known. Received: a model of inputs "
            f"{shapes}. Build it with fixed sizes."
        )
    inputs = [
        keras.KerasTensor((1, *shape), dtype=tensor.dtype)
        for shape, tensor in zip(shapes, model.inputs, strict=True)
    ]
    calls = []
    _walk(graph, inputs if len(inputs) > 1 else inputs[0], calls)
    params = model.count_params()
    sparse = {layer for layer, *_ in calls if isinstance(layer, layers.MoEMLP)}
    return Cost(
        params=params,
        active_params=round(params - sum(map(_idle_params, sparse))),
        macs=round(sum(work.multiply_adds for _, work, _ in calls)),
        activation_bytes=round(sum(w.values * size for _, w, size in calls)),
    )


def _graph(model):
    """The functional model that this is or holds; None for another layer."""
    if isinstance(model, keras.Sequential):
        model = model._functional
    return model if hasattr(model, "_run_through_graph") else None


def _walk(model, inputs, calls):
    """Appends `(layer, work, bytes per value)` of every call of a layer."""

    def spec(operation):
        return functools.partial(visit, operation)

    def visit(operation, *args, **kwargs):
        if _graph(operation) is not None:
            return _walk(_graph(operation), args[0], calls)
        outputs = operation.compute_output_spec(*args, **kwargs)
        if isinstance(operation, keras.layers.InputLayer):
            return outputs
        flat = keras.tree.flatten(outputs)
        found = work(operation, args[0], flat[0])
        values = found.values + sum(math.prod(x.shape) for x in flat)
        size = keras.backend.standardize_dtype(flat[0].dtype)
        found = found._replace(values=values)
        calls.append((operation, found, _itemsize(size)))
        return outputs

    return model._run_through_graph(inputs, operation_fn=spec)


def _itemsize(dtype):
    bits = "".join(c for c in dtype if c.isdigit())
    return int(bits or 8) // 8


@functools.singledispatch
def work(layer, inputs, outputs):
    """The `Work` of one call of a layer with one image.

    Args:
        layer: A layer.
        inputs, outputs: `keras.KerasTensor`s of a batch of one image.

    Returns:
        A `Work`.
    """
    matrices = [w for w in getattr(layer, "weights", []) if len(w.shape) > 1]
    if matrices:
        warnings.warn(
            f"The multiply-adds of {layer.name!r}, a {type(layer).__name__}, "
            "are not counted.",
            stacklevel=2,
        )
    return Work()


@work.register(keras.layers.Dense)
def _(layer, inputs, outputs):
    return Work(math.prod(outputs.shape[:-1]) * _size(layer.kernel))


@work.register(keras.layers.Conv2D)
@work.register(keras.layers.DepthwiseConv2D)
def _(layer, inputs, outputs):
    last = layer.data_format == "channels_last"
    positions = outputs.shape[1:-1] if last else outputs.shape[2:]
    return Work(math.prod(positions) * _size(layer.kernel))


@work.register(layers.PatchEmbedding)
def _(layer, inputs, outputs):
    return Work(outputs.shape[1] * _size(layer.projection.kernel))


@work.register(layers.ClassToken)
@work.register(layers.LearnedPositions)
@work.register(layers.SinCos2DPositions)
def _(layer, inputs, outputs):
    return Work()  # Sums only.


@work.register(layers.MLP)
def _(layer, inputs, outputs):
    return _mlp_work(layer, math.prod(inputs.shape[:-1]))


@work.register(layers.SelfAttention)
def _(layer, inputs, outputs):
    _, num_tokens, features = inputs.shape
    scores = num_tokens**2
    return Work(
        4 * num_tokens * features**2 + 2 * scores * features,
        4 * num_tokens * features + layer.num_heads * scores,
    )


@work.register(layers.AttentionPooling)
def _(layer, inputs, outputs):
    _, num_tokens, features = inputs.shape
    projections = 2 * (num_tokens + 1) * features**2
    mlp = _mlp_work(layer.mlp, 1)
    return Work(
        projections + 2 * num_tokens * features + mlp.multiply_adds,
        2 * num_tokens * features + layer.num_heads * num_tokens + mlp.values,
    )


@work.register(layers.MoEMLP)
def _(layer, inputs, outputs):
    num_tokens, features = math.prod(inputs.shape[1:-1]), inputs.shape[-1]
    slots = slots_of(layer, num_tokens)
    gate = num_tokens * sum(
        _size(w) for w in layer.router.gate_layer.weights if len(w.shape) > 1
    )
    # Every matrix of an expert is applied once to each of its slots. Quantized
    # kernels have a row of scales beside them, which is none.
    stacks = [w for w in layer.experts.weights if len(w.shape) > 2]
    matrices = [w for w in stacks if 1 not in w.shape[1:]]
    bank = slots * sum(map(_size, matrices)) / layer.num_experts
    multiply_adds = gate + bank
    values = slots * (features + sum(w.shape[-1] for w in matrices))
    if isinstance(layer.router, layers.SoftRouter):
        # Every slot is a mixture of all tokens, and every token of all slots.
        multiply_adds += 2 * num_tokens * slots * features
        values += 2 * num_tokens * slots
    if isinstance(layer, layers.SharedExpertMoEMLP):
        shared = _mlp_work(layer.shared_expert, num_tokens)
        multiply_adds += shared.multiply_adds
        values += shared.values
    return Work(multiply_adds, values)


def _mlp_work(layer, positions):
    kernels = _size(layer.hidden_dense.kernel) + _size(
        layer.output_dense.kernel
    )
    return Work(positions * kernels, positions * layer.hidden_dim)


def slots_of(layer, num_tokens):
    """Slots in the experts' buffers per image, on average.

    Args:
        layer: A `MoEMLP`.
        num_tokens: Tokens of an image.
    """
    router = layer.router
    if isinstance(router, layers.SoftRouter):
        return layer.num_experts * router.gate_layer.mu.shape[-1]
    selected = getattr(router, "num_selected_experts", 1)
    factor = _capacity_factor(router)
    if factor == "dropless":
        return selected * num_tokens
    if layer.images_per_group == "batch":  # Of a large batch.
        return num_tokens * min(selected * factor, layer.num_experts)
    capacity = routing.capacity(
        layer.images_per_group * num_tokens,
        layer.num_experts,
        selected,
        factor,
    )
    return layer.num_experts * capacity / layer.images_per_group


def _idle_params(layer):
    """Parameters of the experts that a token does not visit, on average."""
    router = layer.router
    if isinstance(router, layers.SoftRouter):
        return 0
    visited = getattr(router, "num_selected_experts", None)
    if visited is None:
        visited = _capacity_factor(router)
    share = max(0.0, 1 - visited / layer.num_experts)
    return share * layer.experts.count_params()


def _capacity_factor(router):
    """That of the router; 1 for a router of somebody's own without one."""
    return getattr(router, "capacity_factor", 1.0)


def _size(variable):
    return math.prod(variable.shape)


@contextlib.contextmanager
def without_weights():
    """Models that are built in this context have shapes but no weights.

    Their cost can be counted, however large they are. Do not train or save
    them: wherever a weight is asked for, it is drawn anew.

    Example:

    >>> from keras_vmoe.models import from_preset
    >>> with without_weights():
    ...     model = from_preset("vmoe_h14_e32_every2")
    >>> round(cost(model).params / 1e9, 1)
    7.2
    """
    name = "uninitialized_variables"
    waiting = list(global_state.get_global_attribute(name, []))
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        # Or the next scope that ends would fill them.
        global_state.set_global_attribute(name, waiting)
