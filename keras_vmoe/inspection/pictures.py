"""Pictures of an `Inspection`, as matplotlib figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import Any

import numpy as np

from keras_vmoe._extras import require
from keras_vmoe.inspection._drawing import bare
from keras_vmoe.inspection._drawing import blended
from keras_vmoe.inspection._drawing import short
from keras_vmoe.inspection._drawing import show
from keras_vmoe.inspection._drawing import veiled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from keras_vmoe.inspection.gathering import LayerInspection
    from keras_vmoe.inspection.inspecting import Inspection

__all__ = [
    "best_patches",
    "between_layers",
    "class_heatmap",
    "colors",
    "distributions",
    "drop_maps",
    "expert_maps",
    "load_bars",
    "similarity_matrix",
    "spatial_maps",
    "taken_maps",
]

MOST_CLASSES = 40  # Rows of a heat map that can be read.
MOST_EXPERTS = 16  # Columns of heat maps.
NONE = (0.0, 0.0, 0.0)  # A patch without an expert.
# No gray, black or brown: blending with a picture turns others into these.
PALETTE = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#7ac943", "#f0e442",
    "#7a3fb0",
)  # fmt: skip


def _figure(width, height):
    figure = require("matplotlib.figure", "plots").Figure
    return figure(figsize=(width, height), layout="constrained")


def colors(num_experts: int) -> np.ndarray:
    """Returns `(E, 3)` colors that differ from one expert to the next."""
    tools = require("matplotlib.colors", "plots")
    numbers = np.arange(num_experts)
    if num_experts <= len(PALETTE):
        return np.array([tools.to_rgb(PALETTE[i]) for i in numbers])
    hue = numbers * 0.618 % 1  # Neighbors are far apart.
    value = np.where(numbers % 2, 0.75, 0.95)
    saturation = np.where(numbers // 2 % 2, 0.55, 0.9)
    return tools.hsv_to_rgb(np.stack([hue, saturation, value], axis=-1))


def expert_maps(found: Inspection) -> Figure:
    """Draws example images under the first expert of each patch, by layer.

    Args:
        found: An `Inspection`.
    """
    layers = list(found.layers.values())
    count = len(found.images)
    num_experts = max(layer.num_experts for layer in layers)
    palette = np.concatenate([colors(num_experts), [NONE]])
    height = 1.7 * count + 0.4
    figure = _figure(1.6 * (1 + len(layers)) + 1.2, height)
    axes = figure.subplots(count, 1 + len(layers), squeeze=False)
    for row, image in enumerate(found.images):
        show(axes[row, 0], image)
        axes[row, 0].set_ylabel(_name_of(found, row), fontsize=8)
        for axis, layer in zip(axes[row, 1:], layers, strict=True):
            show(axis, blended(image, palette[layer.examples[row]]))
    axes[0, 0].set_title("image", fontsize=9)
    for axis, layer in zip(axes[0, 1:], layers, strict=True):
        axis.set_title(layer.name, fontsize=9)
    names: dict[Any, Any] = dict(enumerate(palette[:-1]))
    if any((layer.examples < 0).any() for layer in layers):
        names["none"] = NONE
    _legend(figure, names, height)
    return figure


def drop_maps(found: Inspection, name: str) -> Figure:
    """Draws which patches of the example images are served at each capacity.

    Args:
        found: An `Inspection`.
        name: Name of a layer in which tokens choose.
    """
    layer = found.layers[name]
    count = len(found.images)
    figure = _figure(1.5 * (2 + len(layer.served)), 1.6 * count + 0.6)
    axes = figure.subplots(count, 2 + len(layer.served), squeeze=False)
    for row, image in enumerate(found.images):
        show(axes[row, 0], image)
        axes[row, 1].imshow(layer.priority[row], cmap="viridis", vmin=0, vmax=1)
        bare(axes[row, 1])
        for axis, served in zip(
            axes[row, 2:], layer.served.values(), strict=True
        ):
            show(axis, veiled(image, served[row]))
        axes[row, 0].set_ylabel(_name_of(found, row), fontsize=8)
    axes[0, 0].set_title("image", fontsize=9)
    axes[0, 1].set_title("priority", fontsize=9)
    for axis, ((capacity, priority), served) in zip(
        axes[0, 2:], layer.served.items(), strict=True
    ):
        kind = "BPR" if priority else "vanilla"
        words = f"{kind}\ncapacity {capacity:g}\n{served.mean():.0%} served"
        axis.set_title(words, fontsize=8)
    return figure


def taken_maps(found: Inspection, name: str) -> Figure:
    """Draws heat maps of what each expert takes from the example images.

    Args:
        found: An `Inspection`.
        name: Name of a layer in which experts or slots choose.

    Raises:
        ValueError: If tokens choose in this layer.
    """
    layer = found.layers[name]
    if layer.taken is None:
        raise ValueError(
            "`name` must be a layer of expert choice or soft routing: "
            "`expert_maps` shows what tokens choose. "
            f"Received: name={name!r}."
        )
    count, shown = len(found.images), min(layer.num_experts, MOST_EXPERTS)
    figure = _figure(1.1 * (1 + shown) + 0.3, 1.2 * count + 0.5)
    axes = figure.subplots(count, 1 + shown, squeeze=False)
    for row, image in enumerate(found.images):
        show(axes[row, 0], image)
        most = max(float(layer.taken[row].max()), 1e-9)
        for axis, taken in zip(axes[row, 1:], layer.taken[row], strict=False):
            axis.imshow(taken, cmap="magma", vmin=0, vmax=most)
            bare(axis)
    axes[0, 0].set_title("image", fontsize=8)
    for e, axis in enumerate(axes[0, 1:]):
        axis.set_title(f"expert {e}", fontsize=8)
    return figure


def best_patches(
    layer: LayerInspection, class_names: Sequence[str] | None = None
) -> Figure:
    """Draws the patches with the largest gates, one row per expert.

    Args:
        layer: A `LayerInspection`.
        class_names: One name per class; labels each patch with its image's.
    """
    experts, count = layer.best_images.shape
    figure = _figure(0.8 * count + 0.6, 0.9 * experts + 0.4)
    axes = figure.subplots(experts, count, squeeze=False)
    for e in range(experts):
        for i, axis in enumerate(axes[e]):
            bare(axis)
            if layer.best_images[e, i] < 0:
                axis.set_visible(i == 0)  # It has the row's label.
                axis.imshow(np.ones((1, 1, 3)))
                continue
            show(axis, layer.best_patches[e, i])
            if class_names is not None and layer.best_labels is not None:
                name = short(class_names[layer.best_labels[e, i]], 14)
                axis.set_title(name, fontsize=6, pad=2)
        axes[e, 0].set_ylabel(f"expert {e}", fontsize=8)
    return figure


def class_heatmap(layer: LayerInspection, class_names: Sequence[str]) -> Figure:
    """Draws the share of each class's patches by expert, unsorted and sorted.

    Neighboring classes are grouped if there are too many to read.

    Args:
        layer: A `LayerInspection`.
        class_names: One name per class.

    Raises:
        ValueError: If the images were inspected without labels.
    """
    if layer.class_counts is None:
        raise ValueError(
            "`layer` must be of images with labels: give `inspect` batches "
            f"of (images, labels). Received: layer {layer.name!r} without."
        )
    counts, names = _grouped_classes(layer.class_counts, class_names)
    totals = counts.sum(axis=1, keepdims=True)
    # Classes without patches are blank.
    share = np.where(totals > 0, counts / np.maximum(totals, 1), np.nan)
    height = max(3.0, 0.17 * len(names) + 1.2)
    figure = _figure(11, height)
    panels = figure.subplots(1, 2)
    known = np.nan_to_num(share, nan=-1)
    order = np.lexsort(
        (-known.max(axis=1), known.argmax(axis=1), totals[:, 0] == 0)
    )
    together = -(-len(class_names) // len(names))
    more = f", {together} in a row" if together > 1 else ""
    for axis, rows, title in (
        (panels[0], np.arange(len(names)), f"in the order of the labels{more}"),
        (panels[1], order, "by their largest expert"),
    ):
        image = axis.imshow(share[rows], aspect="auto", cmap="viridis", vmin=0)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("expert")
        axis.set_yticks(range(len(names)), [names[i] for i in rows], fontsize=7)
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=panels, label="share of the class's patches")
    return figure


def _grouped_classes(
    counts: np.ndarray, names: Sequence[str]
) -> tuple[np.ndarray, list[str]]:
    """Groups neighboring classes if a picture has no room for all.

    Returns:
        `(rows, E)` sums, and the names of the rows.
    """
    size = -(-len(names) // MOST_CLASSES)
    if size == 1:
        return counts, [short(name, 32) for name in names]
    names = [short(name, 16) for name in names]
    starts = range(0, len(names), size)
    rows = np.stack([counts[i : i + size].sum(axis=0) for i in starts])
    ends = [min(i + size, len(names)) - 1 for i in starts]
    return rows, [
        f"{names[a]} … {names[b]}" for a, b in zip(starts, ends, strict=True)
    ]


def similarity_matrix(layer: LayerInspection) -> Figure:
    """Draws how similar the images of two experts are.

    Args:
        layer: A `LayerInspection`.
    """
    names = ("expert", "expert")
    return _matrix(layer.similarity, names, "similarity", cmap="magma", vmax=1)


def distributions(layer: LayerInspection) -> Figure:
    """Draws experts per image, and the CDF of an expert's patches per image.

    Args:
        layer: A `LayerInspection`.
    """
    figure = _figure(11, 4)
    left, right = figure.subplots(1, 2)
    numbers = np.arange(layer.num_experts + 1)
    for found, label, shift in (
        (layer.experts_per_image, "first choice", -0.2),
        (layer.experts_per_image_of_all_choices, "all choices", 0.2),
    ):
        left.bar(numbers + shift, found / found.sum(), 0.4, label=label)
    left.set_xlabel("experts per image")
    left.set_ylabel("share of the images")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend()
    palette = colors(layer.num_experts)
    for e, cdf in enumerate(layer.patches_cdf):
        right.plot(cdf, color=palette[e], label=str(e), linewidth=1.2)
    right.set_xlabel("at most this many patches per image")
    right.set_ylabel("share of images with the expert's patches")
    if layer.num_experts <= 16:
        right.legend(title="expert", fontsize=7, ncols=2)
    return figure


def spatial_maps(layer: LayerInspection) -> Figure:
    """Draws where each expert's patches are in the image.

    Args:
        layer: A `LayerInspection`.
    """
    experts = layer.num_experts
    columns = min(8, experts)
    rows = -(-experts // columns)
    figure = _figure(1.5 * columns + 0.8, 1.6 * rows + 0.3)
    axes = figure.subplots(rows, columns, squeeze=False)
    top = max(float(layer.spatial_share.max()), 1e-9)
    for e, axis in enumerate(axes.ravel()):
        bare(axis)
        if e >= experts:
            axis.set_visible(False)
            continue
        image = axis.imshow(
            layer.spatial_share[e], cmap="viridis", vmin=0, vmax=top
        )
        axis.set_title(f"expert {e}", fontsize=8)
    figure.colorbar(image, ax=axes, label="share of the images")
    return figure


def load_bars(layer: LayerInspection) -> Figure:
    """Draws the load of each expert, by first and by all choices.

    Args:
        layer: A `LayerInspection`.
    """
    figure = _figure(7, 3)
    axis = figure.subplots()
    numbers = np.arange(layer.num_experts)
    axis.bar(numbers - 0.2, layer.load, 0.4, label="first choice")
    axis.bar(numbers + 0.2, layer.load_of_all_choices, 0.4, label="all choices")
    axis.axhline(1 / layer.num_experts, color="gray", linewidth=0.8)
    axis.set_xlabel("expert")
    axis.set_ylabel("share of the patches")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend()
    return figure


def between_layers(table: np.ndarray, names: Sequence[str]) -> Figure:
    """Draws how first choices in one layer continue in the next.

    Args:
        table: `(E, E)` patches by their experts in the two layers.
        names: Names of the two layers.
    """
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    names = [f"expert of {name}" for name in names]
    return _matrix(share, names, "share of the row's patches")


def _matrix(values, names, label, cmap="viridis", vmax=None):
    """Draws a table of experts by experts, with names of rows and columns."""
    figure = _figure(5, 4.2)
    axis = figure.subplots()
    image = axis.imshow(values, cmap=cmap, vmin=0, vmax=vmax)
    axis.set_ylabel(names[0])
    axis.set_xlabel(names[1])
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axis, label=label)
    return figure


def _name_of(found, row):
    """Returns the name of an example image, or else of its class."""
    if found.image_names is not None:
        return short(found.image_names[row], 20)
    if found.labels is None:
        return ""
    return short(found.class_names[found.labels[row]], 20)


def _legend(figure, names, height):
    """Adds the colors of the experts, in columns that fit the height."""
    patch = require("matplotlib.patches", "plots").Patch
    handles = [patch(color=color, label=str(e)) for e, color in names.items()]
    rows = max(4, int(4.5 * height) - 2)
    columns = -(-len(handles) // rows)
    width = figure.get_figwidth() + 0.6 * (columns - 1)
    figure.set_figwidth(width)
    figure.legend(
        handles=handles,
        title="expert",
        loc="outside right upper",
        fontsize=8,
        ncols=columns,
    )
