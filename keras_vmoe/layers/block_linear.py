"""A linear map for each block of rows, by the kernel of the block's expert."""

import keras
from keras import ops


def block_linear(x, kernel, bias, expert=None):
    """`x[m] @ kernel[expert[m]] + bias[expert[m]]` for every block m.

    Args:
        x: `(M, T, D)` tensor, M blocks of T rows.
        kernel: `(E, D, F)` variable.
        bias: `(E, F)` variable.
        expert: `(M,)` int32 tensor, ascending. None means one block for each
            expert, in their order.

    Returns:
        `(M, T, F)` tensor.
    """
    kernel, bias = ops.convert_to_tensor(kernel), ops.convert_to_tensor(bias)
    if expert is None:
        return ops.matmul(x, kernel) + bias[:, None]
    return _matmul(x, kernel, expert) + ops.take(bias, expert, axis=0)[:, None]


def _matmul(x, kernel, expert):
    """`x[m] @ kernel[expert[m]]`, as fast as the backend can."""
    if keras.backend.backend() == "torch":
        return _matmul_segments(x, kernel, expert)
    if keras.backend.backend() == "jax" and _has_grouped_matmul():
        return _matmul_ragged(x, kernel, expert)
    return ops.matmul(x, ops.take(kernel, expert, axis=0))


def _has_grouped_matmul():
    import jax

    # On CPU `ragged_dot` multiplies every row with every expert.
    return jax.default_backend() != "cpu"


def _matmul_ragged(x, kernel, expert):
    import jax

    blocks, size, features = x.shape
    experts = ops.arange(kernel.shape[0], dtype="int32")
    count = ops.sum(ops.cast(expert[:, None] == experts, "int32"), axis=0)
    rows = ops.reshape(x, (blocks * size, features))
    rows = jax.lax.ragged_dot(rows, kernel, count * size)
    return ops.reshape(rows, (blocks, size, kernel.shape[-1]))


def _matmul_segments(x, kernel, expert):
    """One product per expert; the host reads their sizes."""
    import torch

    sizes = torch.bincount(expert, minlength=kernel.shape[0]).tolist()
    segments = zip(torch.split(x, sizes), kernel, strict=True)
    return torch.cat([rows @ matrix for rows, matrix in segments])
