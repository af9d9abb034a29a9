"""A sweep over routing settings of a trained model: accuracy and compute."""

import itertools
import statistics
import time
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

from keras_vmoe import distribution
from keras_vmoe import models
from keras_vmoe._extras import require
from keras_vmoe.evaluation.comparison import amount
from keras_vmoe.evaluation.measurement import measure

ROUNDS = 5  # Of speed measurements, over all positions in turn.


def sweep_routing(
    model: keras.Model,
    dataset: Iterable[Any],
    verbose: int = 0,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Measures a trained model at every combination of routing settings.

    Args:
        model: A `ViTMoE` or `ConvNeXtMoE` with experts.
        dataset: Iterable of batches of `(images, labels)`, readable repeatedly,
            such as `data.load(..., training=False)`.
        verbose: Whether to show a progress bar per position.
        **settings: Settings of `models.set_routing`, as lists of values to
            combine.

    Returns:
        List of dicts, one per position: its settings, `accuracy`, `loss`,
        `macs` (multiply-adds per image), `dropped_share` (mean over the layers)
        and `images_per_s` (median of 5 rounds over all positions in turn, on
        the first batch).

    Raises:
        ValueError: If the model has no experts, or a setting does not fit.

    Example:

    >>> rows = sweep_routing(
    ...     model, test, capacity_factor=[0.25, 0.5, 1.0],
    ...     batch_priority=[False, True])  # doctest: +SKIP

    Reference:
        [Riquelme et al., 2021](https://arxiv.org/abs/2106.05974), section 4
        and figure 7.
    """
    # Invalid settings raise before hours are spent on the first position.
    settings = {
        name: list(x) if isinstance(x, (list, tuple)) else [x]
        for name, x in settings.items()
    }
    positions = [
        dict(zip(settings, values, strict=True))
        for values in itertools.product(*settings.values())
    ]
    dials = [models.set_routing(model, **position) for position in positions]
    rows = []
    for position, dial in zip(positions, dials, strict=True):
        if verbose:
            print(words_of(position), flush=True)
        found = measure(dial, dataset, verbose)
        dropped = [x["dropped_share"] for x in found.routing.values()]
        rows.append(
            {
                **position,
                "accuracy": found.accuracy,
                "loss": found.loss,
                "macs": models.cost(dial).macs,
                "dropped_share": float(np.mean(dropped)),
            }
        )
    images, _ = next(iter(dataset))
    for row, speed in zip(rows, _speeds(dials, images), strict=True):
        row["images_per_s"] = speed
    return rows


def _speeds(dials, images):
    """Images per second of models on one batch, measured in turn."""
    seconds = [[] for _ in dials]
    for dial in dials:
        distribution.predict(dial, images)  # Compiles.
    for _ in range(ROUNDS):
        for times, dial in zip(seconds, dials, strict=True):
            start = time.perf_counter()
            distribution.predict(dial, images)
            times.append(time.perf_counter() - start)
    return [len(images) / statistics.median(times) for times in seconds]


def words_of(position):
    """`"capacity_factor=0.5, batch_priority=True"`."""
    return ", ".join(f"{name}={value}" for name, value in position.items())


def sweep_table(rows):
    """The rows of `sweep_routing` as text."""
    names = [name for name in rows[0] if name not in _FORMATS]
    widths = [max(len(x), 8) for x in names]
    heads = [f"{x:>{n}}" for x, n in zip(names, widths, strict=True)]
    heads += [f"{title:>9}" for title, _ in _FORMATS.values()]
    lines = ["  ".join(heads)]
    for row in rows:
        cells = [f"{row[x]!s:>{n}}" for x, n in zip(names, widths, strict=True)]
        cells += [
            f"{form(row[name]):>9}" for name, (_, form) in _FORMATS.items()
        ]
        lines.append("  ".join(cells))
    return "\n".join(lines)


_FORMATS = {
    "accuracy": ("accuracy", "{:.4f}".format),
    "loss": ("loss", "{:.4f}".format),
    "macs": ("MACs", amount),
    "dropped_share": ("dropped", "{:.1%}".format),
    "images_per_s": ("images/s", "{:,.0f}".format),
}


def sweep_figure(rows):
    """Accuracy against multiply-adds, a line for each way of routing."""
    figure = require("matplotlib.figure", "plots").Figure(
        figsize=(7, 4.5), layout="constrained"
    )
    axis = figure.subplots()
    lines = {}
    for row in rows:
        # The capacity varies along a line, if it is among the settings.
        named = {
            k: x
            for k, x in row.items()
            if k not in _FORMATS and k != "capacity_factor"
        }
        lines.setdefault(words_of(named), []).append(
            (row["macs"], row["accuracy"], row.get("capacity_factor"))
        )
    for words, points in lines.items():
        points = sorted(points, key=lambda x: x[0])
        x, y, factors = zip(*points, strict=True)
        axis.plot(x, y, marker="o", label=words)
        for place in zip(x, y, factors, strict=True):
            if place[2] is not None:
                axis.annotate(
                    place[2], place[:2], xytext=(4, -9),
                    textcoords="offset points", fontsize=7,
                )  # fmt: skip
    axis.set_title("numbers are capacity factors", fontsize=10)
    axis.set_xlabel("multiply-adds per image")
    axis.set_ylabel("accuracy")
    axis.grid(alpha=0.3)
    if any(lines):
        axis.legend()
    return figure
