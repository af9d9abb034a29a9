"""`inspect`: expert statistics of a model on a data set, in one pass."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_vmoe._checks import check_sizes
from keras_vmoe._checks import is_number
from keras_vmoe._preprocessing import Preprocessing
from keras_vmoe._preprocessing import check_preprocessing
from keras_vmoe.distribution.prediction import predictions
from keras_vmoe.inspection.decisions import decide
from keras_vmoe.inspection.decisions import has_priority
from keras_vmoe.inspection.decisions import served_at
from keras_vmoe.inspection.gathering import LayerInspection
from keras_vmoe.inspection.gathering import LayerSums
from keras_vmoe.layers.patches import PatchEmbedding
from keras_vmoe.layers.patches import patch_grid
from keras_vmoe.models.placement import moe_layers

CAPACITIES = (0.25, 0.5, 1.0)


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Expert statistics of a model on a data set.

    Attributes:
        layers: Dict from the name of each MoE layer to a `LayerInspection`.
        between: Dict from pairs of successive layers with the same patches to
            `(E, E)` int arrays: patches by their first expert in the first
            (rows) and the second layer.
        images: `(images, H, W, channels)` uint8, the example images.
        labels: `(images,)` their classes, or None.
        class_names: Names of the classes, or None without labels.
        image_names: Names of the example images, if given.
    """

    layers: dict[str, LayerInspection]
    between: dict[tuple[str, str], np.ndarray]
    images: np.ndarray
    labels: np.ndarray | None
    class_names: tuple[str, ...] | None
    image_names: tuple[str, ...] | None = None

    def sentences(self) -> dict[str, list[str]]:
        """Summarizes the numbers, in a list of sentences for each layer."""
        from keras_vmoe.inspection.report import sentences

        return {name: sentences(self, name) for name in self.layers}

    def save(
        self,
        folder: str | os.PathLike[str],
        history: str | os.PathLike[str] | None = None,
        title: str | None = None,
        ablations: Sequence[Mapping[str, Any]] | None = None,
    ) -> pathlib.Path:
        """Writes a report: a self-contained `index.html`, CSV and NPZ files.

        Args:
            folder: New folder, or one with an earlier report.
            history: Optional `history.csv` of the training, for a plot of the
                load over the epochs.
            title: Optional line for the page on what was inspected.
            ablations: Optional rows of `evaluation.ablate`, for a table.

        Returns:
            `pathlib.Path` of the page.

        Raises:
            FileExistsError: If the folder contains anything else.
            ImportError: If matplotlib or Jinja2 is missing.
        """
        from keras_vmoe.inspection.report import write

        return write(self, pathlib.Path(folder), history, title, ablations)


