"""A version is whole when TensorFlow's loader answers as the model does."""

import numpy as np

from keras_vmoe.data.tensorflow_runtime import import_tensorflow
from keras_vmoe.export.check import difference
from keras_vmoe.export.check import tolerance_of
from keras_vmoe.export.endpoints import INPUT_NAMES
from keras_vmoe.export.errors import named_errors
from keras_vmoe.export.warmup import example

BATCH = 2
OTHER_SEED = 1
ADVICE = "Leave out layers that are random or count in evaluation."


def verify_version(folder, model, endpoints, settings):
    """Raises unless every signature says what it said before it was written.

    And unless those that route every image alone say so whatever else is in
    the batch.

    Args:
        folder: `pathlib.Path` of the SavedModel.
        model: The model.
        endpoints: Dict from name to `tf.ConcreteFunction`, which was written.
        settings: `ServedSettings`.
    """
    batch = min(BATCH, settings.max_batch_size)
    shape = (batch, *model.input_shape[1:])
    tolerance = tolerance_of(model)
    with named_errors("TensorFlow's loader", ADVICE):
        written = import_tensorflow().saved_model.load(str(folder)).signatures
    for name, signature in settings.signatures.items():
        images = example(signature.input, shape)
        with named_errors("TensorFlow", ADVICE):
            right = _answer(endpoints[name], signature, images)
        _check_finite(name, right)
        with named_errors("TensorFlow's loader", ADVICE):
            given = _answer(written[name], signature, images)
        found = difference(given, right)
        if not found <= tolerance:
            raise ValueError(
                "A signature must say what the model says. Received: answers "
                f"of {name!r} that differ by {found:.1e}. {ADVICE}"
            )
        if signature.images_per_group in (None, 1):
            others = example(signature.input, shape, OTHER_SEED)
            mixed = np.concatenate([images[:1], others[1:]])
            _check_alone(
                name, right, _answer(written[name], signature, mixed), tolerance
            )


def _answer(function, signature, images):
    """What a function says of images, as a dict of arrays."""
    tf = import_tensorflow()
    asked = {INPUT_NAMES[signature.input]: tf.constant(images)}
    return {k: x.numpy() for k, x in function(**asked).items()}


def _check_finite(name, answer):
    """Raises if an image of noise has no answer."""
    numbers = [x for x in answer.values() if x.dtype.kind == "f"]
    if not all(np.isfinite(x).all() for x in numbers):
        raise ValueError(
            "An image must have a finite answer. Received: NaN or infinity "
            f"from {name!r}, of noise. Look for NaN in the weights, a `std` "
            "next to 0, or `max_pixels` below the images' own."
        )


def _check_alone(name, right, given, tolerance):
    """Raises if the first image's answer changed with the second image."""
    first = [{k: x[:1] for k, x in y.items()} for y in (given, right)]
    found = difference(*first)
    if not found <= tolerance:
        raise ValueError(
            "An image's answer must not depend on its batch mates. Received: "
            f"answers of {name!r} that change by {found:.1e} with another "
            "image beside it. Leave out layers that look over the batch."
        )
