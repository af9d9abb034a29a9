"""Expert parallelism on four devices: what lies where, the two exchanges.

python docs/figures/all_to_alls.py
"""

from style import COLORS
from style import Canvas
from style import save

DEVICES = range(4)
# Height, words and shape of each row. One device has one group, one expert.
ROWS = (
    (58, "tokens of its images", "(G, S, D), sharded by G"),
    (130, "buffers, by dispatch", "(G, E, C, D), sharded by G"),
    (262, "buffers at the experts", "(G, E, C, D), sharded by E"),
    (326, "experts' weights", "(E, ...), sharded by E"),
    (458, "outputs, back home", "(G, E, C, D), sharded by G"),
    (530, "tokens, by combine", "(G, S, D), sharded by G"),
)
# On phones they stand between the rows.
NARROW = (
    (42, "tokens (G, S, D), sharded by G"),
    (106, "dispatch: buffers (G, E, C, D), sharded by G"),
    (306, "first all-to-all: buffers sharded by E"),
    (506, "second all-to-all: outputs sharded by G"),
    (568, "combine: tokens (G, S, D), sharded by G"),
)


def main():
    """Draws the exchanges, large and for phones."""
    save(lambda theme: draw(theme, 760, 218, 136), "all_to_alls")
    save(lambda theme: draw(theme, 380, 4, 94), "all_to_alls_narrow")


def draw(theme, width, left, pitch):
    """Devices are columns, time goes downwards."""
    narrow = left < 100
    canvas = Canvas(width, 624 if narrow else 600, theme)
    side = (pitch - 14) / 4
    for device in DEVICES:
        x = left + device * pitch
        middle = x + pitch / 2 - 2
        if not narrow:
            canvas.box(x, 4, pitch - 6, 564, empty=True, radius=6)
        canvas.text(middle - 1, 20, f"device {device}", 12, bold=True)
        for y in (ROWS[0][0], ROWS[5][0]):
            canvas.box(x + 4, y, pitch - 14, 24, COLORS[device])
            canvas.text(middle - 1, y + 12, f"group {device}", 12)
        canvas.box(x + 4, ROWS[3][0], pitch - 14, 24)
        canvas.text(middle - 1, ROWS[3][0] + 12, f"expert {device}", 12)
        for row in (1, 2, 4):
            strip(canvas, x + 4, ROWS[row][0], side, device, row == 2)
        for start, end in () if narrow else ((0, 1), (2, 3), (4, 5)):
            ends = (ROWS[start][0] + 25, ROWS[end][0] - 2)
            canvas.arrow(*[(middle - 1, y) for y in ends])
    for start, end in ((1, 2), (2, 4)):
        exchange(canvas, left + 4, pitch, side, start, end)
    labels(canvas, narrow)
    words = ["Color: the group. E0 to E3: the experts.",
             "The backward pass makes two more."]  # fmt: skip
    for i, line in enumerate(words):
        at = (8, 592 + 19 * i) if narrow else (218 + 270 * i, 584)
        canvas.text(*at, line, 12, "muted", align="left")
    return canvas


def strip(canvas, x, y, side, device, exchanged):
    """The four buffers on a device: of one group, or for one expert."""
    for part in DEVICES:
        group, expert = (part, device) if exchanged else (device, part)
        left = x + part * side
        canvas.box(left, y, side - 1, 24, COLORS[group], radius=2)
        canvas.text(left + side / 2 - 0.5, y + 12, f"E{expert}", 11)


def exchange(canvas, left, pitch, side, start, end):
    """All parts of all devices change places."""
    top = ROWS[3][0] + 26 if start == 2 else ROWS[start][0] + 26
    bottom = ROWS[end][0] - 3
    for device in DEVICES:
        for part in DEVICES:
            a = left + device * pitch + (part + 0.5) * side
            b = left + part * pitch + (device + 0.5) * side
            color = COLORS[device if start == 1 else part]
            canvas.curve((a, top), (b, bottom), color)


def labels(canvas, narrow):
    """What each row is, at the left or, on phones, between the rows."""
    if narrow:
        for y, words in NARROW:
            canvas.text(8, y, words, 12, "muted", align="left")
        return
    for y, words, shape in ROWS:
        canvas.text(6, y + 3, words, 13, align="left")
        canvas.text(6, y + 21, shape, 12, "muted", align="left")
    for y, words in ((208, "first all-to-all"), (404, "second all-to-all")):
        canvas.text(6, y, words, 13, align="left", bold=True)


if __name__ == "__main__":
    main()
