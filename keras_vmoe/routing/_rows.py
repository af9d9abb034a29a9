"""A gather of rows, and its transpose, a sum of rows."""

import math

import keras
from keras import ops


def take_rows(x, index):
    """Takes rows of `x` `(G, M, D)` at `index` `(G, ...)`; 0 at index M."""
    groups, num_rows, features = ops.shape(x)
    shape = ops.shape(index)
    index = ops.reshape(index, (groups, math.prod(shape[1:])))
    exists = (index < num_rows)[..., None]
    index = ops.minimum(index, num_rows - 1)
    if keras.backend.backend() == "jax":
        # A batched gather: flat indices would make the SPMD partitioner gather
        # the tokens of all groups on every device.
        rows = ops.take_along_axis(x, index[..., None], axis=1)
    else:
        # TensorFlow and PyTorch broadcast the index of `take_along_axis` to
        # all features, which is ten times slower than taking rows of a matrix.
        offset = ops.arange(groups, dtype="int32")[:, None] * num_rows
        rows = ops.take(
            ops.reshape(x, (groups * num_rows, features)),
            index + offset,
            axis=0,
        )
    rows = ops.where(exists, rows, ops.zeros((), x.dtype))
    return ops.reshape(rows, (*shape, features))


def add_rows(rows, index, num_rows):
    """Sums `rows` `(G, ..., D)` into `(G, num_rows, D)`; undoes `take_rows`.

    Args:
        rows: `(G, ..., D)` tensor.
        index: `(G, ...)` int32 tensor in `[0, num_rows]`; rows at `num_rows`
            are left out.
        num_rows: Rows of the result, per group.

    Returns:
        `(G, num_rows, D)` tensor.
    """
    groups, features = ops.shape(rows)[0], ops.shape(rows)[-1]
    count = math.prod(ops.shape(index)[1:])
    rows = ops.reshape(rows, (groups, count, features))
    index = ops.reshape(index, (groups, count))
    if keras.backend.backend() == "jax":
        # Group by group, as in `take_rows`.
        added = ops.vectorized_map(
            lambda pair: ops.segment_sum(*pair, num_segments=num_rows + 1),
            (rows, index),
        )
    else:
        offset = ops.arange(groups, dtype="int32")[:, None] * (num_rows + 1)
        added = ops.segment_sum(
            ops.reshape(rows, (groups * count, features)),
            ops.reshape(index + offset, (groups * count,)),
            num_segments=groups * (num_rows + 1),
        )
        added = ops.reshape(added, (groups, num_rows + 1, features))
    return added[:, :-1]
