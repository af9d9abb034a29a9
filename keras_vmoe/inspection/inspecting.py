"""`inspect`: what the experts of a model do with a data set, in one pass."""

import dataclasses
import math
import pathlib

import numpy as np

from keras_vmoe import layers as moe
from keras_vmoe._checks import check_sizes
from keras_vmoe._checks import nearest
from keras_vmoe._preprocessing import Preprocessing
from keras_vmoe.distribution.prediction import predictions
from keras_vmoe.inspection.decisions import decide
from keras_vmoe.inspection.decisions import has_priority
from keras_vmoe.inspection.decisions import served_at
from keras_vmoe.inspection.gathering import LayerInspection
from keras_vmoe.inspection.gathering import LayerSums
from keras_vmoe.layers.patches import patch_grid
from keras_vmoe.models.base import check_preprocessing

CAPACITIES = (0.25, 0.5, 1.0)


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What the experts of a model do with a data set.

    Attributes:
        layers: Dict from the name of each MoE layer to a `LayerInspection`.
        between: Dict from pairs of successive layers of the same patches to
            `(E, E)` int arrays: patches by their first expert in the one (rows)
            and the other.
        images: `(images, H, W, channels)` uint8, the example images.
        labels: `(images,)` their classes, or None.
        class_names: Names of the classes, or None without labels.
    """

    layers: dict[str, LayerInspection]
    between: dict
    images: np.ndarray
    labels: np.ndarray | None
    class_names: tuple[str, ...] | None

    def sentences(self):
        """What the numbers say, a list of sentences for each layer."""
        from keras_vmoe.inspection.report import sentences

        return {name: sentences(self, name) for name in self.layers}

    def save(self, folder, history=None):
        """Writes a report: `index.html`, which holds all of it, CSV and NPZ.

        Args:
            folder: New folder, or one that an earlier report is in.
            history: Optional `history.csv` of the training, for a picture of
                the load over the epochs.

        Returns:
            `pathlib.Path` of the page.

        Raises:
            FileExistsError: If the folder holds anything else.
            ImportError: If matplotlib or Jinja2 is missing.
        """
        from keras_vmoe.inspection.report import write

        return write(self, pathlib.Path(folder), history)


def inspect(
    model,
    dataset,
    max_images=None,
    layers=None,
    class_names=None,
    num_examples=8,
    capacities=CAPACITIES,
    verbose=0,
):
    """Looks at what the experts of a model do with images.

    One pass over the data set; memory does not grow with it. Under a Keras
    distribution the images are spread over its devices.

    Args:
        model: A `ViTMoE`, a `ConvNeXtMoE`, or another functional model with
            `MoEMLP` layers of its own.
        dataset: Iterable of batches of `(images, labels)` with integer labels,
            or of images, such as `data.load(..., training=False,
            preprocessing=model.preprocessing)`.
        max_images: Images at most; None means all.
        layers: Names of MoE layers; None means all.
        class_names: One name per class; None takes numbers.
        num_examples: Images whose maps are kept, the first ones.
        capacities: Capacity factors at which the example images are routed
            again, with and without Batch Prioritized Routing.
        verbose: Whether to show a progress bar.

    Returns:
        An `Inspection`.

    Raises:
        ValueError: If the model is dense, there is no layer of a name, or the
            dataset is empty or made for a model of another preprocessing.

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
    chosen = _chosen(model, layers)
    probe = _probe(model, chosen)
    preprocessing = getattr(model, "preprocessing", None)
    wanted = preprocessing or Preprocessing(channels=model.input_shape[-1])
    sums, between, examples = None, {}, []
    stream = _cut(predictions(probe, dataset, verbose), max_images)
    for tokens, images, labels in stream:
        if sums is None:
            has_labels = labels is not None and labels.ndim == 1
            num_classes = model.output_shape[-1] if has_labels else None
            grids = [_grid(model, x) for x in tokens]
            sums = [
                LayerSums(layer, grid, num_classes)
                for layer, grid in zip(chosen, grids, strict=True)
            ]
        pixels = _pixels(images, wanted)
        found = [decide(*pair) for pair in zip(chosen, tokens, strict=True)]
        for one, decisions in zip(sums, found, strict=True):
            one.add(decisions, pixels, labels if has_labels else None)
        _add_between(between, sums, found)
        missing = num_examples - sum(len(x) for x, _ in examples)
        if missing > 0 or not examples:
            part = slice(0, max(missing, 0))
            examples.append((pixels[part], labels[part] if has_labels else []))
            for one, x, decisions in zip(sums, tokens, found, strict=True):
                _add_examples(one, x, decisions, part, capacities)
    names = None
    if has_labels:
        names = class_names or [str(i) for i in range(num_classes)]
    return Inspection(
        layers={one.layer.name: one.result() for one in sums},
        between=between,
        images=np.concatenate([x for x, _ in examples]),
        labels=(
            np.concatenate([y for _, y in examples]).astype(int)
            if has_labels
            else None
        ),
        class_names=None if names is None else tuple(names),
    )


def _chosen(model, names):
    """The MoE layers of a model, all or those of some names."""
    found = {x.name: x for x in model.layers if isinstance(x, moe.MoEMLP)}
    if not found:
        raise ValueError(
            "The model must have MoE layers to look at. Received: model="
            f"{model.name!r} without any of its own. `models.upcycle` makes "
            "experts of the MLPs of a dense model."
        )
    for name in names or ():
        if name not in found:
            raise ValueError(
                f"`layers` must be MoE layers of the model, of {[*found]}. "
                f"Received: {name!r}.{nearest(name, found)}"
            )
    return [x for x in found.values() if names is None or x.name in names]


def _probe(model, chosen):
    """From images to the tokens before each layer, in a list."""
    import keras

    return keras.Model(model.inputs[0], [layer.input for layer in chosen])


def _cut(stream, max_images):
    """Batches up to a number of images; outputs always in a list."""
    left = math.inf if max_images is None else max_images
    for outputs, images, labels in stream:
        outputs = outputs if isinstance(outputs, list) else [outputs]
        part = slice(0, min(len(images), left))
        labels = None if labels is None else labels[part]
        yield [x[part] for x in outputs], images[part], labels
        left -= len(images)
        if left <= 0:
            return


def _grid(model, tokens):
    """`(rows, columns)` of the patches, the last ones of the tokens."""
    if tokens.ndim == 4:
        return tokens.shape[1:3]
    patch_size = getattr(model, "patch_size", None)
    if patch_size is not None:
        return patch_grid(model.input_shape[1:3], patch_size)
    side = math.isqrt(tokens.shape[1])
    return (side, side) if side**2 == tokens.shape[1] else (1, tokens.shape[1])


def _pixels(images, preprocessing):
    """Images as they look, uint8."""
    pixels = images * np.asarray(preprocessing.std) + preprocessing.mean
    return np.clip(np.round(pixels), 0, 255).astype("uint8")


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


def _add_examples(one, tokens, decisions, part, capacities):
    """Keeps the maps of some images, routed again at other capacities."""
    few = dataclasses.replace(
        decisions, **{k: x[part] for k, x in vars(decisions).items()}
    )
    served = {}
    if has_priority(one.layer) and len(tokens[part]):
        served = {
            (capacity, priority): served_at(
                one.layer, tokens, capacity, priority
            )[part]
            for capacity in capacities
            for priority in (False, True)
        }
    one.add_examples(few, served)
