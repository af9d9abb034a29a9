"""Routing plans: who goes where, and the two moves that follow from it."""

import dataclasses
import functools
import math
import operator
from typing import Any

import keras
from keras import ops


@dataclasses.dataclass(frozen=True)
class SparsePlan:
    """A sparse routing decision, known from both of its ends.

    Buffers know which choice fills each place and choices know their place, so
    tokens move by gathers alone, forward and backward. No `(G, S, E, C)` tensor
    is ever made, as the one-hot einsums of the reference program need.

    Attributes:
        choice: `(G, E, C)` int32, the choice `s * K + k` that holds the place;
            `S * K` where the place is empty.
        slot: `(G, S, K)` int32, the place `e * C + c` of the choice; `E * C`
            where the choice was dropped.
        weight: `(G, S, K)` float, the combine weight; 0 where dropped.
        load: `(G, E)` int32, how many choices fell on the expert, with those
            that were dropped.
    """

    choice: Any
    slot: Any
    weight: Any
    load: Any

    def dispatch(self, tokens):
        """Fills the experts' buffers.

        Args:
            tokens: `(G, S, D)` tensor.

        Returns:
            `(G, E, C, D)` tensor, 0 at empty places.
        """
        # An empty place holds S * K, so that the quotient is S: no token.
        source = self.choice // self.slot.shape[-1]

        # Indices are arguments and not closed over: JAX's rematerialisation
        # traces the gradient where the closure's values no longer exist.
        @ops.custom_gradient
        def move(tokens, source, slot):
            def gradient(*args, upstream=None):
                upstream = args[-1] if upstream is None else upstream
                return _sum_choices(_rows(_flat(upstream), slot)), None, None

            return _rows(tokens, source), gradient

        return move(tokens, source, self.slot)

    def combine(self, buffers):
        """Brings the experts' outputs back to the tokens.

        Args:
            buffers: `(G, E, C, D)` tensor.

        Returns:
            `(G, S, D)` tensor: per token the sum of its experts' outputs times
            the combine weights, 0 for a token that all its experts dropped.
        """
        weight = ops.cast(self.weight, buffers.dtype)

        @ops.custom_gradient
        def move(buffers, weight, choice, slot):
            returned = _rows(_flat(buffers), slot)  # (G, S, K, D)

            def gradient(*args, upstream=None):
                upstream = args[-1] if upstream is None else upstream
                source = choice // slot.shape[-1]
                gain = _rows(_choices(weight), choice)
                d_buffers = _rows(upstream, source) * gain
                d_weight = ops.sum(returned * upstream[:, :, None, :], axis=-1)
                return d_buffers, d_weight, None, None

            return _sum_choices(returned * weight[..., None]), gradient

        return move(buffers, weight, self.choice, self.slot)

    def load_share(self):
        """Share of all choices that fell on each expert, `(E,)`, sum 1."""
        load = ops.cast(ops.sum(self.load, axis=0), "float32")
        return ops.divide_no_nan(load, ops.sum(load))

    def dropped_share(self):
        """Share of all choices that were dropped, a scalar in `[0, 1]`."""
        places = self.choice.shape[1] * ops.shape(self.choice)[2]
        served = ops.sum(ops.cast(self.slot < places, "float32"))
        total = ops.cast(ops.sum(self.load), "float32")
        return ops.divide_no_nan(total - served, total)


def _flat(buffers):
    """`(G, E, C, D)` as `(G, E * C, D)`."""
    groups, num_experts, capacity, features = ops.shape(buffers)
    return ops.reshape(buffers, (groups, num_experts * capacity, features))


def _choices(weight):
    """`(G, S, K)` as `(G, S * K, 1)`."""
    groups, num_tokens, num_choices = ops.shape(weight)
    return ops.reshape(weight, (groups, num_tokens * num_choices, 1))


def _sum_choices(x):
    """`(G, S, K, D)` summed over K."""
    # Added one by one: XLA on CPU fuses a reduction over K with the gather in
    # front of it and takes forty times as long.
    return functools.reduce(operator.add, ops.unstack(x, axis=2))


def _rows(x, index):
    """Rows of `x` `(G, M, D)` at `index` `(G, ...)`; 0 where `index` is M."""
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
        # all features, ten times slower than rows of a matrix.
        offset = ops.arange(groups, dtype="int32")[:, None] * num_rows
        rows = ops.take(
            ops.reshape(x, (groups * num_rows, features)),
            index + offset,
            axis=0,
        )
    rows = ops.where(exists, rows, ops.zeros((), x.dtype))
    return ops.reshape(rows, (*shape, features))
