"""Slow definitions of the MoE layer and of what a ViT is made of, in numpy.

In float64 and without Keras, so that a backend that agrees with them agrees
with every other.
"""

import math

import keras
import numpy as np

from keras_vmoe import layers
from tests.routing.definitions import capacity_slowly
from tests.routing.definitions import expert_choice_slowly
from tests.routing.definitions import soft_slowly
from tests.routing.definitions import top_k_slowly


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def gelu_tanh(x):
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return 0.5 * x * (1 + np.tanh(inner))


def mlp_slowly(x, hidden_kernel, hidden_bias, output_kernel, *rest):
    """Then the bias of the output, if there is one, and the activation."""
    *bias, act = rest
    return act(x @ hidden_kernel + hidden_bias) @ output_kernel + sum(bias)


def moe_slowly(
    x,
    gate_kernel,
    experts,
    num_selected_experts,
    capacity_factor,
    images_per_group,
    batch_priority=False,
    activation=gelu,
    mask=None,
):
    """The MoE layer: `(B, N, D)` to `(B, N, D)`, one group after the other.

    `experts` are the four stacked arrays of E MLPs. Each group's capacity is
    that of a full group, never more than its own tokens. Tokens at False in
    the `(B, N)` mask choose nobody.
    """
    num_images, num_tokens, features = x.shape
    num_experts = gate_kernel.shape[1]
    if images_per_group in (None, "batch"):
        images_per_group = num_images
    out = np.zeros(x.shape)
    mask = np.ones(x.shape[:2], bool) if mask is None else mask
    for start in range(0, num_images, images_per_group):
        images = x[start : start + images_per_group]
        tokens = images.reshape(1, -1, features).astype("float64")
        capacity = capacity_slowly(
            images_per_group * num_tokens,
            num_experts,
            num_selected_experts,
            capacity_factor,
        )
        capacity = min(capacity, tokens.shape[1])
        dispatch, combine, _ = top_k_slowly(
            softmax(tokens @ gate_kernel),
            num_selected_experts,
            capacity,
            batch_priority,
            mask[start : start + images_per_group].reshape(1, -1),
        )
        buffers = np.einsum("gsec,gsd->gecd", dispatch, tokens)
        outputs = np.zeros(buffers.shape)
        for e in range(num_experts):
            weights = [array[e] for array in experts]
            outputs[:, e] = mlp_slowly(buffers[:, e], *weights, activation)
        combined = np.einsum("gsec,gecd->gsd", combine, outputs)
        out[start : start + images_per_group] = combined.reshape(images.shape)
    return out


def unit(x, axis):
    return x / np.sqrt((x**2).sum(axis=axis, keepdims=True) + 1e-6)


def logits_slowly(gate, tokens):
    """Logits of a gate, one token and one expert at a time."""
    tokens = tokens.astype("float64")
    kernel = None if hasattr(gate, "mu") else float64(gate.kernel)
    if isinstance(gate, layers.LinearGate):
        return tokens @ kernel
    if isinstance(gate, layers.SoftGate):
        mu = unit(float64(gate.mu), 0)
        scale = float64(gate.scale)
        return scale * np.einsum("gsd,dep->gsep", unit(tokens, -1), mu)
    projected = tokens @ kernel + float64(gate.bias)
    codes = float64(gate.codes)
    scale = min(np.exp(float64(gate.log_scale)), 1 / gate.min_temperature)
    logits = np.zeros((*tokens.shape[:2], gate.num_experts))
    for g, s, e in np.ndindex(logits.shape):
        token, code = projected[g, s], codes[:, e]
        if isinstance(gate, layers.CosineGate):
            logits[g, s, e] = scale * (unit(token, 0) @ unit(code, 0))
        else:
            logits[g, s, e] = -scale * ((token - code) ** 2).sum()
    return logits


