"""The cost of a model: parameters, multiply-adds, activation memory."""

import dataclasses
import functools
import math
import re
from contextlib import AbstractContextManager

import keras

from keras_vmoe import layers
from keras_vmoe import routing
from keras_vmoe._keras import uninitialized_variables
from keras_vmoe._warnings import warn
from keras_vmoe.layers import patches
from keras_vmoe.layers import positions
from keras_vmoe.layers.attention import SelfAttention
from keras_vmoe.layers.pooling import AttentionPooling
from keras_vmoe.layers.windows import WindowAttention
from keras_vmoe.models.cloning import is_graph


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of a model.

    Attributes:
        params: Parameters.
        active_params: Parameters that work on one token; of a MoE layer's
            experts, as many as a token visits on average.
        macs: Multiply-adds of matrix products and convolutions per image, the
            papers' "FLOPs", empty slots of the experts included.
        activation_bytes: Outputs of all layers for one image in their compute
            dtype, the experts' buffers and hidden features included: an
            estimate of the memory that a training step keeps per image.
    """

    params: int
    active_params: int
    macs: int
    activation_bytes: int


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one layer for one image.

    Attributes:
        macs: Multiply-adds of matrix products and convolutions.
        values: Values that it computes besides its output.
    """

    macs: float = 0
    values: float = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.macs + other.macs, self.values + other.values)


