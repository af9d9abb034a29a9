"""Which parts of a layer or model are trained, where its config holds no part.

Keras keeps `trainable` of a layer in its config, and hands it down to the
layers inside when it is set, but not when a layer is made.
"""

from keras_vmoe._keras import parts_of


def hand_down(layer):
    """Freezes what a frozen layer has made in its `build`."""
    if not layer.trainable:
        layer.trainable = True  # TensorFlow does not set a value that is set.
        layer.trainable = False


def trainable_parts(layer):
    """What of the layers inside differs from the layer around it.

    Args:
        layer: A layer or model.

    Returns:
        Dict from paths, of names, to `trainable`: `{"block_1_moe/router":
        False}`.
    """
    found = {}
    for part in parts_of(layer):
        if part.trainable != layer.trainable:
            found[part.name] = part.trainable
        for path, value in trainable_parts(part).items():
            found[f"{part.name}/{path}"] = value
    return found


def set_trainable_parts(layer, found):
    """Sets what `trainable_parts` has found, outer layers first."""
    for part in parts_of(layer):
        start = f"{part.name}/"
        if part.name in found:
            part.trainable = found[part.name]
        inner = {
            path.removeprefix(start): value
            for path, value in found.items()
            if path.startswith(start)
        }
        if inner:
            set_trainable_parts(part, inner)