def inspect(
    model: keras.Model,
    dataset: Iterable[Any],
    max_images: int | None = None,
    layers: str | Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
    num_examples: int = 8,
    capacities: float | Sequence[float] = CAPACITIES,
    image_names: Sequence[str] | None = None,
    verbose: int = 0,
) -> Inspection:
    """Inspects how the experts of a model treat images.

    Makes one pass over the data set; memory does not grow with its size. Under
    a Keras distribution the images are sharded over its devices.

    Args:
        model: A `ViTMoE`, `ConvNeXtMoE` or `SwinMoE`, or another functional
            model with one input and its own `MoEMLP` layers. Without a
            `preprocessing`, its images are assumed to be in [-1, 1]. Tokens
            that neither form a square of patches nor come from a
            `PatchEmbedding` are shown as a row.
        dataset: Iterable of batches of `(images, labels)` with integer labels,
            or of images, such as `data.load(..., training=False,
            preprocessing=model.preprocessing)`.
        max_images: Maximum number of images; None means all.
        layers: Names of MoE layers, or one name; None means all.
        class_names: One name per class; None uses numbers.
        num_examples: Number of images whose maps are kept, the first ones.
        capacities: Capacity factors at which the example images are rerouted
            with their batch, with and without Batch Prioritized Routing.
        image_names: Optional names of the images in order, such as file names,
            shown in the pictures.
        verbose: Whether to show a progress bar.

    Returns:
        An `Inspection`.

    Raises:
        ValueError: If the model is dense, has no layer of a given name, the
            dataset is empty or has another preprocessing than the model,
            labels are not classes of the model, or gates are NaN.

    Example:

    >>> found = inspect(model, test)  # doctest: +SKIP
    >>> found.layers["block_11_moe"].experts_per_image  # doctest: +SKIP
    >>> found.save("report")  # doctest: +SKIP

    Reference:
        [Riquelme et al., 2021](https://arxiv.org/abs/2106.05974), section 5 and
        appendix E; [Videau et al., 2024](https://arxiv.org/abs/2411.18322),
        section 4.4.
    """
    check_sizes(0, num_examples=num_examples)
    check_sizes(max_images=1 if max_images is None else max_images)
    check_preprocessing(model, dataset)
    _check_dataset(dataset)
    chosen = layers_to_look_at(model, layers)
    num_classes = _num_classes(model, class_names)
    factors = _capacities(capacities)
    probe = keras.Model(model.inputs[0], [layer.input for layer in chosen])
    gathered: Any = None
    left = math.inf if max_images is None else max_images
    for tokens, images, labels in predictions(probe, dataset, verbose):
        tokens = tokens if isinstance(tokens, list) else [tokens]
        if gathered is None:
            classes = num_classes if labels is not None else None
            grids = [_grid(model, x) for x in tokens]
            gathered = _Gathered(chosen, grids, classes, num_examples)
        labels = _checked(labels, gathered.num_classes, num_classes)
        # Routed as a whole batch, as by the model, and then cut.
        part = slice(0, min(len(images), left))
        pixels = _pixels(images[part], model)
        gathered.add(tokens, pixels, labels, part, factors)
        left -= len(images)
        if left <= 0:
            break
    return gathered.result(class_names, image_names)


class _Gathered:
    """Results gathered from the batches.

    Args:
        chosen: The MoE layers.
        grids: `(rows, columns)` of the patches of each.
        num_classes: Classes; None without labels.
        num_examples: Images whose maps are kept.
    """

    def __init__(self, chosen, grids, num_classes, num_examples):
        self.num_classes, self.num_examples = num_classes, num_examples
        self.sums = [
            LayerSums(layer, grid, num_classes)
            for layer, grid in zip(chosen, grids, strict=True)
        ]
        self.between, self.images, self.labels = {}, [], []

    def add(self, tokens, pixels, labels, part, capacities):
        """Adds part of a batch; `tokens` are those of the whole batch."""
        decided = []
        for one, x in zip(self.sums, tokens, strict=True):
            decisions = decide(one.layer, x).cut(part)
            _check_finite(decisions.gates, one)
            decided.append(decisions)
        missing = self.num_examples - sum(map(len, self.images))
        few = slice(0, min(max(missing, 0), part.stop))
        if few.stop or not self.images:
            self.images.append(pixels[few])
            for one, x, decisions in zip(
                self.sums, tokens, decided, strict=True
            ):
                served = _served(one.layer, x, few, capacities)
                one.add_examples(decisions.cut(few), served)
        if self.num_classes is not None:
            labels = labels[part]
            self.labels.append(labels[few])
        for one, decisions in zip(self.sums, decided, strict=True):
            one.add(decisions, pixels, labels)
        _add_between(self.between, self.sums, decided)

    def result(self, class_names, image_names):
        """The `Inspection`."""
        labels = None
        if self.num_classes is None:
            class_names = None
        else:
            labels = np.concatenate(self.labels).astype(int)
            if class_names is None:
                class_names = range(self.num_classes)
            class_names = tuple(str(x) for x in class_names)
        images = np.concatenate(self.images)
        if image_names is not None:
            image_names = tuple(map(str, image_names[: len(images)]))
        return Inspection(
            layers={one.layer.name: one.result() for one in self.sums},
            between=self.between,
            images=images,
            labels=labels,
            class_names=class_names,
            image_names=image_names,
        )


def layers_to_look_at(model, names=None):
    """The MoE layers of a model; raises for a dense one and an ensemble."""
    chosen = moe_layers(model, names)
    copies = max(getattr(layer.router, "copies", 1) for layer in chosen)
    if copies > 1:
        raise ValueError(
            "Each image must be routed once. Received: an ensemble of "
            f"{copies} members, each of which routes it. Use `MoEMLP.plan` and "
            "the functions of `inspection`."
        )
    return chosen


