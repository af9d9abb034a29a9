"""One pass over a dataset, as all evaluations make it."""

import keras
import numpy as np

from keras_vmoe import distribution


def predictions(model, dataset, verbose=0):
    """What a model makes of each batch, and the labels beside it.

    Under a Keras distribution batches are spread over its devices; with several
    processes, each must be given the same batches.

    Args:
        model: A Keras model.
        dataset: Iterable of batches of `(images, labels)`.
        verbose: Whether to show a progress bar.

    Yields:
        Pairs of a numpy array, or a list of them if the model has several
        outputs, and a numpy array of labels.

    Raises:
        ValueError: If the dataset is empty.
    """
    bar = keras.utils.Progbar(_length(dataset), verbose=int(verbose))
    labels = None
    for images, labels in dataset:
        yield distribution.predict(model, images), np.asarray(labels)
        bar.add(1)
    if labels is None:
        raise ValueError(
            "There must be at least one batch to measure. Received: an empty "
            "dataset."
        )


def _length(dataset):
    """Batches of a dataset, None if unknown."""
    try:
        return len(dataset)
    except TypeError:
        return None
