"""Evaluation of a model on ImageNet and its robustness test sets."""

import csv
import dataclasses
import math
import pathlib
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_vmoe import data
from keras_vmoe._warnings import warn
from keras_vmoe.data import _corruption
from keras_vmoe.data import schema
from keras_vmoe.data.sources import prepared_datasets
from keras_vmoe.data.tensorflow_runtime import tfds
from keras_vmoe.distribution.prediction import predictions
from keras_vmoe.evaluation import imagenet
from keras_vmoe.evaluation.measurement import check_logits
from keras_vmoe.models.base import MoEModel

REAL = "ReaL"
SETS = {
    "ImageNet": ("imagenet2012", "validation"),
    REAL: ("imagenet2012_real", "validation"),
    "V2": ("imagenet_v2/matched-frequency", "test"),
    "V2 threshold 0.7": ("imagenet_v2/threshold-0.7", "test"),
    "V2 top images": ("imagenet_v2/topimages", "test"),
    "A": ("imagenet_a", "test"),
    "R": ("imagenet_r", "test"),
    "Sketch": ("imagenet_sketch", "test"),
} | {
    f"C {name} {severity}": (
        f"imagenet2012_corrupted/{name}_{severity}",
        "validation",
    )
    for name in imagenet.ALEXNET_ERROR
    for severity in range(1, 6)
}
CLASSES = {"A": imagenet.IMAGENET_A, "R": imagenet.IMAGENET_R}


@dataclasses.dataclass(frozen=True)
class Score:
    """The accuracy of a model on one test set.

    Attributes:
        num_images: Number of labeled images.
        accuracy: As published figures count: for ImageNet-A and -R among their
            200 classes, for ReaL within the set of labels, else among the 1000.
        all_classes: For ImageNet-A and -R among the 1000, else None.
        full_head: Among all classes if the model has more, else None.
    """

    num_images: int
    accuracy: float
    all_classes: float | None = None
    full_head: float | None = None


@dataclasses.dataclass(frozen=True)
class Robustness:
    """The accuracies of a model on the prepared sets.

    Attributes:
        scores: Dict from names of sets to `Score`s.
        absent: Names of the sets that are not prepared.
        corruption_error: Mean corruption error of ImageNet-C, 1 for AlexNet;
            None unless all of it is prepared.
    """

    scores: dict[str, Score]
    absent: tuple[str, ...]
    corruption_error: float | None


