"""Accuracy and loss of a model on a dataset, class by class."""

import dataclasses
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_vmoe._preprocessing import check_preprocessing
from keras_vmoe.distribution.prediction import predictions
from keras_vmoe.evaluation.features import check_finite
from keras_vmoe.models.base import MoEModel

BINS = 15  # Of the calibration error.


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The scores of a model on a dataset.

    Attributes:
        num_images: Number of images.
        accuracy: Share of the images whose class has the largest logit.
        top5: Share of the images whose class is among the five largest.
        loss: Mean cross-entropy, the negative log-likelihood in nats.
        calibration_error: Expected calibration error: the mean gap between
            confidence and accuracy over 15 bins of equal width.
        confusion: `(classes, classes)` int array: images by true class (rows)
            and predicted class (columns).
        routing: Dict from the name of each MoE layer to the `load_share` and
            `dropped_share` of its router on these images.
        labels: `(images,)` int array of true classes.
        predicted: `(images,)` int array of predicted classes.
    """

    num_images: int
    accuracy: float
    top5: float
    loss: float
    calibration_error: float
    confusion: np.ndarray
    routing: dict[str, dict[str, Any]]
    labels: np.ndarray
    predicted: np.ndarray


def measure(
    model: keras.Model,
    dataset: Iterable[Any],
    verbose: int = 0,
    routing: bool = True,
) -> Measurement:
    """Measures a model on a dataset.

    Under a Keras distribution, batches are sharded over its devices; with
    several processes, each must receive the same batches.

    Args:
        model: A functional model from images to logits `(B, classes)`.
        dataset: Iterable of batches of `(images, labels)` with integer labels,
            such as `data.load(..., training=False)`.
        verbose: Whether to show a progress bar.
        routing: Whether to measure the routers too.

    Returns:
        A `Measurement`.

    Raises:
        ValueError: If the dataset is empty or has another preprocessing or
            other classes than the model; if the model has no head, or returns
            NaN.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Identity()])
    >>> batch = (np.array([[0.0, 9.0]], "float32"), np.array([1]))
    >>> measure(model, [batch]).accuracy
    1.0
    """
    check_preprocessing(model, dataset)
    if isinstance(model, MoEModel) and model.num_classes is None:
        raise ValueError(
            "The model must have a head to be measured. Received: model="
            f"{model.name!r} with num_classes=None. Give it one, "
            "`models.with_head(model, num_classes)`, and train it; "
            "`evaluation.few_shot` and `linear_probe` measure features."
        )
    layers = [x for x in model.layers if routing and hasattr(x, "router")]
    # The routers' tokens, from the same pass as the logits.
    outputs = [model.outputs[0], *(layer.input for layer in layers)]
    probe = keras.Model(model.inputs[0], outputs)  # Keras warns of a list.
    watches = [_RouterWatch(layer) for layer in layers]
    logits, labels = [], []
    for found, _, batch_labels in predictions(probe, dataset, verbose):
        found, *tokens = found if layers else [found]
        logits.append(found)
        labels.append(batch_labels)
        for watch, x in zip(watches, tokens, strict=True):
            watch.update(x)
    return Measurement(
        **_scores(np.concatenate(logits), np.concatenate(labels)),
        routing={watch.layer.name: watch.result() for watch in watches},
    )


def check_logits(logits):
    """Raises for NaN or infinite logits, and names their images."""
    check_finite(logits, "Logits")


def _scores(logits, labels):
    """The fields of a `Measurement` computed from logits and labels."""
    check_logits(logits)
    classes = logits.shape[-1]
    is_integer = labels.ndim == 1 and labels.dtype.kind in "iu"
    if not is_integer or labels.min() < 0 or labels.max() >= classes:
        found = f"labels of dtype {labels.dtype} and shape {labels.shape}"
        if is_integer:
            found = f"labels from {labels.min()} to {labels.max()}"
        raise ValueError(
            f"Labels must be integers below the {classes} classes of the "
            f"model. Received: {found}. Use a dataset of these classes, or "
            "`models.with_head`, and train the head."
        )
    order = np.argsort(-logits, axis=-1, kind="stable")
    confusion = np.zeros((logits.shape[-1],) * 2, int)
    np.add.at(confusion, (labels, order[:, 0]), 1)
    losses = keras.losses.sparse_categorical_crossentropy(
        labels, logits, from_logits=True
    )
    return {
        "num_images": len(labels),
        "accuracy": float((order[:, 0] == labels).mean()),
        "top5": float((order[:, :5] == labels[:, None]).any(axis=-1).mean()),
        "loss": float(ops.mean(losses)),
        "calibration_error": calibration_error(logits, labels),
        "confusion": confusion,
        "labels": labels,
        "predicted": order[:, 0],
    }


def calibration_error(logits, labels):
    """The expected calibration error, from 0 to 1.

    Images are sorted into 15 bins of equal width by the probability of their
    predicted class. Each bin is weighted by its number of images.

    Args:
        logits: `(images, classes)` float array.
        labels: `(images,)` int array.

    Returns:
        A float.

    Example:

    >>> logits = np.log([[0.8, 0.2], [0.8, 0.2]])
    >>> round(calibration_error(logits, np.array([0, 1])), 4)
    0.3

    Reference:
        [Guo et al., 2017](https://arxiv.org/abs/1706.04599), section 2.
    """
    logits = np.asarray(logits, "float64")
    shifted = logits - logits.max(axis=-1, keepdims=True)
    shares = np.exp(shifted)
    confidence = (shares / shares.sum(axis=-1, keepdims=True)).max(axis=-1)
    right = logits.argmax(axis=-1) == labels
    # Bins are open at their lower end, as in the paper.
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    gap = np.bincount(bins, weights=confidence - right, minlength=BINS)
    return float(np.abs(gap).sum() / len(labels))


class _RouterWatch:
    """Means over batches of the routing statistics of an MoE layer."""

    def __init__(self, layer):
        self.layer = layer
        self.load, self.dropped, self.count = 0.0, 0.0, 0

    def update(self, tokens):
        plan = self.layer.plan(ops.convert_to_tensor(tokens))
        self.load += ops.convert_to_numpy(plan.load_share())
        self.dropped += float(plan.dropped_share())
        self.count += 1

    def result(self):
        return {
            "load_share": self.load / self.count,
            "dropped_share": self.dropped / self.count,
        }


def report(measurement: Measurement, class_names: Sequence[str]) -> str:
    """Formats a measurement as text: numbers, a table of classes, the routers.

    For up to five classes the top-5 accuracy, which is 1, is omitted.

    Args:
        measurement: A `Measurement`.
        class_names: One name per class.

    Returns:
        String of several lines.
    """
    total = measurement.confusion.sum(axis=1)
    top5 = [f"top-5 accuracy: {measurement.top5:.4f}"] if len(total) > 5 else []
    lines = [
        f"images: {measurement.num_images}",
        f"accuracy: {measurement.accuracy:.4f}",
        *top5,
        f"cross-entropy: {measurement.loss:.4f}",
        f"calibration error: {measurement.calibration_error:.4f}",
        "",
        f"{'class':<24} {'images':>7} {'correct':>8}  most confused with",
    ]
    for i, name in enumerate(class_names):
        row = measurement.confusion[i]
        others = np.where(np.arange(len(row)) == i, -1, row)
        worst = int(others.argmax())
        wrong = f"{class_names[worst]} ({row[worst]})" if others[worst] else ""
        share = f"{row[i] / total[i]:.3f}" if total[i] else "-"
        lines.append(f"{name:<24} {total[i]:>7} {share:>8}  {wrong}")
    for name, routing in measurement.routing.items():
        load = routing["load_share"] * len(routing["load_share"])
        lines += [
            "",
            f"{name}: {routing['dropped_share']:.1%} dropped, load of the "
            f"experts {' '.join(f'{x:.2f}' for x in load)} (1 is even)",
        ]
    return "\n".join(lines)
