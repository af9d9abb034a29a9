"""How data flows through an MoE layer, with the letters of its shapes.

python docs/figures/data_flow.py
"""

import numpy as np
from keras import ops
from style import COLORS
from style import Canvas
from style import save

from keras_vmoe import routing

SIDE = 22  # Of a token.
CHOICES = [0, 1, 0, 2, 1, 0, 0, 2, 1]  # The expert of each token.
WORDS = {
    "images": ("images", "(B, H, W, 3)"),
    "tokens": ("tokens", "(G, S, D)"),
    "buffers": ("buffers", "(G, E, C, D)"),
    "experts": ("experts", "MLP D, F, D"),
    "outputs": ("outputs", "(G, E, C, D)"),
    "served": ("tokens", "(G, S, D)"),
}
LETTERS = [
    "B images, G groups of them, S tokens per group, D features,",
    "E experts with F hidden features, C slots per expert.",
    "Dashed: an empty slot; a token that found its expert full.",
]


def main():
    """Draws the flow from left to right, and downwards for phones."""
    gates = ops.one_hot([CHOICES], 3)
    plan = routing.top_k_plan(gates, 1, capacity=3)
    save(lambda theme: across(theme, plan), "data_flow")
    save(lambda theme: down(theme, plan), "data_flow_narrow")


def across(theme, plan):
    """The picture for wide pages."""
    canvas = Canvas(760, 316, theme)
    columns = dict(zip(WORDS, (56, 162, 322, 430, 538, 698), strict=True))
    for name, x in columns.items():
        picture(canvas, name, x, 66, plan)
        canvas.text(x, 118, WORDS[name][0], 13, bold=True)
        canvas.text(x, 136, WORDS[name][1], 12, "muted")
    for start, end in ((98, 124), (200, 284), (360, 396), (464, 500),
                       (576, 660)):  # fmt: skip
        canvas.arrow((start, 66), (end, 66))
    for x, word in ((242, "dispatch"), (618, "combine")):
        canvas.text(x, 52, word, 13)
        canvas.arrow((430, 190), (430, 166), (x, 166), (x, 72))
    canvas.arrow((162, 148), (162, 192))
    box(canvas, 162, 212, "router")
    canvas.arrow((208, 212), (382, 212))
    canvas.text(295, 226, "gates (G, S, E)", 12, "muted")
    box(canvas, 430, 212, "plan")
    canvas.text(486, 212, "who goes where, by what weight", 12, "muted", "left")
    for i, line in enumerate(LETTERS):
        canvas.text(14, 262 + 19 * i, line, 12, "muted", "left")
    return canvas


def down(theme, plan):
    """The picture for narrow pages."""
    canvas = Canvas(380, 730, theme)
    rows = dict(zip(WORDS, (44, 144, 276, 372, 468, 600), strict=True))
    for name, y in rows.items():
        picture(canvas, name, 60, y, plan)
        canvas.text(116, y - 9, WORDS[name][0], 13, align="left", bold=True)
        canvas.text(116, y + 9, WORDS[name][1], 12, "muted", align="left")
    for start, end in ((84, 106), (182, 238), (314, 334), (410, 430),
                       (506, 562)):  # fmt: skip
        canvas.arrow((60, start), (60, end))
    for y, word in ((210, "dispatch"), (534, "combine")):
        canvas.text(74, y, word, 13, align="left")
        canvas.arrow((276, 372), (276, y), (138, y))
    canvas.arrow((186, 144), (252, 144))
    box(canvas, 300, 144, "router")
    canvas.arrow((316, 164), (316, 350))
    canvas.text(326, 244, "gates", 12, "muted", align="left")
    canvas.text(322, 261, "(G, S, E)", 12, "muted", align="left")
    box(canvas, 300, 372, "plan")
    for i, line in enumerate(LETTERS):
        canvas.text(8, 664 + 20 * i, line, 12, "muted", align="left")
    return canvas


def box(canvas, x, y, word):
    """A box around a word."""
    canvas.box(x - 44, y - 20, 88, 40, radius=5)
    canvas.text(x, y, word, 13, bold=True)


def picture(canvas, name, x, y, plan):
    """A small picture of what flows, around x, y."""
    if name == "images":
        for shift in (7, 0, -7):
            canvas.box(x - 30 + shift, y - 30 - shift, 60, 60)
        for i in (-10, 10):
            canvas.arrow((x - 37, y + 7 + i), (x + 23, y + 7 + i), head=False)
            canvas.arrow((x - 7 + i, y - 23), (x - 7 + i, y + 37), head=False)
        return
    corner = (x - 1.5 * SIDE, y - 1.5 * SIDE)
    if name == "experts":
        for i, color in enumerate(COLORS[:3]):
            top = corner[1] + i * SIDE
            canvas.box(corner[0], top + 1, 3 * SIDE, SIDE - 2, color)
            canvas.text(x, top + SIDE / 2, f"E{i}", 12)
        return
    for i, (color, empty) in enumerate(squares(name, plan)):
        left, top = i % 3 * SIDE + corner[0], i // 3 * SIDE + corner[1]
        canvas.box(left + 1, top + 1, SIDE - 2, SIDE - 2, color, empty)


def squares(name, plan):
    """Color and emptiness of the squares of a picture, row by row."""
    choice, slot = (
        ops.convert_to_numpy(x).ravel() for x in (plan.choice, plan.slot)
    )
    if name in ("buffers", "outputs"):
        full = choice < len(CHOICES)
        experts = np.repeat(np.arange(3), 3)
        return [(COLORS[e], not f) for e, f in zip(experts, full, strict=True)]
    lost = slot == len(choice)
    dashed = lost if name == "served" else np.zeros_like(lost)
    return [(COLORS[e], x) for e, x in zip(CHOICES, dashed, strict=True)]


if __name__ == "__main__":
    main()
