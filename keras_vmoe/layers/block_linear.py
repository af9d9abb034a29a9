"""A linear map of blocks of rows, each with the kernel of its expert."""

import functools

import keras
from keras import ops


def block_linear(x, kernel, bias, blocks=()):
    """`x[m] @ kernel[expert[m]] + bias[expert[m]]` for every block m.

    Args:
        x: `(M, T, D)` tensor, M blocks of T rows.
        kernel: `(E, D, F)` tensor.
        bias: `(E, F)` tensor, or None.
        blocks: `expert`, an ascending `(M,)` int32 tensor, and `count`, an
            int32 scalar, the number of blocks in use; these come first. Empty
            means one block per expert, in order.

    Returns:
        `(M, T, F)` tensor.
    """
    if not blocks:
        return _batched(x, kernel, bias)
    expert, count = blocks
    product = _matmul(x, kernel, expert, count)
    if bias is None:
        return product
    return product + ops.take(bias, expert, axis=0)[:, None]


def _batched(x, kernel, bias):
    """One block for each expert."""
    if bias is None:
        return ops.matmul(x, kernel)
    if keras.backend.backend() == "torch":
        import torch

        # Saves a pass over the result: 0.96 instead of 1.08 times dense.
        return torch.baddbmm(bias[:, None], x, kernel)
    return ops.matmul(x, kernel) + bias[:, None]


def fuses_by_expert(x):
    """Whether running experts one by one is faster than all at once.

    It is in TensorFlow on a CPU, which fuses a product with its bias and
    activation, but not a batched product; see benchmarks/moe_layer.py. In
    bfloat16 the bias would get a coarse gradient.
    """
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    kinds = {device.device_type for device in tf.config.list_logical_devices()}
    return x.dtype == tf.float32 and kinds == {"CPU"}


def expert_linear(x, kernel, bias):
    """`x @ kernel + bias` of one expert, as TensorFlow fuses it."""
    if bias is None:
        return x @ kernel
    import tensorflow as tf

    return tf.nn.bias_add(x @ kernel, bias)


def _matmul(x, kernel, expert, count):
    """`x[m] @ kernel[expert[m]]`, the fastest way on each backend."""
    if keras.backend.backend() == "torch":
        return _matmul_segments(x, kernel, expert)
    if keras.backend.backend() == "jax":
        return _matmul_jax(x, kernel, expert, count)
    return ops.matmul(x, ops.take(kernel, expert, axis=0))


def _matmul_jax(x, kernel, expert, count):
    import jax

    if jax.default_backend() == "cpu":
        # On CPU `ragged_dot` multiplies every row by every expert.
        return _matmul_loop(x, kernel, expert, count)
    return _matmul_ragged(x, kernel, expert)


def _matmul_loop(x, kernel, expert, count):
    """Multiplies block after block, only those in use."""
    return _loops()(x, kernel, expert, count, False)


@functools.cache
def _loops():
    """The product, with custom gradients for loops of unknown length.

    The gradient for the rows is again a product, and for the kernel a sum of
    outer products, whose gradients are products: derivatives of any order work.
    """
    import jax

    @functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
    def product(x, kernel, expert, count, transposed):
        def body(b, y):
            matrix = kernel[expert[b]]
            return y.at[b].set(x[b] @ (matrix.T if transposed else matrix))

        features = kernel.shape[1 if transposed else 2]
        zeros = ops.zeros((*x.shape[:2], features), x.dtype)
        return jax.lax.fori_loop(0, count, body, zeros)

    def of_product(transposed, saved, upstream):
        x, kernel, expert, count = saved
        pair = (upstream, x) if transposed else (x, upstream)
        d_x = product(upstream, kernel, expert, count, not transposed)
        d_kernel = outer(*pair, expert, count, len(kernel))
        return d_x, d_kernel.astype(kernel.dtype), None, None

    @functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
    def outer(x, y, expert, count, num_experts):
        def body(b, total):
            each = (x[b].T @ y[b]).astype("float32")
            return total.at[expert[b]].add(each)

        # Summed in float32: in bfloat16 the error grows with the blocks.
        shape = (num_experts, x.shape[-1], y.shape[-1])
        return jax.lax.fori_loop(0, count, body, ops.zeros(shape, "float32"))

    def of_outer(_, saved, upstream):
        x, y, expert, count = saved
        kernel = upstream.astype(x.dtype)
        d_x = product(y, kernel, expert, count, True)
        return d_x, product(x, kernel, expert, count, False), None, None

    product.defvjp(lambda *args: (product(*args), args[:4]), of_product)
    outer.defvjp(lambda *args: (outer(*args), args[:4]), of_outer)
    return product


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

    experts = torch.arange(kernel.shape[0], device=expert.device)
    try:
        # Not `bincount`, which warns of its speed under `torch.vmap`.
        sizes = (expert[:, None] == experts).sum(0).tolist()
    except RuntimeError:  # `torch.vmap` has no values to read.
        return ops.matmul(x, ops.take(kernel, expert, axis=0))
    segments = zip(torch.split(x, sizes), kernel, strict=True)
    return torch.cat([rows @ matrix for rows, matrix in segments])