def robustness(
    model: keras.Model,
    data_dir: str | None = None,
    batch_size: int = 64,
    class_names: Sequence[str] | None = None,
    verbose: int = 0,
    on_score: Callable[[str, Score], Any] | None = None,
) -> Robustness:
    """Measures a model on ImageNet, ReaL, V2, A, R, Sketch and C.

    All sets that TFDS has prepared are measured; nothing is downloaded. A model
    with more classes, such as ImageNet-21k's, is scored by its logits for
    ImageNet's 1000, and also by all of them (0-shot in the Sweet Spot paper).

    Args:
        model: A `ViTMoE` or `ConvNeXtMoE` with ImageNet's 1000 classes in the
            order of their WordNet ids, or with more classes.
        data_dir: Folder of TFDS datasets; None is TFDS's own.
        batch_size: Images per step.
        class_names: WordNet ids of the model's classes, if they are not
            ImageNet's 1000.
        verbose: Whether to show a progress bar per set.
        on_score: Optional function called with the name and `Score` of each
            set once it is measured.

    Returns:
        A `Robustness`.

    Raises:
        ValueError: If no set is prepared, a set has labels that are not
            ImageNet's, or the classes of the model are unknown.

    Example:

    >>> found = robustness(model, "datasets")  # doctest: +SKIP
    >>> found.scores["A"].accuracy  # doctest: +SKIP

    Reference:
        [Videau et al., 2024](https://arxiv.org/abs/2411.18322), table 9.
    """
    ready = {x.partition(":")[0] for x in prepared_datasets(data_dir)}
    names = [name for name, (dataset, _) in SETS.items() if dataset in ready]
    if not names:
        raise ValueError(
            "One of ImageNet's test sets must be prepared. Received: "
            f"data_dir={data_dir!r}, which holds {sorted(ready)}. Prepare one "
            "with TFDS, such as imagenet_v2/matched-frequency."
        )
    for name in names:
        _check_labels(name, data_dir)
    columns = _columns(model, class_names)
    reads = {
        "image_size": model.input_shape[1:3],
        "batch_size": batch_size,
        "training": False,
        "data_dir": data_dir,
        "preprocessing": model.preprocessing,
    }
    scores = {}
    for name in names:
        if verbose:
            print(name, flush=True)
        dataset, split = SETS[name]
        with _corruption.named_corruption(dataset, [split], data_dir):
            scores[name] = _score(model, name, columns, reads, verbose)
        if on_score is not None:
            on_score(name, scores[name])
    errors = {
        x: [1 - scores[f"C {x} {i}"].accuracy for i in range(1, 6)]
        for x in imagenet.ALEXNET_ERROR
        if all(f"C {x} {i}" in scores for i in range(1, 6))
    }
    whole = len(errors) == len(imagenet.ALEXNET_ERROR)
    return Robustness(
        scores=scores,
        absent=tuple(name for name in SETS if name not in scores),
        corruption_error=(
            imagenet.mean_corruption_error(errors) if whole else None
        ),
    )


def wordnet_ids():
    """The WordNet ids of ImageNet's 1000 classes, in their order."""
    path = tfds.core.tfds_path("datasets/imagenet2012/labels.txt")
    return path.read_text().split()


def _label_of(name):
    return "original_label" if name == REAL else None


def _check_labels(name, data_dir):
    dataset, _ = SETS[name]
    found = data.info(dataset, data_dir, _label_of(name)).class_names
    if list(found) != wordnet_ids():
        raise ValueError(
            "The labels of a test set must be ImageNet's 1000 WordNet ids in "
            f"their order. Received: {dataset} with {len(found)} classes, "
            f"{list(found[:3])}. Prepare it as TFDS does."
        )


def _columns(model, class_names):
    """Indices of ImageNet's classes among the model's; None if equal."""
    if isinstance(model, MoEModel) and model.num_classes is None:
        raise ValueError(
            "The model must have a head. Received: model="
            f"{model.name!r} with num_classes=None. Give it one, "
            "models.with_head(model, 1000), and train it on ImageNet."
        )
    count = model.output_shape[-1]
    names = list(class_names or ())
    if count == imagenet.NUM_CLASSES and names in ([], wordnet_ids()):
        return None
    if len(names) != count:
        raise ValueError(
            "A model with classes other than ImageNet's 1000 needs WordNet ids "
            f"for them. Received: {count} classes, {len(names)} class_names. "
            "Pass them, or give the model a head of 1000 classes: "
            "models.with_head(model, 1000), trained on ImageNet."
        )
    columns = imagenet.columns_of(names, wordnet_ids())
    missing = [x for x, i in zip(wordnet_ids(), columns, strict=True) if i < 0]
    if missing:
        warn(
            f"The model lacks {len(missing)} of ImageNet's 1000 classes, such "
            f"as {missing[0]}: it misclassifies all of their images."
        )
    return columns


