"""ImageNet's classes, and how its test sets score logits: pure functions."""

import json
import pathlib

import numpy as np

from keras_vmoe._checks import counted

NUM_CLASSES = 1000
# Classes of ImageNet-A and ImageNet-R among the 1000, and AlexNet's errors.
FACTS = json.loads(
    pathlib.Path(__file__).with_name("imagenet.json").read_text()
)
IMAGENET_A = tuple(FACTS["imagenet_a"])
IMAGENET_R = tuple(FACTS["imagenet_r"])
ALEXNET_ERROR = FACTS["alexnet_error"]


def ranked(logits, classes=None, columns=None):
    """The predicted classes of images, for each way of counting.

    Args:
        logits: `(B, model's classes)` array.
        classes: Classes of ImageNet that a test set has; None means all.
        columns: `(1000,)` indices of ImageNet's classes among the model's, -1
            for missing ones; None for a model of ImageNet's classes.

    Returns:
        Dict of `(B,)` arrays of ImageNet's classes: `"all"`, the best of the
        1000; with `classes`, `"of_set"`, the best of these; with `columns`,
        `"full"`, the best of all the model's classes, -1 if it is not in
        ImageNet.

    Example:

    >>> logits = np.eye(1000)[[3]] + np.eye(1000)[[5]] / 2
    >>> found = ranked(logits, classes=[4, 5])
    >>> {name: x.tolist() for name, x in found.items()}
    {'all': [3], 'of_set': [5]}
    """
    scores = logits
    if columns is not None:
        scores = np.where(columns >= 0, logits[:, columns], -np.inf)
    found = {"all": scores.argmax(axis=-1)}
    if classes is not None:
        classes = np.asarray(classes)
        found["of_set"] = classes[scores[:, classes].argmax(axis=-1)]
    if columns is not None:
        back = np.full(logits.shape[-1], -1)
        back[columns[columns >= 0]] = np.flatnonzero(columns >= 0)
        found["full"] = back[logits.argmax(axis=-1)]
    return found


def accuracy(predicted, truths):
    """The share of images whose prediction is among their true classes.

    Args:
        predicted: `(images,)` classes.
        truths: The class of each image, or an array of its classes as in ReaL;
            images with none are skipped.

    Returns:
        A float, NaN without images.

    Example:

    >>> accuracy([1, 2, 3], [[1, 7], [], [4]])
    0.5
    """
    hits = [
        x in np.atleast_1d(truth)
        for x, truth in zip(predicted, truths, strict=True)
        if np.size(truth)
    ]
    return float(np.mean(hits)) if hits else float("nan")


def mean_corruption_error(errors):
    """The mean of the errors under corruptions, each relative to AlexNet's.

    Args:
        errors: Dict from the 15 corruptions of ImageNet-C to 5 errors, one for
            each severity, in [0, 1].

    Returns:
        A float; 1 is AlexNet's.

    Reference:
        [Hendrycks and Dietterich, 2019](https://arxiv.org/abs/1903.12261),
        section 3.
    """
    shares = [np.mean(x) / ALEXNET_ERROR[name] for name, x in errors.items()]
    return float(np.mean(shares))


def columns_of(class_names, imagenet):
    """The indices of ImageNet's classes among those of a larger model.

    Args:
        class_names: WordNet ids of the model's classes, such as "n01440764".
        imagenet: WordNet ids of ImageNet's 1000 classes, in their order.

    Returns:
        `(1000,)` int array; -1 for a class that the model does not have.

    Raises:
        ValueError: If the model has none of ImageNet's classes.
    """
    places = {name: i for i, name in enumerate(class_names)}
    if len(places) < len(class_names):
        raise ValueError(
            "Each class must have its own WordNet id. Received: "
            f"{len(class_names)} names, {len(places)} of them different."
        )
    columns = np.array([places.get(name, -1) for name in imagenet])
    if (columns < 0).all():
        raise ValueError(
            "The classes of a model other than ImageNet-1k's must be named "
            "by WordNet ids. Received: "
            f"{counted(len(class_names), 'name')}, such as "
            f"{list(class_names)[:3]}. Pass a list such as ['n00004475', ...]: "
            "on the command line --classes FILE."
        )
    return columns
