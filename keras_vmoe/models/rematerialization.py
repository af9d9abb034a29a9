"""Rematerialization: recomputes blocks instead of keeping activations."""

import itertools

import keras
from keras import ops

from keras_vmoe.layers.moe import MoEMLP


def segments(model):
    """Splits a model into models from one residual sum to the next.

    Args:
        model: A functional model of one input and one output.

    Returns:
        A list of functional models of the same layers; their sequence is the
        model.
    """
    sums = [x.output for x in model.layers if isinstance(x, keras.layers.Add)]
    ends = [model.inputs[0], *sums, model.outputs[0]]
    return [
        keras.Model(*pair, name=f"{model.name}_segment_{i}")
        for i, pair in enumerate(itertools.pairwise(ends))
    ]


def train_in_segments(segments, x):
    """Runs a model in training and keeps few activations.

    For the gradient each backend keeps the inputs of a segment and runs the
    segment again. That run must see the same seeds and change no state twice:
    a segment runs on values, and returns changed states as results.

    Args:
        segments: Models from `segments`.
        x: Inputs of the first.

    Returns:
        Outputs of the last. Losses and states match those of a single run.
    """
    for segment in segments:
        learned = [v for v in segment.variables if v.trainable]
        states = [v for v in segment.variables if not v.trainable]
        run = keras.remat(_on_values(segment, learned, states))
        x, losses, values = run(x, *[v.value for v in learned])
        for loss in losses:
            _moe_layer(segment).add_loss(loss)
        for state, value in zip(states, values, strict=True):
            state.assign(value)
    return x


def _on_values(segment, learned, states):
    """A function of inputs and learned values, without side effects."""
    # PyTorch changes them in place before they are read again.
    before = [(state, ops.copy(state.value)) for state in states]

    def run(x, *values):
        known = [*zip(learned, values, strict=True), *before]
        with keras.StatelessScope(known, collect_losses=True) as scope:
            outputs = segment(x, training=True)
        after = [scope.get_current_value(state) for state in states]
        return outputs, scope.losses, after

    return run


def _moe_layer(segment):
    """The layer that adds the losses: Keras's models cannot."""
    return next(x for x in segment.layers if isinstance(x, MoEMLP))