def _score(model, name, columns, reads, verbose):
    """The `Score` of one set."""
    dataset, split = SETS[name]
    images = data.load(dataset, split, **reads, label=_label_of(name))
    found, truths = {}, []
    for logits, _, labels in predictions(model, images, verbose):
        check_logits(logits)
        ranks = imagenet.ranked(logits, CLASSES.get(name), columns)
        for rule, predicted in ranks.items():
            found.setdefault(rule, []).extend(predicted)
        truths.extend(labels)
    if name == REAL:
        truths = schema.read_values(
            dataset, split, "real_label", reads["data_dir"]
        )
    others = (
        [x for x in map(int, truths) if x not in CLASSES[name]]
        if (name in CLASSES)
        else []
    )
    if others:
        warn(
            f"{dataset} has {len(others)} images of classes outside its 200, "
            f"such as {others[0]}: all of them count as errors."
        )
    rates = {rule: imagenet.accuracy(x, truths) for rule, x in found.items()}
    return Score(
        num_images=sum(np.size(x) > 0 for x in truths),
        accuracy=rates.get("of_set", rates["all"]),
        all_classes=rates["all"] if "of_set" in rates else None,
        full_head=rates.get("full"),
    )


def papers_rows(name):
    """The Sweet Spot paper's figures for a preset, by pretraining, in %."""
    path = pathlib.Path(__file__).with_name("paper_robustness.csv")
    with open(path, newline="") as file:
        rows = [x for x in csv.DictReader(file) if x.pop("preset") == name]
    return {row.pop("pretraining"): row for row in rows}


def robustness_table(found, preset=None):
    """A `Robustness` as text, next to the paper's figures for a preset.

    Args:
        found: A `Robustness`.
        preset: Name of the model's preset; None omits the paper's figures.

    Returns:
        String of several lines.
    """
    papers = papers_rows(preset)
    rows = _with_corruptions(found)
    columns = {"top-1": "accuracy", "of 1000": "all_classes"}
    columns |= {"full head": "full_head"}
    columns = {
        title: [getattr(score, key) for score in rows.values()]
        for title, key in columns.items()
    }
    columns = {
        title: [_percent(x) for x in values]
        for title, values in columns.items()
        if any(x is not None for x in values)
    }
    columns = {"images": [str(x.num_images) for x in rows.values()], **columns}
    heads = {"none": "paper", "in21k": "paper, 21k"}
    for pretraining, row in papers.items():
        columns[heads[pretraining]] = [row.get(name, "") for name in rows]
    lines = [f"{'set':<28}" + "".join(f"{x:>12}" for x in columns)]
    for name, *cells in zip(rows, *columns.values(), strict=True):
        line = f"{name:<28}" + "".join(f"{x:>12}" for x in cells)
        lines.append(line.rstrip())
    if "in21k" in papers:
        row = papers["in21k"]
        lines.append(
            "paper, 21k: pretrained on ImageNet-21k, then fine-tuned; before "
            f"that, on ImageNet: linear probe {row['linear probe']}, full head "
            f"(0-shot) {row['0-shot']}"
        )
    if found.corruption_error is not None:
        error = f"{100 * found.corruption_error:.1f}"
        lines.append(f"mean corruption error of C (AlexNet: 100): {error}")
    absent = [x for x in found.absent if not x.startswith("C ")]
    absent += [
        f"{count} of C's 75"
        for count in [len(found.absent) - len(absent)]
        if count
    ]
    if absent:
        lines.append(f"not prepared: {', '.join(absent)}")
    return "\n".join(lines)


def _with_corruptions(found):
    """Scores for the table, with one row of means per corruption."""
    rows = {}
    for name, score in found.scores.items():
        kind = name.rpartition(" ")[0] if name.startswith("C ") else name
        rows.setdefault(kind, []).append(score)
    rows = {
        f"{name}, {len(scores)} of 5" if name.startswith("C ") else name: scores
        for name, scores in rows.items()
    }
    return {
        name: dataclasses.replace(
            scores[0],
            num_images=sum(x.num_images for x in scores),
            accuracy=math.fsum(x.accuracy for x in scores) / len(scores),
            full_head=None if len(scores) > 1 else scores[0].full_head,
        )
        for name, scores in rows.items()
    }


def _percent(share):
    return "" if share is None else f"{100 * share:.1f}"
