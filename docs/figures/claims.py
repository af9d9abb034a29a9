"""The picture of docs/claims.md, of benchmarks/results/claims.csv.

python docs/figures/claims.py
"""

import csv
import pathlib

import numpy as np
from matplotlib.figure import Figure
from style import COLORS
from style import THEMES
from style import save

RESULTS = (
    pathlib.Path(__file__).parents[2] / "benchmarks" / "results" / "claims.csv"
)


def main():
    """Draws the three, side by side and, for phones, below each other."""
    with open(RESULTS, newline="") as file:
        rows = list(csv.DictReader(file))
    save(lambda theme: draw(rows, theme, 760, 270, (1, 3)), "claims")
    save(lambda theme: draw(rows, theme, 380, 760, (3, 1)), "claims_narrow")


def draw(rows, theme, width, height, shape):
    """Curves, the dial, and the benefit by width."""
    size = (width / 72, height / 72)
    figure = Figure(figsize=size, layout="constrained")
    curves, dial, widths = figure.subplots(*shape)
    trained = [x for x in rows if x["table"] == "trained"]
    for model in ("dense", "MoE", "MoE, BPR"):
        mine = of(trained, model=model, width="32")
        values = np.array([x["train_accuracy"].split() for x in mine], float)
        band(curves, range(1, 1 + values.shape[1]), values, model)
    curves.set(xlabel="epoch", ylabel="training accuracy", title="32 features")
    curves.legend()
    for routing in ("vanilla", "BPR"):
        mine = of(rows, table="dial", model="MoE", routing=routing, width="32")
        macs = sorted({float(x["macs"]) for x in mine})
        values = [
            [float(x["accuracy"]) for x in mine if float(x["macs"]) == y]
            for y in macs
        ]
        band(dial, np.array(macs) / 1e6, np.array(values).T, routing)
    for width in ("32", "48"):
        mine = of(trained, model="dense", width=width)
        if mine:
            found = [float(x["accuracy"]) for x in mine]
            at = float(mine[0]["macs"]) / 1e6
            dial.errorbar(
                at, np.mean(found), np.std(found, ddof=1), fmt="o",
                label=f"dense, {width} features",
            )  # fmt: skip
    dial.set(xlabel="multiply-adds, millions", ylabel="test accuracy",
             title="less capacity, same weights")  # fmt: skip
    dial.legend()
    benefits(widths, trained, THEMES[theme])
    return figure


def benefits(axis, trained, theme):
    """Accuracy with experts minus that without, seed by seed."""
    sizes = sorted({int(x["width"]) for x in trained})
    for width in sizes:
        both = [
            {x["seed"]: float(x["accuracy"]) for x in of(
                trained, model=model, width=str(width))}
            for model in ("dense", "MoE")
        ]  # fmt: skip
        found = [100 * (both[1][s] - both[0][s]) for s in both[1]
                 if s in both[0]]  # fmt: skip
        axis.plot([width] * len(found), found, "o", color=theme[COLORS[0]][1],
                  alpha=0.5)  # fmt: skip
        if found:
            axis.plot(width, np.mean(found), "_", color=theme["ink"],
                      markersize=18)  # fmt: skip
    axis.axhline(0, color=theme["muted"], linewidth=0.8)
    axis.set(xlabel="features", ylabel="points of accuracy",
             title="8 experts minus dense, by seed")  # fmt: skip


def of(rows, **wanted):
    """The rows of these values."""
    return [x for x in rows if all(x[k] == y for k, y in wanted.items())]


def band(axis, x, values, label):
    """The mean of the seeds, and a standard deviation around it."""
    mean, std = values.mean(axis=0), values.std(axis=0, ddof=1)
    axis.plot(x, mean, marker="o", markersize=3, label=label)
    axis.fill_between(x, mean - std, mean + std, alpha=0.2)


if __name__ == "__main__":
    main()
