"""The pictures of docs/results.md and docs/speed.md, of benchmarks/results.

python docs/figures/results.py
"""

import csv
import pathlib

import numpy as np
from matplotlib.figure import Figure
from style import COLORS
from style import THEMES
from style import save

RESULTS = pathlib.Path(__file__).parents[2] / "benchmarks" / "results"
BACKENDS = {"jax": "JAX", "tensorflow": "TensorFlow", "torch": "PyTorch"}
METHODS = {
    "top-k": "top-k",
    "top-k, BPR": "top-k, BPR",
    "expert choice": "expert choice",
    "soft": "soft",
    "dropless": "dropless",
    "einsum": "einsum",
    "keras_hub": "KerasHub",
    "mixture-of-experts": "mixture-of-experts",
    "model garden": "Model Garden",
}
FAMILIES = {"vit": "ViT", "convnext": "ConvNeXt"}
VARIANTS = {
    "dense": "dense",
    "dense, wider": "dense, wider",
    "8 experts, K=1": "8 experts, K=1",
    "8 experts, K=1, C=1.5": "8 experts, K=1, capacity factor 1.5",
    "8 experts, K=2": "8 experts, K=2",
}


def main():
    """Draws accuracy and speed, side by side and, for phones, below."""
    both("cifar10", accuracy)
    both("moe_layer", speed)


def both(name, draw):
    """Draws one result file in both widths."""
    rows = read(f"{name}.csv")
    save(lambda theme: draw(rows, theme, 760, (1, 2)), name)
    save(lambda theme: draw(rows, theme, 380, (2, 1)), f"{name}_narrow")


def read(name):
    """The rows of a result file."""
    with open(RESULTS / name, newline="") as file:
        return list(csv.DictReader(file))


def accuracy(rows, theme, width, shape):
    """Training accuracy by epoch and test accuracy: mean and spread."""
    figure = canvas(width, 330 * shape[0])
    theme = THEMES[theme]
    inks = [theme["plain"][1], *(theme[x][1] for x in COLORS)]
    panels = figure.subplots(*shape)
    for panel, (family, title) in zip(panels, FAMILIES.items(), strict=True):
        for i, (variant, label) in enumerate(VARIANTS.items()):
            mine = [x for x in rows if (x["family"], x["model"]) == (
                family, variant)]  # fmt: skip
            if mine:
                curve(panel, mine, i, label, inks[i])
        panel.set(title=title, xlabel="epoch", ylabel="accuracy")
        panel.set_xticks([1, 2, 3, 4, 5, 6, 6.6], [*"123456", "test"])
        panel.legend(loc="lower right")
    return figure


def curve(panel, rows, number, label, color):
    """One model's seeds: the training, and beside it the test."""
    curves = np.array([x["train_accuracy"].split() for x in rows], float)
    mean, std = curves.mean(axis=0), curves.std(axis=0, ddof=1)
    epochs = np.arange(1, len(mean) + 1)
    panel.plot(epochs, mean, label=label, color=color, linewidth=1.3)
    panel.fill_between(
        epochs, mean - std, mean + std, alpha=0.15, linewidth=0, color=color
    )
    test = [float(x["test_accuracy"]) for x in rows]
    panel.errorbar(
        6.3 + 0.15 * number, np.mean(test), np.std(test, ddof=1),
        fmt="o", markersize=4, capsize=2, color=color,
    )  # fmt: skip


def speed(rows, theme, width, shape):
    """Time of every method relative to the dense MLP: median and quartiles."""
    figure = canvas(width, 380 * shape[0])
    rows = [
        x for x in rows
        if (x["table"], x["shape"], x["dtype"])
        == ("methods", "ViT-S/16 x8", "float32")
    ]  # fmt: skip
    panels = figure.subplots(*shape, sharey=shape[0] == 1)
    for panel, kind in zip(panels, ("forward", "training"), strict=True):
        for i, (backend, label) in enumerate(BACKENDS.items()):
            found = {
                x["candidate"]: [
                    float(x[y]) for y in ("ratio", "ratio_q25", "ratio_q75")
                ]
                for x in rows
                if (x["backend"], x["pass"]) == (backend, kind)
            }
            here = [n for n, x in enumerate(METHODS) if x in found]
            values = np.array([found[x] for x in METHODS if x in found]).T
            low, high = values[0] - values[1], values[2] - values[0]
            panel.bar(
                [n + 0.27 * (i - 1) for n in here], values[0], 0.25,
                yerr=[low, high], label=label,
                error_kw={"ecolor": THEMES[theme]["muted"], "lw": 0.8},
            )  # fmt: skip
        panel.axhline(1.0, color=THEMES[theme]["ink"], linewidth=0.8)
        panel.set_xticks(range(len(METHODS)), METHODS.values(), rotation=40,
                         ha="right")  # fmt: skip
        panel.set(title=kind, yscale="log", ylabel="time, dense MLP = 1")
        panel.set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"])
        panel.minorticks_off()
        panel.legend(loc="upper left")
    return figure


def canvas(width, height):
    """A figure of so many pixels."""
    return Figure(figsize=(width / 72, height / 72), layout="constrained")


if __name__ == "__main__":
    main()
