"""Augmentation of batches by layers of Keras or Keras-CV, or by a function.

Axes: B images in the batch, H and W height and width in pixels.
"""

import functools

import keras

from keras_vmoe.data.augmentation import Augmentation
from keras_vmoe.data.tensorflow_runtime import tf

MIXERS = ("CutMix", "FourierMix", "MixUp", "Mosaic")
PIXELS = (0, 255)


def split(augmentation):
    """An `Augmentation`, and the function of batches that comes after it.

    Args:
        augmentation: As of `load`.

    Returns:
        `(Augmentation, BatchChange or None)`.

    Raises:
        ValueError: If it is nothing that `load` takes.
    """
    several = isinstance(augmentation, (list, tuple))
    parts = list(augmentation) if several else [augmentation]
    parts = [part for part in parts if part is not None]
    ours = Augmentation()
    if parts and isinstance(parts[0], Augmentation):
        ours, *parts = parts
    parts = [x for part in parts for x in _flat(part)]
    for part in parts:
        is_layer = isinstance(part, keras.layers.Layer)
        good = _is_of_images(part) if is_layer else callable(part)
        if not good or isinstance(part, (type, Augmentation)):
            raise ValueError(
                "`augmentation` must be an Augmentation, an image augmentation "
                "layer of Keras or Keras-CV, a function of images and labels, "
                "or a list of these, an Augmentation first. "
                f"Received: augmentation={part!r}. Layers that are not for "
                "images belong into the model."
            )
    return ours, BatchChange(parts) if parts else None


class BatchChange:
    """Layers and functions, one after the other.

    Called with images `(B, H, W, channels)` float32 in [0, 255] and labels, it
    returns both. Labels must be one-hot where it `mixes` them.
    """

    def __init__(self, parts):
        self.parts = parts
        self.mixes = any(map(_mixes, parts))

    def try_out(self, shape, num_classes, one_hot):
        """Raises if a part changes the shape `(H, W, channels)` of images."""
        images, labels = tf.zeros((2, *shape)), tf.zeros(2, tf.int32)
        if one_hot:
            labels = tf.one_hot(labels, num_classes)
        dataset = tf.data.Dataset.from_tensors((images, labels))
        for part in self.parts:
            dataset = dataset.map(functools.partial(_changed, part))
            found = tuple(dataset.element_spec[0].shape)
            sizes = zip(found, (2, *shape), strict=False)
            if len(found) != 4 or any(x not in (y, None) for x, y in sizes):
                raise ValueError(
                    "`augmentation` must keep the shape of the images, "
                    f"(B, {', '.join(map(str, shape))}). Received: "
                    f"{_name(part)!r}, which makes {found} of a batch of 2. "
                    "Set its size to `image_size`, or `image_size` to its own."
                )

    def __call__(self, images, labels):
        shape = images.shape
        for part in self.parts:
            images, labels = _changed(part, images, labels)
        return tf.ensure_shape(images, shape), labels


def _changed(part, images, labels):
    """Images and labels after one layer or function."""
    if not isinstance(part, keras.layers.Layer):
        images, labels = part(images, labels)
        return tf.cast(images, tf.float32), labels
    low, high = _value_range(part)
    scale = (high - low) / 255
    batch = {"images": images * scale + low}
    if _mixes(part):
        batch["labels"] = labels
    batch = part(batch, training=True)
    images = (tf.cast(batch["images"], tf.float32) - low) / scale
    return images, batch.get("labels", labels)


def _flat(part):
    """The layers of one that applies all of its own in turn."""
    in_turn = (keras.Sequential, keras.layers.Pipeline)
    if isinstance(part, in_turn):
        return [x for inner in part.layers for x in _flat(inner)]
    return [part]


def _inside(layer):
    """A layer and those that it chooses from."""
    yield layer
    for inner in getattr(layer, "layers", None) or ():
        yield from _inside(inner)


def _is_of_images(layer):
    """Whether a layer works on images in `tf.data` under every backend."""
    of_cv = type(layer).__module__.partition(".")[0] == "keras_cv"
    return of_cv or hasattr(layer, "transform_images")


def _mixes(part):
    return any(type(x).__name__ in MIXERS for x in _inside(part))


def _value_range(layer):
    """The pixels that a layer wants; [0, 255] if it does not say."""
    found = {
        tuple(map(float, x.value_range))
        for x in _inside(layer)
        if getattr(x, "value_range", None) is not None
    }
    if len(found) > 1:
        raise ValueError(
            "The layers of one augmentation must have one `value_range`. "
            f"Received: {sorted(found)} in {layer.name!r}. Leave it out, or "
            "set all to (0, 255)."
        )
    return found.pop() if found else PIXELS


def _name(part):
    return getattr(part, "name", None) or getattr(part, "__name__", repr(part))
