"""Selection of each token's K best experts."""

from keras import ops

LOWEST = -6e4  # Above -inf, which marks taken experts, in every float type.


def softmax(logits, axis=-1):
    """`ops.softmax` without its warning for an axis of size 1 (one expert).

    NaN is kept, and the gradient is 0, not missing.
    """
    if logits.shape[axis] == 1:
        return 0 * logits + 1
    return ops.softmax(logits, axis)


def select_experts(gates, num_selected_experts, scores=None):
    """Selects the K best experts of each token, and their gates.

    Ties go to the lower expert index. The gradient of the values reaches
    only the selected gates.

    Args:
        gates: `(G, S, E)` float tensor.
        num_selected_experts: K, at most E.
        scores: Optional `(G, S, E)` tensor to select by, instead of the gates.

    Returns:
        `(experts, values)`, both `(G, S, K)`: int32 expert indices in order of
        decreasing score, and the gates at these indices.

    Example:

    >>> experts, values = select_experts(
    ...     keras.ops.convert_to_tensor([[[0.2, 0.5, 0.3]]]), 2)
    >>> keras.ops.convert_to_numpy(experts).tolist()
    [[[1, 2]]]
    """
    num_experts = gates.shape[-1]
    indices = ops.arange(num_experts, dtype="int32")
    # Not `ops.top_k`: TensorFlow cannot run it in an export from JAX, and with
    # a sharded batch it gathers the scores of all devices. For the few experts
    # that a token selects, repeated maxima cost the same. Nor `ops.argmax`,
    # which Keras builds for TensorFlow from bit operations unknown to ONNX.
    remaining = ops.stop_gradient(gates if scores is None else scores)
    # NaN equals nothing, and would leave fewer than K experts: give it a rank.
    remaining = ops.where(ops.isnan(remaining), LOWEST, remaining)
    experts, values = [], []
    for _ in range(num_selected_experts):
        best = ops.max(remaining, axis=-1, keepdims=True)
        expert = ops.where(remaining == best, indices, num_experts)
        expert = ops.min(expert, axis=-1)
        chosen = ops.expand_dims(expert, -1) == indices  # (G, S, E)
        experts.append(expert)
        values.append(
            ops.sum(ops.where(chosen, gates, ops.zeros_like(gates)), axis=-1)
        )
        remaining = ops.where(chosen, -float("inf"), remaining)
    return ops.stack(experts, axis=-1), ops.stack(values, axis=-1)


def renormalized(weights):
    """`(G, S, K)` combine weights divided by their sum; 0 stays 0."""
    total = ops.sum(weights, axis=-1, keepdims=True)
    return weights / ops.where(total == 0, ops.ones_like(total), total)
