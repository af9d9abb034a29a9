"""TensorFlow as an image reader: imported late, and kept off the GPUs.

`tf` and `tfds` stand for the modules, which are imported on first use.
"""

import functools

import keras

from keras_vmoe._extras import require


# Cached also because AutoGraph leaves cached functions alone: it warns about
# an import inside a function that `tf.data` maps.
@functools.cache
def import_tensorflow():
    """Returns TensorFlow, kept off the GPUs unless it is the backend.

    TensorFlow reserves all memory of every GPU it sees. Under the JAX and
    PyTorch backends it only feeds the model, so the GPUs are hidden from it.
    """
    tf = require("tensorflow", "data")
    if keras.backend.backend() != "tensorflow":
        hide_gpus(tf)
    return tf


def import_tfds():
    """Returns TensorFlow Datasets."""
    import_tensorflow()  # Before TFDS, which may start TensorFlow's runtime.
    return require("tensorflow_datasets", "data")


class LazyModule:
    """A module whose names are looked up on use."""

    def __init__(self, load):
        self._load = load

    def __getattr__(self, name):
        return getattr(self._load(), name)


tf = LazyModule(import_tensorflow)
tfds = LazyModule(import_tfds)


def hide_gpus(tf):
    """Hides the GPUs from TensorFlow, if it has not started yet."""
    try:
        tf.config.set_visible_devices([], "GPU")
    except RuntimeError:
        # The program has started TensorFlow itself, and chosen its devices.
        pass


def checked(value, is_valid, message, shown):
    """Returns `value`, or fails with a message if `is_valid` is False.

    `{shown}` in the message becomes the value of the tensor `shown`. Eagerly it
    raises a ValueError. `tf.data` has no Python exceptions, and raises
    `tf.errors.InvalidArgumentError` with the same message.
    """
    if tf.executing_eagerly():
        if not is_valid:
            raise ValueError(message.replace("{shown}", str(shown.numpy())))
        return value

    def fail():
        text = tf.strings.format(message, shown, placeholder="{shown}")
        with tf.control_dependencies([tf.debugging.Assert(False, [text])]):
            return tf.identity(value)

    return tf.cond(is_valid, lambda: tf.identity(value), fail)
