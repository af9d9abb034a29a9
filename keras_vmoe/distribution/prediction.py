"""Outputs for whole batches, on any number of devices and processes."""

import functools
import math
from typing import Any

import keras
import numpy as np

from keras_vmoe._keras import all_layers
from keras_vmoe.distribution._replicas import num_replicas


def predictions(model, dataset, verbose=0):
    """Yields a model's outputs for each batch of a dataset, as `predict`.

    Args:
        model: As in `predict`.
        dataset: Iterable of batches of `(images, labels)`, or of images; with
            several processes the same in all.
        verbose: Whether to show a progress bar.

    Yields:
        `(outputs, images, labels)` as NumPy arrays, several outputs as a list;
        labels are None if missing.

    Raises:
        ValueError: If the dataset is empty.
    """
    try:
        length = len(dataset)
    except TypeError:
        length = None
    bar = keras.utils.Progbar(length, verbose=int(verbose))
    images = None
    for batch in dataset:
        pair = batch if isinstance(batch, (tuple, list)) else (batch, None)
        images, labels = (None if x is None else np.asarray(x) for x in pair)
        yield predict(model, images), images, labels
        bar.add(1)
    if images is None:
        raise ValueError(
            "There must be at least one batch to measure. Received: an empty "
            "dataset."
        )


def predict(model: keras.Model, images: np.ndarray) -> Any:
    """Returns a model's outputs for a batch of images, as on one device.

    Under a Keras distribution or a tf.distribute strategy the images are split
    over the devices in whole groups. Devices without a group get zeros, whose
    outputs are dropped: groups are independent. Only a partial group is
    computed on every device.

    Args:
        model: A functional model with one input, whose outputs have one row
            per image.
        images: `(B, ...)` array, the same in all processes.

    Returns:
        The outputs as NumPy arrays, in all processes.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.ReLU()])
    >>> predict(model, np.array([[-1.0, 2.0]])).tolist()
    [[0.0, 2.0]]
    """
    images = np.asarray(images)
    strategy = getattr(model, "distribute_strategy", None)
    parallel = keras.distribution.distribution()
    if parallel is None and num_replicas(strategy) == 1:
        return model.predict_on_batch(images)
    multiple = _images_together(model, len(images))
    whole = len(images) // multiple * multiple
    parts = []
    if whole:
        devices = num_replicas(strategy if parallel is None else parallel)
        missing = -whole % (multiple * devices)
        padding = [(0, missing)] + [(0, 0)] * (images.ndim - 1)
        filled = np.pad(images[:whole], padding)
        outputs = _on_all(model, filled, parallel)

        def kept(x):  # An ensemble has several rows for each image.
            return x[: whole * (len(x) // len(filled))]

        parts.append(keras.tree.map_structure(kept, outputs))
    if whole < len(images):
        parts.append(_on_one(model, images[whole:], parallel))
    return keras.tree.map_structure(lambda *x: np.concatenate(x), *parts)


def _images_together(model, batch_size):
    """The smallest number of images that is whole groups for each layer."""
    groups = [
        layer.images_per_group
        for layer in all_layers(model)
        if hasattr(layer, "router")
    ]
    if "batch" in groups:  # A group that cannot be padded.
        return batch_size + 1
    return math.lcm(*groups)


def _on_all(model, images, parallel):
    """The outputs for a batch that is split over all devices."""
    if parallel is None:
        return model.predict(images, batch_size=len(images), verbose=0)
    layout = parallel.get_data_layout(images.shape)
    return _call(model, images, layout.backend_layout, parallel)


def _on_one(model, images, parallel):
    """The outputs for a batch that every device computes."""
    if parallel is None:
        # `predict_on_batch` would run all replicas.
        outputs = model(images, training=False)
        return keras.tree.map_structure(np.asarray, outputs)
    keras.distribution.set_distribution(None)
    try:
        return _call(model, images, None, parallel)
    finally:
        keras.distribution.set_distribution(parallel)


def _call(model, images, sharding, parallel):
    """The whole outputs, in every process, for a batch that all have."""
    import jax

    variables = [
        [x.value for x in model.trainable_variables],
        [x.value for x in model.non_trainable_variables],
    ]
    mesh = parallel.device_mesh.backend_mesh
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    images = jax.make_array_from_callback(
        images.shape, sharding or whole, lambda index: images[index]
    )
    outputs = _compiled(model, whole, sharding is None)(*variables, images)
    return jax.tree.map(np.asarray, outputs)


@functools.lru_cache(maxsize=4)
def _compiled(model, whole, on_one):
    """The compiled model; `on_one` separates those whose constraints differ."""
    del on_one
    import jax

    def call(trainable, others, images):
        outputs, _ = model.stateless_call(
            trainable, others, images, training=False
        )
        return outputs

    return jax.jit(call, out_shardings=whole)
