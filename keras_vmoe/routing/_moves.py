"""The two moves of a sparse plan, each the gradient of the other.

Both are gathers, forward and backward, to any order. Backends use a scatter as
the gradient of a gather; it is slow on some of them, and on GPUs it adds up in
a different order each time.
"""

import functools
import operator

import keras
from keras import ops

from keras_vmoe.routing._rows import take_rows


def spread(tokens, choice, slot):
    """Copies tokens into the slots of their choices.

    Args:
        tokens: `(G, S, D)` tensor.
        choice: `(G, E, C)` int32, the choice `s * K + k` in each slot; `S * K`
            in an empty one.
        slot: `(G, S, K)` int32, the slot `e * C + c` of each choice; `E * C` of
            a dropped one.

    Returns:
        `(G, E, C, D)` tensor, 0 in empty slots.
    """
    return _moves()[0](tokens, choice, slot)


def collect(buffers, choice, slot):
    """Sums the slots of each token's choices.

    Args:
        buffers: `(G, E, C, D)` tensor.
        choice: As in `spread`.
        slot: As in `spread`.

    Returns:
        `(G, S, D)` tensor, 0 for a token that has no slot.
    """
    return _moves()[1](buffers, choice, slot)


def _spread(tokens, choice, slot):
    # An empty slot holds S * K, and the quotient is S: no token.
    return take_rows(tokens, choice // slot.shape[-1])


def _collect(buffers, choice, slot):
    groups, num_experts, capacity, features = ops.shape(buffers)
    flat = (groups, num_experts * capacity, features)
    rows = take_rows(ops.reshape(buffers, flat), slot)  # (G, S, K, D)
    # Added one by one: XLA on CPU fuses a reduction over K with the gather
    # before it and takes forty times as long.
    return functools.reduce(operator.add, ops.unstack(rows, axis=2))


def _moves():
    """Returns both moves, each with the other as its gradient."""
    if not MOVES:
        MOVES.extend(
            _with_gradient(move, 1 - index)
            for index, move in enumerate((_spread, _collect))
        )
    return MOVES


def _with_gradient(move, index):
    # Indices are arguments, not closed over: JAX's rematerialization traces the
    # gradient where the values of the closure no longer exist.
    @ops.custom_gradient
    def function(x, choice, slot):
        def gradient(*args, upstream=None):
            upstream = args[-1] if upstream is None else upstream
            return MOVES[index](upstream, choice, slot), None, None

        return move(x, choice, slot), gradient

    return function


def _moves_of_torch():
    """The moves on PyTorch, where Keras's do not support `torch.func`."""
    import torch

    class Move(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x, choice, slot, index):
            return (_spread, _collect)[index](x, choice, slot)

        @staticmethod
        def setup_context(ctx, inputs, output):
            _, choice, slot, ctx.index = inputs
            ctx.save_for_backward(choice, slot)
            ctx.save_for_forward(choice, slot)

        @staticmethod
        def backward(ctx, upstream):
            moved = Move.apply(upstream, *ctx.saved_tensors, 1 - ctx.index)
            return moved, None, None, None

        @staticmethod
        def jvp(ctx, tangent, *_):  # Both moves are linear.
            return Move.apply(tangent, *ctx.saved_tensors, ctx.index)

    def spread(tokens, choice, slot):
        return Move.apply(tokens, choice, slot, 0)

    def collect(buffers, choice, slot):
        return Move.apply(buffers, choice, slot, 1)

    return [spread, collect]


# Made here for PyTorch, whose compiler cannot make a class.
MOVES = _moves_of_torch() if keras.backend.backend() == "torch" else []
