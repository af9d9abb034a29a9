"""Where MoE layers sit in a ViT-S/16 and a ConvNeXt-T.

python docs/figures/placements.py
"""

import itertools

from style import Canvas
from style import save

from keras_vmoe.models import placement
from keras_vmoe.models.presets import find_preset

NAMES = ("every_2", "last_2", "last_3", "stage")
GAP = 8  # Between two stages.


def main():
    """Draws both models, large and for phones."""
    save(lambda theme: draw(theme, 760, 33), "placements")
    save(lambda theme: draw(theme, 380, 16), "placements_narrow")


def draw(theme, width, cell):
    """Both models below each other, and what the colors mean."""
    tall = min(cell, 24)
    canvas = Canvas(width, 7 * (tall + 8) + 158, theme)
    layers = find_preset("vit_s16").arguments["num_layers"]
    depths = find_preset("convnext_t").arguments["depths"]
    vit = {x: placement.moe_blocks(x, layers) for x in NAMES[:3]}
    convnext = {x: placement.stage_blocks(x, depths) for x in NAMES}
    y = model(canvas, "ViT-S/16", 4, cell, tall, [layers], vit)
    y = model(canvas, "ConvNeXt-T", y + 14, cell, tall, depths, convnext)
    legend(canvas, y + 14)
    return canvas


def model(canvas, title, y, cell, tall, depths, placements):
    """A row of blocks for each placement; returns the y below."""
    canvas.text(6, y + 12, title, 14, align="left", bold=True)
    lefts = positions(depths, cell)
    if len(depths) > 1:
        ends = list(itertools.accumulate(depths))
        for i, (end, depth) in enumerate(zip(ends, depths, strict=True)):
            middle = (lefts[end - depth] + lefts[end - 1] + cell) / 2
            canvas.text(middle, y + 34, f"stage {i + 1}", 11, "muted")
        y += 18
    for block, x in enumerate(lefts):
        if cell > 20 or block % 2:  # Two digits need the room of two.
            canvas.text(x + cell / 2, y + 34, str(block), 11, "muted")
    y += 46
    for name, blocks in placements.items():
        canvas.text(6, y + tall / 2, name, 12, align="left")
        for block, x in enumerate(lefts):
            color = "orange" if block in blocks else "plain"
            canvas.box(x + 1, y, cell - 3, tall, color, radius=2)
            if block in blocks:
                canvas.text(x + cell / 2 - 0.5, y + tall / 2, "E", 11, bold=1)
        y += tall + 8
    return y


def positions(depths, cell):
    """The left end of every block."""
    stages = [i for i, depth in enumerate(depths) for _ in range(depth)]
    return [62 + b * cell + s * GAP for b, s in enumerate(stages)]


def legend(canvas, y):
    """The two kinds of block."""
    canvas.box(6, y - 9, 18, 18, "orange", radius=2)
    canvas.text(15, y, "E", 11, bold=True)
    canvas.text(32, y, "block with experts", 12, align="left")
    canvas.box(182, y - 9, 18, 18, radius=2)
    canvas.text(208, y, "block with one MLP", 12, align="left")


if __name__ == "__main__":
    main()