def cost(model: keras.Model) -> Cost:
    """Counts the cost of a model from its graph.

    Counts, for one image, Keras's layers with a kernel and this package's
    layers; any other layer with a matrix causes a warning.

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
    if not is_graph(model) or not model.built:
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
    images = [
        keras.KerasTensor((1, *tensor.shape[1:]), dtype=tensor.dtype)
        for tensor in model.inputs
    ]
    calls: list[tuple] = []
    _copy(model, images, calls)
    params = model.count_params()
    sparse = {layer for layer, *_ in calls if isinstance(layer, layers.MoEMLP)}
    return Cost(
        params=params,
        active_params=round(params - sum(map(_idle_params, sparse))),
        macs=round(sum(work.macs for _, work, _ in calls)),
        activation_bytes=round(sum(w.values * size for _, w, size in calls)),
    )


def _copy(model, specs, calls):
    """Traverses a copy of a graph with inputs of other shapes.

    Appends the `(layer, work, bytes per value)` of each layer call to `calls`.
    """
    graph = model
    if isinstance(model, keras.Sequential) or model.compiled:
        # Keras would run a Sequential by its list, and compile the other copy.
        graph = keras.Model(model.inputs, model.outputs)
    inputs = [keras.Input(batch_shape=x.shape, dtype=x.dtype) for x in specs]
    keras.models.clone_model(
        graph,
        keras.tree.pack_sequence_as(graph.input, inputs),
        clone_function=lambda layer: _Counted(layer, calls),
    )


class _Counted(keras.Operation):
    """Replaces a layer in the copy of a graph, and records its work."""

    def __init__(self, layer, calls):
        super().__init__()
        self.layer, self.calls = layer, calls

    def compute_output_spec(self, *args, **kwargs):
        outputs = self.layer.compute_output_spec(*args, **kwargs)
        if is_graph(self.layer):
            _copy(self.layer, keras.tree.flatten(args[0]), self.calls)
            return outputs
        flat = keras.tree.flatten(outputs)
        found = Work(values=sum(math.prod(x.shape) for x in flat))
        found += work(self.layer, args[0], flat[0])
        self.calls.append((self.layer, found, _itemsize(flat[0].dtype)))
        return outputs


def _itemsize(dtype):
    bits = re.sub(r"\D", "", keras.backend.standardize_dtype(dtype))
    return int(bits or 8) // 8


@functools.singledispatch
def work(layer, inputs, outputs):
    """The `Work` of one call of a layer, with `KerasTensor`s of one image."""
    matrices = [w for w in getattr(layer, "weights", []) if len(w.shape) > 1]
    if matrices:
        warn(
            f"The multiply-adds of {layer.name!r}, a {type(layer).__name__}, "
            "are not counted."
        )
    return Work()


@work.register(keras.layers.Dense)
@work.register(keras.layers.Conv2D)
@work.register(keras.layers.DepthwiseConv2D)
def _(layer, inputs, outputs):
    last = getattr(layer, "data_format", "channels_last") == "channels_last"
    features = outputs.shape[-1 if last else 1]
    return Work(math.prod(outputs.shape) // features * _size(layer.kernel))


@work.register(patches.PatchEmbedding)
def _(layer, inputs, outputs):
    return Work(outputs.shape[1] * _size(layer.projection.kernel))


@work.register(patches.ClassToken)
@work.register(patches.RegisterTokens)
@work.register(positions.LearnedPositions)
def _(layer, inputs, outputs):
    return Work()  # Sums only.


@work.register(layers.MLP)
def _(layer, inputs, outputs):
    return _mlp_work(layer, math.prod(inputs.shape[:-1]))


@work.register(SelfAttention)
def _(layer, inputs, outputs):
    return _attention_work(layer, inputs.shape[1], inputs)


@work.register(WindowAttention)
def _(layer, inputs, outputs):
    window = keras.KerasTensor((1, layer.windows.side**2, inputs.shape[-1]))
    found = _attention_work(layer, window.shape[1], window)
    count = layer.windows.count
    return Work(count * found.macs, count * found.values)  # And a little bias.


@work.register(AttentionPooling)
def _(layer, inputs, outputs):
    rows = inputs.shape[0]
    return _attention_work(layer, 1, inputs) + _mlp_work(layer.mlp, rows)


@work.register(layers.MoEMLP)
def _(layer, inputs, outputs):
    rows = inputs.shape[0]  # Several in an ensemble.
    num_tokens, features = math.prod(inputs.shape[1:-1]), inputs.shape[-1]
    slots = slots_of(layer, num_tokens)
    gate = [w for w in layer.router.gate_layer.weights if len(w.shape) > 1]
    # Every matrix of an expert is applied once to each of its slots.
    bank = [w for w in layer.experts.weights if len(w.shape) > 2]
    total = Work(
        num_tokens * sum(map(_size, gate))
        + slots * sum(map(_size, bank)) / layer.num_experts,
        slots * (features + sum(w.shape[-1] for w in bank)),
    )
    if isinstance(layer.router, layers.SoftRouter):
        # Every slot is a mixture of all tokens, and every token of all slots.
        mixtures = 2 * num_tokens * slots
        total += Work(mixtures * features, mixtures)
    if isinstance(layer, layers.SharedExpertMoEMLP):
        total += _mlp_work(layer.shared_expert, num_tokens)
    return Work(rows * total.macs, rows * total.values)


def _attention_work(layer, num_queries, tokens):
    """The work of queries that attend to all tokens."""
    rows, num_tokens, features = tokens.shape
    projected = rows * 2 * (num_queries + num_tokens) * features
    scores = rows * num_queries * num_tokens
    return Work(
        projected * features + 2 * scores * features,
        projected + layer.num_heads * scores,
    )


def _mlp_work(layer, num_tokens):
    size = _size(layer.hidden_dense.kernel) + _size(layer.output_dense.kernel)
    return Work(num_tokens * size, num_tokens * layer.hidden_dim)


def slots_of(layer, num_tokens):
    """Average slots per image in a `MoEMLP` with `num_tokens` tokens."""
    router = layer.router
    if isinstance(router, layers.SoftRouter):
        return layer.num_experts * router.gate_layer.mu.shape[-1]
    # A custom router may have neither.
    selected = getattr(router, "num_selected_experts", 1)
    factor = getattr(router, "capacity_factor", 1.0)
    if factor == "dropless":
        return selected * num_tokens
    if layer.images_per_group == "batch":  # Of a large batch.
        return num_tokens * min(selected * factor, layer.num_experts)
    rows = layer.images_per_group * getattr(router, "copies", 1)
    group = rows * num_tokens
    capacity = routing.capacity(group, layer.num_experts, selected, factor)
    return layer.num_experts * capacity / rows


def _idle_params(layer):
    """Parameters of the experts that a token does not visit, on average."""
    if isinstance(layer.router, layers.SoftRouter):
        return 0
    factor = getattr(layer.router, "capacity_factor", 1.0)
    visited = getattr(layer.router, "num_selected_experts", factor)
    share = max(0.0, 1 - visited / layer.num_experts)
    return share * layer.experts.count_params()


def _size(variable):
    return math.prod(variable.shape)


def without_weights() -> AbstractContextManager[None]:
    """Returns a context that builds models with shapes but no weights.

    Their cost can be counted, however large they are. Do not train or save
    them: every access to a weight draws it anew.

    Example:

    >>> from keras_vmoe.models import from_preset
    >>> with without_weights():
    ...     model = from_preset("vmoe_h14_e32_every2")
    >>> round(cost(model).params / 1e9, 1)
    7.2
    """
    return uninitialized_variables()
