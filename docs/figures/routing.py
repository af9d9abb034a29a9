"""Four ways of routing one small example: who is served, who is dropped.

python docs/figures/routing.py
"""

import numpy as np
from keras import ops
from style import COLORS
from style import Canvas
from style import save

from keras_vmoe import routing

# Of 12 tokens for 3 experts. Later tokens are the more confident ones.
LOGITS = np.array([
    [1.1, 0.4, 0.0], [0.3, 1.0, 0.1], [1.6, 0.2, 0.3], [0.2, 0.1, 0.9],
    [0.9, 0.3, 0.5], [0.1, 2.1, 1.6], [1.9, 0.1, 0.4], [0.1, 0.6, 0.9],
    [0.2, 2.1, 0.5], [2.6, 0.3, 0.2], [0.3, 2.8, 0.1], [2.2, 0.5, 0.1],
])  # fmt: skip
CAPACITY = 3
LEFT, CELL, BARS, PANEL = 36, 27, 36, 226


def main():
    """Draws two by two panels, and one below the other for phones."""
    found = panels()
    save(lambda theme: draw(found, theme, columns=2), "routing")
    save(lambda theme: draw(found, theme, columns=1), "routing_narrow")


def panels():
    """Title, explanation, slots `(S, E)` and weights `(S, E)` of each way."""
    logits = ops.convert_to_tensor(LOGITS[None], "float32")
    gates = ops.softmax(logits, axis=-1)
    vanilla, priority = (
        routing.top_k_plan(gates, 1, CAPACITY, batch_priority=x)
        for x in (False, True)
    )
    choice = routing.expert_choice_plan(gates, CAPACITY)
    soft = routing.soft_plan(logits[..., None])
    share = ops.convert_to_numpy(soft.dispatch_weight)[0, :, :, 0]
    taken = slots(choice.token)
    twice = int((np.sum(taken >= 0, axis=1) > 1).sum())
    none = int((np.sum(taken >= 0, axis=1) == 0).sum())
    return [
        ("Vanilla top-K", f"first come, first served: {lost(vanilla)}",
         slots(vanilla.choice), None),
        ("Batch Prioritized Routing", "the largest gates are served first: "
         f"{lost(priority)}", slots(priority.choice), None),
        ("Expert choice", f"experts pick their best {CAPACITY}; tokens picked "
         f"twice: {twice}, never: {none}", taken, None),
        ("Soft routing", "a slot per expert mixes all tokens: none is dropped",
         None, share),
    ]  # fmt: skip


def lost(plan):
    """How many tokens a plan drops, in words."""
    return f"{round(len(LOGITS) * float(plan.dropped_share()))} are dropped"


def slots(tokens):
    """`(S, E)`, the slot of each token at each expert, -1 for none.

    Args:
        tokens: `(1, E, C)`, the token in each slot; S where it is empty.
    """
    found = np.full(LOGITS.shape, -1)
    for expert, row in enumerate(ops.convert_to_numpy(tokens)[0]):
        for slot, token in enumerate(row):
            if token < len(LOGITS):
                found[token, expert] = slot
    return found


def draw(found, theme, columns):
    """All panels and the legend."""
    rows = -(-len(found) // columns)
    height = rows * PANEL + 22 * (3 - columns)
    canvas = Canvas(380 * columns, height, theme)
    for i, (title, words, taken, share) in enumerate(found):
        x, y = 380 * (i % columns), PANEL * (i // columns)
        canvas.text(x + 8, y + 16, title, 14, align="left", bold=True)
        canvas.text(x + 8, y + 35, words, 12, "muted", align="left")
        bars(canvas, x + LEFT, y + 48)
        y += 48 + BARS + 6
        for expert in range(LOGITS.shape[1]):
            top = y + expert * (CELL + 3)
            name = f"E{expert}"
            canvas.text(x + 20, top + CELL / 2, name, 12, "muted")
            for token in range(len(LOGITS)):
                at = (canvas, x + LEFT + token * CELL, top, expert)
                if share is not None:
                    mixed(*at, share[token, expert])
                else:
                    cell(*at, token, taken)
        for token in range(len(LOGITS)):
            middle = x + LEFT + (token + 0.5) * CELL
            canvas.text(middle, y + 3 * CELL + 18, str(token), 11, "muted")
    legend(canvas, rows * PANEL + 6, columns)
    return canvas


def bars(canvas, x, y):
    """The priority of each token: its largest gate."""
    canvas.text(x - 16, y + BARS - 8, "gate", 11, "muted")
    gates = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True)
    for token, gate in enumerate(gates.max(axis=1)):
        tall = BARS * gate
        left = x + token * CELL + 6
        canvas.box(left, y + BARS - tall, CELL - 12, tall, radius=1)


def cell(canvas, x, y, expert, token, taken):
    """One token at one expert: a slot, a cross, or a point."""
    slot, color = taken[token, expert], COLORS[expert]
    middle = (x + CELL / 2, y + CELL / 2)
    wanted = LOGITS[token].argmax() == expert and taken[token].max() < 0
    if slot >= 0:
        canvas.box(x + 2, y + 1, CELL - 4, CELL - 2, color)
        canvas.text(*middle, str(slot), 12)
    elif wanted:
        canvas.box(x + 2, y + 1, CELL - 4, CELL - 2, color, empty=True)
        canvas.text(*middle, "×", 14)
    else:
        canvas.text(*middle, "·", 12, "muted")


def mixed(canvas, x, y, expert, share):
    """A square of the area of a token's share in the expert's slot."""
    side = (CELL - 3) * (share / 0.4) ** 0.5
    margin = (CELL - side) / 2
    canvas.box(x + margin, y + margin, side, side, COLORS[expert], radius=1)


def legend(canvas, y, columns):
    """What the marks mean, in one line or in two."""
    lines = [
        "Bar: largest gate of the token. Number: its slot at the expert.",
        "×: dropped. Square: share in the slot.",
    ]
    for line in [" ".join(lines)] if columns == 2 else lines:
        canvas.text(8, y, line, 12, "muted", align="left")
        y += 20


if __name__ == "__main__":
    main()
