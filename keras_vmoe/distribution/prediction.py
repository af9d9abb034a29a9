"""Logits of whole batches, whatever devices and processes there are."""

import functools

import keras
import numpy as np

from keras_vmoe.distribution.strategies import num_replicas


def predict(model, images, multiple=1):
    """What a model says about a batch of images.

    Under a Keras distribution or a tf.distribute strategy the images of a
    batch are spread over the devices. A batch that cannot be spread evenly, as
    the last one of a dataset, is computed whole as on one device, and so the
    result is the same.

    Args:
        model: A functional model with one input.
        images: `(B, ...)` array, the same in all processes.
        multiple: Images that must stay together on a device, those of a group.

    Returns:
        What the model returns, as NumPy arrays, in all processes.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.ReLU()])
    >>> predict(model, np.array([[-1.0, 2.0]])).tolist()
    [[0.0, 2.0]]
    """
    images = np.asarray(images)
    replicas = num_replicas(getattr(model, "distribute_strategy", None))
    if replicas > 1:
        if len(images) % (replicas * multiple):
            return keras.tree.map_structure(np.asarray, _whole(model)(images))
        return model.predict(images, batch_size=len(images), verbose=0)
    parallel = keras.distribution.distribution()
    if parallel is None:
        return model.predict_on_batch(images)
    devices = parallel.device_mesh.devices.size
    if len(images) % (devices * multiple):
        keras.distribution.set_distribution(None)
        try:
            return _call(model, images, None, parallel)
        finally:
            keras.distribution.set_distribution(parallel)
    layout = parallel.get_data_layout(images.shape)
    return _call(model, images, layout.backend_layout, parallel)


@functools.lru_cache(maxsize=4)
def _whole(model):
    """The model in one replica; `predict_on_batch` repeats it in each."""
    import tensorflow as tf

    return tf.function(functools.partial(model, training=False))


def _call(model, images, sharding, parallel):
    """The outputs for a batch that every process has, wholly in each."""
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
    outputs = _compiled(model, whole)(*variables, images)
    return jax.tree.map(np.asarray, outputs)


@functools.lru_cache(maxsize=4)
def _compiled(model, whole):
    import jax

    def call(trainable, others, images):
        outputs, _ = model.stateless_call(
            trainable, others, images, training=False
        )
        return outputs

    return jax.jit(call, out_shardings=whole)
