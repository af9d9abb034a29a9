"""Gates and masks to make plans of, and the layer that tests plans in."""

import numpy as np
from keras import ops

from tests.gradients import value_and_gradients


def random_gates(num_groups=2, num_tokens=9, num_experts=4, seed=0):
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(num_groups, num_tokens, num_experts))
    gates = np.exp(logits - logits.max(-1, keepdims=True))
    return (gates / gates.sum(-1, keepdims=True)).astype("float32")


def tied_gates():
    """Every token ties with its neighbors, and experts tie within a token."""
    gates = np.full((2, 9, 4), 0.25, "float32")
    gates[0, 3:6] = [0.1, 0.4, 0.1, 0.4]
    gates[1, ::2] = [0.0, 0.5, 0.5, 0.0]
    return gates


def crowded_gates():
    """All tokens want expert 2; nobody ever wants expert 0."""
    gates = random_gates()
    gates[..., 2] += 2.0
    gates[..., 0] = 0.0
    return gates


def some_mask():
    """Holes in the first group; the second group is padding only."""
    mask = np.ones((2, 9), bool)
    mask[0, [1, 4, 8]] = False
    mask[1] = False
    return mask


GATES = {
    "random": random_gates(),
    "ties": tied_gates(),
    "an empty and an overflowing expert": crowded_gates(),
}


def slow_layer(gates, tokens, scale, probe, dispatch):
    """The same loss by one-hot einsums."""
    dispatch = ops.cast(dispatch, "float32")
    buffers = ops.einsum("gsec,gsd->gecd", dispatch, tokens)
    combine = dispatch * gates[..., None]
    outputs = ops.tanh(scale * buffers)
    return ops.sum(probe * ops.einsum("gsec,gecd->gsd", combine, outputs))


def random_layer(gates, num_features=3):
    """Tokens, a probe of the same shape and the experts' scales."""
    generator = np.random.default_rng(1)
    shape = (*gates.shape[:2], num_features)
    shapes = (shape, shape, (gates.shape[-1], 1, num_features))
    return [generator.normal(size=s).astype("float32") for s in shapes]


def images_of(gates):
    """Into how many images the tokens of a group are cut, for statistics."""
    return 3 if gates.shape[1] % 3 == 0 else 1


def check_layer(fast, gates, settings, dispatch, mask=None):
    """A MoE layer by a plan against one-hot einsums, values and gradients.

    The experts are `tanh(scale_e * x)`, so that the buffers matter to them.

    Args:
        fast: Function of gates, tokens, the experts' scales, a probe and
            perhaps a mask; returns a loss and further tensors.
        gates: `(G, S, E)` array.
        settings: What the case is, for the message.
        dispatch: `(G, S, E, C)` array, who is served.
        mask: Optional `(G, S)` bool array.

    Returns:
        The further tensors, and the tokens.
    """
    tokens, probe, scale = random_layer(gates)
    constants = (probe,) if mask is None else (probe, mask)
    (value, more), gradients = value_and_gradients(
        fast, gates, tokens, scale, constants=constants
    )
    expected_value, expected = value_and_gradients(
        slow_layer, gates, tokens, scale, constants=(probe, dispatch)
    )
    np.testing.assert_allclose(
        value, expected_value, rtol=1e-5, atol=1e-6, err_msg=str(settings)
    )
    for name, got, want in zip(
        ("gates", "tokens", "scale"), gradients, expected, strict=True
    ):
        np.testing.assert_allclose(
            got, want, rtol=1e-5, atol=1e-6, err_msg=f"{name} {settings}"
        )
    return more, tokens
