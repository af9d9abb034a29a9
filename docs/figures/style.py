"""What the site's figures share: palette, two themes, a canvas, `save`.

Lengths are CSS pixels: a canvas 760 wide is meant to be shown 760 px wide.
The colors of experts are after Okabe and Ito, safe for color-blind readers;
every colored thing has a name or a place as well.
"""

import io
import pathlib
import re

import matplotlib
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from matplotlib.patches import FancyBboxPatch
from matplotlib.path import Path

FOLDER = pathlib.Path(__file__).parent
SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "keras_vmoe"}
FONT = "-apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', Arial, sans-serif"

# Fills and edges: "plain" is neutral, the others are experts or devices.
THEMES = {
    "light": {
        "ink": "#1e2129",
        "muted": "#545b69",
        "plain": ("#eef0f3", "#7b8494"),
        "blue": ("#cde2f4", "#0072b2"),
        "orange": ("#fbdfb5", "#b35c00"),
        "green": ("#c5ead9", "#007a58"),
        "purple": ("#f2d5e6", "#a3477f"),
    },
    "dark": {
        "ink": "#e9ebf0",
        "muted": "#abb2c0",
        "plain": ("#2f3440", "#8b94a5"),
        "blue": ("#17456b", "#62b4ee"),
        "orange": ("#66430c", "#f0a93c"),
        "green": ("#0f5340", "#45c89e"),
        "purple": ("#623350", "#e39cc6"),
    },
}
COLORS = ("blue", "orange", "green", "purple")


class Canvas:
    """A transparent picture of so many pixels, y downwards, in one theme."""

    def __init__(self, width, height, theme):
        self.theme = THEMES[theme]
        self.figure = Figure(figsize=(width / 72, height / 72))
        self.axis = self.figure.add_axes((0, 0, 1, 1))
        self.axis.set(xlim=(0, width), ylim=(height, 0))
        self.axis.set_axis_off()

    def text(self, x, y, words, size=13, color="ink", align="center", bold=0):
        """One line of text around the height y."""
        color = self.theme.get(color, color)
        self.axis.text(
            x, y + 0.36 * size, words, size=size, ha=align, va="baseline",
            color=color, weight="bold" if bold else "normal",
            parse_math=False,
        )  # fmt: skip

    def box(self, x, y, width, height, color="plain", empty=False, radius=3):
        """A box whose upper left corner is at x, y; dashed if it is empty."""
        fill, edge = self.theme[color]
        shape = f"round,pad=0,rounding_size={radius}"
        style = {"linewidth": 1.2, "edgecolor": edge, "boxstyle": shape}
        style |= {"linestyle": (0, (2.5, 2))} if empty else {}
        style["facecolor"] = "none" if empty else fill
        self.axis.add_patch(FancyBboxPatch((x, y), width, height, **style))

    def arrow(self, *points, color="muted", head=True):
        """An arrow along the points; without a head, a line."""
        style = "-|>,head_length=6,head_width=3" if head else "-"
        self._path(Path(points), color, style, 1.4)

    def curve(self, start, end, color):
        """A line that leaves and arrives vertically."""
        (x, y), (to_x, to_y) = start, end
        middle = (y + to_y) / 2
        points = [start, (x, middle), (to_x, middle), end]
        codes = [Path.MOVETO, *[Path.CURVE4] * 3]
        self._path(Path(points, codes), color, "-", 1.3)

    def _path(self, path, color, arrow, width):
        color = self.theme[color]
        color = color if isinstance(color, str) else color[1]
        self.axis.add_patch(
            FancyArrowPatch(
                path=path, color=color, arrowstyle=arrow, linewidth=width,
                mutation_scale=1, joinstyle="miter", capstyle="butt",
            )
        )  # fmt: skip


def of_plots(theme):
    """What Matplotlib's axes, lines and legends look like in a theme."""
    inks = ("text.color", "axes.labelcolor", "axes.titlecolor")
    muted = ("axes.edgecolor", "xtick.color", "ytick.color")
    return {
        **dict.fromkeys(inks, theme["ink"]),
        **dict.fromkeys(muted, theme["muted"]),
        "axes.prop_cycle": cycler(color=[theme[x][1] for x in COLORS]),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 12,
        "font.size": 11,
        "legend.fontsize": 10,
        "legend.frameon": False,
    }


def save(draw, name):
    """Writes NAME_light.svg and NAME_dark.svg beside this file.

    Args:
        draw: Function from the name of a theme to a `Canvas` or a `Figure`.
        name: The figure's name.
    """
    for theme in THEMES:
        file = io.StringIO()
        with matplotlib.rc_context(SETTINGS | of_plots(THEMES[theme])):
            draw(theme).figure.savefig(
                file, format="svg", transparent=True,
                metadata={"Date": None, "Creator": None},
            )  # fmt: skip
        text = re.sub(r"font-family: [^;\"]*", f"font-family: {FONT}",
                      file.getvalue())  # fmt: skip
        # Points are pixels here, also for a page that sets no width.
        text = re.sub(r'(width|height)="([\d.]+)pt"', r'\1="\2"', text)
        text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
        path = FOLDER / f"{name}_{theme}.svg"
        path.write_text(text, encoding="utf-8")