def _num_classes(model, class_names):
    """The classes that labels may have; None for a model without a head."""
    classes = model.output_shape[-1]
    if getattr(model, "num_classes", classes) is None:
        classes = None if class_names is None else len(class_names)
    elif class_names is not None and len(class_names) != classes:
        raise ValueError(
            "`class_names` must name each class of the model. Received: "
            f"{len(class_names)} names for {classes} classes."
        )
    return classes


def _capacities(capacities):
    """Capacity factors in a tuple, checked."""
    if not isinstance(capacities, (list, tuple)):
        capacities = (capacities,)
    for factor in capacities:
        if not is_number(factor) or factor <= 0:
            raise ValueError(
                f"`capacities` must be numbers above 0. Received: {factor!r}."
            )
    return tuple(capacities)


def _checked(labels, expected, num_classes):
    """The labels of a batch, as the first batch had some or none."""
    if expected is None and num_classes is None:
        return None  # Of a model without classes.
    if (labels is None) != (expected is None):
        raise ValueError(
            "All batches or none must have labels. Received: a batch "
            f"{'without' if labels is None else 'with'} labels after the first "
            "one."
        )
    if labels is None:
        return None
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(
            "Labels must be integers of shape (B,). Received: labels of shape "
            f"{labels.shape} and dtype {labels.dtype}. Take the argmax of "
            "one-hot labels; without labels, yield only the images."
        )
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise ValueError(
            f"Labels must be from 0 to {num_classes - 1}, the classes of the "
            f"model. Received: {wrong[0]}. Is it the data set of this model?"
        )
    return labels


def _check_finite(gates, one):
    """Raises for images whose gates are not finite."""
    wrong = np.flatnonzero(~np.isfinite(gates).all(axis=(1, 2)))
    if len(wrong):
        raise ValueError(
            "The router's gates must be finite. Received: NaN in "
            f"{one.layer.name!r} for image {one.num_images + wrong[0]} (counted"
            " from 0). Look at that image and at the weights of the model."
        )


def _check_dataset(dataset):
    if hasattr(dataset, "shape"):
        raise ValueError(
            "`dataset` must be an iterable of batches. Received: one array of "
            f"shape {tuple(dataset.shape)}. Put it into a list."
        )


def _grid(model, tokens):
    """`(rows, columns)` of the patches, the last ones of the tokens."""
    if tokens.ndim == 4:
        return tokens.shape[1:3]
    embeddings = [x for x in model.layers if isinstance(x, PatchEmbedding)]
    if embeddings:
        return patch_grid(model.input_shape[1:3], embeddings[0].patch_size)
    side = math.isqrt(tokens.shape[1])
    return (side, side) if side**2 == tokens.shape[1] else (1, tokens.shape[1])


def _pixels(images, model):
    """Images without their normalization, uint8."""
    preprocessing = getattr(model, "preprocessing", None)
    if preprocessing is None:
        preprocessing = Preprocessing(channels=images.shape[-1])
    pixels = images * np.asarray(preprocessing.std) + preprocessing.mean
    pixels = np.nan_to_num(np.round(pixels))
    return np.clip(pixels, 0, 255).astype("uint8")


def _add_between(between, sums, found):
    """Counts pairs of first choices in successive layers."""
    pairs = zip(sums, sums[1:], found, found[1:], strict=False)
    for first, second, before, after in pairs:
        if first.grid != second.grid:
            continue
        kept = slice(-first.num_patches, None)
        a, b = (x.top[:, kept, 0].ravel() for x in (before, after))
        good = (a >= 0) & (b >= 0)
        key = (first.layer.name, second.layer.name)
        shape = (first.num_experts, second.num_experts)
        table = between.setdefault(key, np.zeros(shape, "int64"))
        np.add.at(table, (a[good], b[good]), 1)


def _served(layer, tokens, part, capacities):
    """Which tokens of some images are served at other capacities."""
    if not has_priority(layer) or not part.stop:
        return {}
    return {
        (capacity, priority): served_at(layer, tokens, capacity, priority)[part]
        for capacity in capacities
        for priority in (False, True)
    }
