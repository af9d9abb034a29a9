"""Class probabilities of images."""

from collections.abc import Sequence
from typing import NamedTuple

import keras
import numpy as np

from keras_vmoe._checks import check_sizes


class Prediction(NamedTuple):
    """One possible class of an image.

    Attributes:
        class_name: Name of the class.
        probability: Softmax probability, in `[0, 1]`.
    """

    class_name: str
    probability: float


def classify(
    model: keras.Model,
    images: np.ndarray,
    class_names: Sequence[str],
    top: int = 3,
    verbose: int = 0,
) -> list[list[Prediction]]:
    """Returns the most probable classes of each image.

    Images are predicted one by one: in an MoE layer the images of a group
    compete for the experts, and a prediction must not depend on other images.

    Args:
        model: A model from images to logits `(B, num_classes)`.
        images: `(B, H, W, channels)` float array, as from `data.read_images`.
        class_names: One name per class.
        top: Number of classes per image.
        verbose: Whether to show a progress bar.

    Returns:
        A list of at most `top` `Prediction`s for each image, the most probable
        first.

    Raises:
        ValueError: If the number of names is not the number of classes, or
            `top` is below 1.

    Example:

    >>> model = keras.Sequential([keras.layers.Identity()])
    >>> logits = np.array([[0.0, 9.0]], "float32")
    >>> classify(model, logits, ["cat", "dog"], top=1)[0][0].class_name
    'dog'
    """
    check_sizes(top=top)
    logits = model.predict(images, batch_size=1, verbose=int(verbose))
    if logits.shape[-1] != len(class_names):
        raise ValueError(
            f"`class_names` must have one name for each of the "
            f"{logits.shape[-1]} classes of the model. "
            f"Received: {len(class_names)} class_names."
        )
    probabilities = keras.ops.convert_to_numpy(keras.ops.softmax(logits))
    return [
        [
            Prediction(class_names[i], float(row[i]))
            for i in np.argsort(-row, kind="stable")[:top]
        ]
        for row in probabilities
    ]