def plan_slowly(router, tokens, group_size, mask):
    """What any router makes of `(G, S, D)` tokens without noise.

    Args:
        router: A built router.
        tokens: `(G, S, D)` array.
        group_size: Tokens of a full group.
        mask: `(G, S)` bool array.

    Returns:
        `logits`, `dispatch` and `combine` `(G, S, E, C)`, and `load` `(G, E)`.
    """
    logits = logits_slowly(router.gate_layer, tokens)
    if isinstance(router, layers.SoftRouter):
        dispatch, combine = soft_slowly(logits, mask)
        return logits, dispatch, combine, combine.sum(axis=(1, 3))
    gates, num_tokens = softmax(logits), tokens.shape[1]

    def places(num_selected_experts):
        if router.capacity_factor == "dropless":
            return num_tokens
        capacity = capacity_slowly(
            group_size,
            router.num_experts,
            num_selected_experts,
            router.capacity_factor,
        )
        return min(capacity, num_tokens)

    if isinstance(router, layers.ExpertChoiceRouter):
        dispatch, combine = expert_choice_slowly(gates, places(1), mask)
        return logits, dispatch, combine, dispatch.sum(axis=(1, 3))
    scores = gates
    if isinstance(router, layers.BiasBalancedRouter):
        scores = gates + float64(router.bias)
    selected = router.num_selected_experts
    plan = top_k_slowly(
        gates, selected, places(selected), router.batch_priority, mask, scores
    )
    return logits, *plan


def moe_layer_slowly(layer, images, mask=None, activation=gelu):
    """A `MoEMLP` with any router: `(B, N, D)` to `(B, N, D)`."""
    whole = layer.images_per_group == "batch"
    size = len(images) if whole else layer.images_per_group
    mask = np.ones(images.shape[:2], bool) if mask is None else mask
    out = np.zeros(images.shape)
    for start in range(0, len(images), size):
        part = slice(start, start + size)
        tokens = images[part].reshape(1, -1, images.shape[-1])
        tokens = tokens.astype("float64")
        _, dispatch, combine, _ = plan_slowly(
            layer.router,
            tokens,
            size * images.shape[1],
            mask[part].reshape(1, -1),
        )
        buffers = np.einsum("gsec,gsd->gecd", dispatch, tokens)
        outputs = np.zeros(buffers.shape)
        for e in range(layer.num_experts):
            weights = [array[e] for array in experts_of(layer)]
            outputs[:, e] = mlp_slowly(buffers[:, e], *weights, activation)
        combined = np.einsum("gsec,gecd->gsd", combine, outputs)
        out[part] = combined.reshape(images[part].shape)
    return out


def experts_of(layer):
    """The four stacked arrays of a built `MoEMLP`."""
    experts = layer.experts
    arrays = (
        experts.hidden_kernel,
        experts.hidden_bias,
        experts.output_kernel,
        *([] if experts.output_bias is None else [experts.output_bias]),
    )
    return [float64(array) for array in arrays]


def gate_kernel_of(layer):
    return float64(layer.router.gate_layer.kernel)


def float64(tensor):
    array = keras.ops.convert_to_numpy(keras.ops.cast(tensor, "float32"))
    return array.astype("float64")


def layer_norm(x, scale, bias, epsilon=1e-6):
    mean = x.mean(axis=-1, keepdims=True)
    variance = x.var(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon) * scale + bias


def attention_slowly(query, value, weights):
    """Multi-head attention by the reference's names of weights."""
    q, k, v = (
        np.einsum("bnd,dhe->bhne", x, weights[f"{part}/kernel"])
        + weights[f"{part}/bias"][:, None]
        for x, part in ((query, "query"), (value, "key"), (value, "value"))
    )
    if "query_ln/scale" in weights:
        q = layer_norm(q, weights["query_ln/scale"], 0)
        k = layer_norm(k, weights["key_ln/scale"], 0)
    scores = np.einsum("bhne,bhme->bhnm", q, k) / math.sqrt(q.shape[-1])
    mixed = np.einsum("bhnm,bhme->bhne", softmax(scores), v)
    out = np.einsum("bhne,hed->bnd", mixed, weights["out/kernel"])
    return out + weights["out/bias"]


def patches_slowly(images, kernel, bias):
    """Row by row; kernel `(p, p, channels, D)`."""
    side = kernel.shape[0]
    rows, columns = (size // side for size in images.shape[1:3])
    tokens = [
        np.einsum(
            "bhwc,hwcd->bd",
            images[:, y * side :, x * side :][:, :side, :side],
            kernel,
        )
        for y in range(rows)
        for x in range(columns)
    ]
    return np.stack(tokens, axis=1) + bias
