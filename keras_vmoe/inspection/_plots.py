"""Plots of a training run."""

import math
import os
import pathlib
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_vmoe import _files
from keras_vmoe._extras import require


def plot_history(
    history: Mapping[str, Sequence[float]],
    routing: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
) -> pathlib.Path:
    """Plots loss, accuracy and the load of every expert over the epochs.

    Args:
        history: Dict from metric name to a list with one value per epoch, as
            in `keras.callbacks.History.history`.
        routing: List with the `routing_statistics` of each epoch.
        path: PNG file to write, atomically.

    Returns:
        The path, a `pathlib.Path`.

    Raises:
        ImportError: If matplotlib is not installed.

    Example:

    >>> plot_history({"loss": [2.0, 1.0]}, [], "curves.png")  # doctest: +SKIP
    """
    figure = history_figure(history, routing)
    path = pathlib.Path(path)
    with _files.replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
    return path


def history_figure(history, routing):
    """The figure that `plot_history` saves."""
    names = list(routing[-1]) if routing else []
    rows = 1 + math.ceil(len(names) / 2)
    figure = _figure(11, 3.6 * rows)
    axes = figure.subplots(rows, 2, squeeze=False).ravel()
    _curves(axes[0], history, "loss", "Loss")
    _curves(axes[1], history, "accuracy", "Accuracy")
    for axis, name in zip(axes[2:], names, strict=False):
        _load(figure, axis, name, [epoch[name] for epoch in routing])
    for axis in axes[2 + len(names) :]:
        axis.set_visible(False)
    return figure


def load_heatmap(name, epochs):
    """Plots the load of a layer's experts over the epochs.

    Args:
        name: Name of the layer, for the title.
        epochs: List with the layer's `routing_statistics` of each epoch.

    Returns:
        `(height, width, 3)` uint8 array.
    """
    return pixels_of(load_figure(name, epochs))


def pixels_of(figure):
    """A figure as a `(height, width, 3)` uint8 array."""
    canvas = require("matplotlib.backends.backend_agg", "plots")
    canvas = canvas.FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def load_figure(name, epochs):
    """The figure of `load_heatmap`."""
    figure = _figure(6, 4)
    _load(figure, figure.subplots(), name, epochs)
    return figure


def _figure(width, height):
    figure = require("matplotlib.figure", "plots").Figure
    return figure(figsize=(width, height), layout="constrained")


def _curves(axis, history, metric, title):
    lines = {metric: "training", f"val_{metric}": "validation"}
    lines = {name: label for name, label in lines.items() if name in history}
    axis.set_visible(bool(lines))
    for name, label in lines.items():
        epochs = range(1, len(history[name]) + 1)
        # A line has two ends: one epoch is a point.
        marker = "o" if len(epochs) == 1 else None
        axis.plot(epochs, history[name], marker=marker, label=label)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_title(title)
    axis.set_xlabel("epoch")
    axis.grid(alpha=0.3)
    if lines:
        axis.legend()


def _load(figure, axis, name, epochs):
    """One row per expert, one column per epoch, color by share of choices."""
    num_experts = len(epochs[0]["load_share"])
    table = [
        [epoch["load_share"][e] for epoch in epochs] for e in range(num_experts)
    ]
    image = axis.imshow(
        table,
        aspect="auto",
        interpolation="nearest",
        origin="lower",
        vmin=0,  # The same scale for all layers, up to twice an even load.
        vmax=2 / num_experts,
        extent=(0.5, len(epochs) + 0.5, -0.5, num_experts - 0.5),
    )
    axis.set_title(f"{name}: share of the choices per expert")
    axis.set_xlabel("epoch")
    axis.set_ylabel("expert")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_yticks(range(num_experts))
    figure.colorbar(image, ax=axis, label=f"even load: {1 / num_experts:.3f}")
