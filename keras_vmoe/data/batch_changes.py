"""Augmentation of batches with layers of Keras or Keras-CV, or functions.

Axes: B images in the batch, H and W height and width in pixels.
"""

import functools

import keras

from keras_vmoe.data.augmentation import Augmentation
from keras_vmoe.data.tensorflow_runtime import tf

MIXERS = ("CutMix", "FourierMix", "MixUp", "Mosaic")
PIXELS = (0, 255)


def split(augmentation):
    """Splits into an `Augmentation` and the batch function that follows it.

    Args:
        augmentation: As in `load`.

    Returns:
        `(Augmentation, BatchChange or None)`.

    Raises:
        ValueError: If `load` does not accept it.
    """
    parts = _flat(augmentation)
    ours = Augmentation()
    if parts and isinstance(parts[0], Augmentation):
        ours, *parts = parts
    for part in parts:
        is_layer = isinstance(part, keras.layers.Layer)
        good = _is_of_images(part) if is_layer else callable(part)
        if not good or isinstance(part, (type, Augmentation)):
            raise ValueError(
                "`augmentation` must be an Augmentation, an image augmentation "
                "layer of Keras or Keras-CV, a function of images and labels, "
                "or a list of these, an Augmentation first. "
                f"Received: augmentation={part!r}. Layers that are not for "
                "images belong in the model."
            )
    return ours, BatchChange(parts) if parts else None


class BatchChange:
    """Layers and functions, applied in turn.

    Maps images, `(B, H, W, channels)` float32 in [0, 255], and labels to both.
    Labels must be one-hot if it `mixes` them.
    """

    def __init__(self, parts):
        self.parts = parts
        self.mixes = any(map(_mixes, parts))

    def try_out(self, shape, num_classes, one_hot):
        """Raises if a part changes the shape of images or labels, or fails."""
        images, labels = tf.zeros((2, *shape)), tf.zeros(2, tf.int32)
        if one_hot:
            labels = tf.one_hot(labels, num_classes)
        dataset = tf.data.Dataset.from_tensors((images, labels))
        for part in self.parts:
            dataset = _tried(dataset, part)
            specs = dataset.element_spec
            found, theirs = (tuple(getattr(x, "shape", ())) for x in specs)
            if not _fits(found, (2, *shape)):
                raise ValueError(
                    "`augmentation` must keep the shape of the images, "
                    f"(B, {', '.join(map(str, shape))}). Received: "
                    f"{_name(part)!r}, which makes {found} of a batch of 2. "
                    "Set its size to `image_size`, or `image_size` to its own."
                )
            if not _fits(theirs, labels.shape):
                raise ValueError(
                    "`augmentation` must keep the shape of the labels, "
                    f"{tuple(labels.shape)} of a batch of 2. Received: "
                    f"{_name(part)!r}, which makes {theirs} of them. Return "
                    "them unchanged, or mixed one-hot labels."
                )

    def __call__(self, images, labels):
        shapes = images.shape, labels.shape
        for part in self.parts:
            images, labels = _changed(part, images, labels)
        pairs = zip((images, labels), shapes, strict=True)
        return tuple(tf.ensure_shape(*pair) for pair in pairs)


def _changed(part, images, labels):
    """Images and labels after one layer or function."""
    if not isinstance(part, keras.layers.Layer):
        images, labels = part(images, labels)
        return tf.cast(images, tf.float32), labels
    low, high = _value_range(part)
    scale = (high - low) / 255
    images = images * scale + low
    if _mixes(part):
        batch = part({"images": images, "labels": labels}, training=True)
        images, labels = batch["images"], batch["labels"]
    else:
        images = part(images, training=True)
    return (tf.cast(images, tf.float32) - low) / scale, labels


def _tried(dataset, part):
    """A dataset after one layer or function; an error names a failing one."""
    try:
        changed = dataset.map(functools.partial(_changed, part))
        if isinstance(changed.element_spec, tuple):
            return changed
        raise TypeError(f"it returns {changed.element_spec}")
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            "`augmentation` must change batches of images "
            "(B, H, W, channels) in [0, 255] and labels, in TensorFlow, and "
            f"return both. Received: {_name(part)!r}, which fails: "
            f"{str(error).strip().splitlines()[-1]}"
        ) from error


def _fits(found, wanted):
    """Whether a shape matches, as far as it is known."""
    sizes = zip(found, wanted, strict=False)
    return len(found) == len(wanted) and all(x in (y, None) for x, y in sizes)


def _flat(part):
    """The layers of lists, and of layers that apply all of theirs in turn."""
    if isinstance(part, (keras.Sequential, keras.layers.Pipeline)):
        part = part.layers
    if isinstance(part, (list, tuple)):
        return [x for inner in part for x in _flat(inner)]
    return [] if part is None else [part]


def _inside(layer):
    """A layer and the layers that it chooses from."""
    yield layer
    for inner in getattr(layer, "layers", None) or ():
        yield from _inside(inner)


def _is_of_images(layer):
    """Whether a layer works on images in `tf.data` under every backend."""
    bases = {x.__module__.partition(".")[0] for x in type(layer).__mro__}
    return "keras_cv" in bases or hasattr(layer, "transform_images")


def _mixes(part):
    bases = {kind.__name__ for x in _inside(part) for kind in type(x).__mro__}
    return not bases.isdisjoint(MIXERS)


def _value_range(layer):
    """The range of pixels that a layer expects; the default is [0, 255]."""
    found = _ranges(layer)
    if len(found) > 1:
        raise ValueError(
            "The layers of one augmentation must have one `value_range`. "
            f"Received: {sorted(found)} in {layer.name!r}. Leave it out, or "
            "set all to (0, 255)."
        )
    return found.pop() if found else PIXELS


def _ranges(layer):
    """The ranges that a layer, or else the layers inside it, declare."""
    for name in ("value_range", "_value_range"):  # Keras-CV's Posterization.
        own = getattr(layer, name, None)
        if own is not None:  # It handles the layers inside.
            return {tuple(map(float, own))}
    layers = getattr(layer, "layers", None) or ()
    return {x for inner in layers for x in _ranges(inner)}


def _name(part):
    return getattr(part, "name", None) or getattr(part, "__name__", repr(part))
