"""Features of images: the input of a model's head."""

import weakref
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

from keras_vmoe._checks import counted
from keras_vmoe._preprocessing import check_preprocessing
from keras_vmoe.distribution.prediction import predictions
from keras_vmoe.models.base import MoEModel

SHOWN = 5  # Images that a message names.


def extract_features(
    model: keras.Model, dataset: Iterable[Any], verbose: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Extracts the features of all images of a dataset, in evaluation mode.

    Args:
        model: A functional model from images to logits or features `(B, D)`.
            Features are the input of its last layer if that is a `Dense` head,
            else its output.
        dataset: Iterable of batches of `(images, labels)` with integer labels,
            such as `data.load(..., training=False,
            preprocessing=model.preprocessing)`.
        verbose: Whether to show a progress bar.

    Returns:
        Pair of numpy arrays `(features, labels)`: float32 `(images, D)`, which
        must fit into memory, and int64 `(images,)`.

    Raises:
        ValueError: If the features are not `(B, D)`, some are not finite, or
            the dataset is empty or has another preprocessing than the model.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    >>> features, labels = extract_features(
    ...     model, [(np.ones((5, 2), "float32"), np.arange(5))])
    >>> features.shape, labels.shape
    ((5, 2), (5,))
    """
    check_preprocessing(model, dataset)
    found = predictions(_backbone(model), dataset, verbose)
    pairs = [(x, y) for x, _, y in found]
    features = np.concatenate([x for x, _ in pairs]).astype("float32")
    labels = np.concatenate([y for _, y in pairs])
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(
            "Labels must be integers, one per image. Received: labels of "
            f"dtype {labels.dtype} and shape {labels.shape}. Omit "
            "`one_hot`."
        )
    check_finite(features)
    return features, labels.astype("int64")


def check_finite(features, what="Features"):
    """Raises for NaN or infinite rows, and names their images."""
    wrong = np.flatnonzero(~np.isfinite(features).all(axis=-1))
    if wrong.size:
        first = ", ".join(map(str, wrong[:SHOWN]))
        first += ", ..." if len(wrong) > SHOWN else ""
        raise ValueError(
            f"{what} must be finite. Received: NaN or infinity in "
            f"{counted(len(wrong), 'image')} (counted from 0: {first}). Look "
            "at those images and at the weights of the model."
        )


def checked(train, test):
    """Features in float64 and integer labels of two sets, and the classes.

    Args:
        train: Pair `(features, labels)`.
        test: The same.

    Returns:
        `(train, test, num_classes)`; labels are renumbered to the classes of
        the training examples.

    Raises:
        ValueError: If they are no such pairs, or do not match.
    """
    (x, y), (test_x, test_y) = _pair(train, "train"), _pair(test, "test")
    sizes = [x.shape[1], test_x.shape[1]]
    if len(set(sizes)) > 1:
        raise ValueError(
            "Both sets must have features of the same model. Received: "
            f"{sizes[0]} and {sizes[1]} features."
        )
    missing = sorted(map(int, set(test_y) - set(y)))
    if missing:
        raise ValueError(
            "Every class of the test images must have a training example. "
            f"Received: none of {missing[:SHOWN]}"
            f"{', ...' if missing[SHOWN:] else ''}. Take another split, or "
            "omit those classes."
        )
    # Absent classes get no column.
    classes, y = np.unique(y, return_inverse=True)
    return (x, y), (test_x, np.searchsorted(classes, test_y)), len(classes)


def _pair(pair, name):
    features, labels = (np.asarray(x) for x in pair)
    good = features.ndim == 2 and labels.shape == features.shape[:1]
    if not good or labels.dtype.kind not in "iu" or not len(labels):
        raise ValueError(
            f"`{name}` must be a pair of features (M, D) and integer labels "
            f"(M,). Received: shapes {features.shape} and {labels.shape}, "
            f"labels of dtype {labels.dtype}. Use "
            "`evaluation.extract_features`."
        )
    if labels.min() < 0:
        raise ValueError(
            f"Labels must be at least 0. Received: {labels.min()} in {name}. "
            "Omit images without a label."
        )
    check_finite(features)
    return features.astype("float64"), labels


def _backbone(model):
    """A model without its head, if it has one; built once per model."""
    if model not in _BACKBONES:
        _BACKBONES[model] = _without_head(model)
    return _BACKBONES[model]


_BACKBONES: weakref.WeakKeyDictionary[keras.Model, keras.Model] = (
    weakref.WeakKeyDictionary()
)


def _without_head(model):
    head, output = model.layers[-1], model.outputs[0]
    has_head = isinstance(head, keras.layers.Dense)
    if isinstance(model, MoEModel):  # It may end in `pre_logits`.
        has_head = model.num_classes is not None
        head = model.get_layer("head") if has_head else head
    if has_head:
        output = head.input
    if has_head and len(output.shape) == 3:  # Of the members of an ensemble.
        output = keras.layers.Flatten()(output)
    if len(model.outputs) != 1 or len(output.shape) != 2:
        raise ValueError(
            "The model must end in one vector of features per image, `(B, D)`, "
            f"or in a `Dense` head after it. Received: a {head.name!r} of "
            f"output shape {model.output_shape}. Pool its feature maps, such "
            "as with `keras.layers.GlobalAveragePooling2D`."
        )
    return keras.Model(model.inputs[0], output)
