"""A version is whole when TensorFlow's loader answers as the model does."""

from keras_vmoe.data.tensorflow_runtime import import_tensorflow
from keras_vmoe.export.check import difference
from keras_vmoe.export.check import tolerance_of
from keras_vmoe.export.endpoints import INPUT_NAMES
from keras_vmoe.export.errors import named_errors
from keras_vmoe.export.warmup import example

BATCH = 2
ADVICE = "Leave out layers that are random or count in evaluation."


def verify_version(folder, model, endpoints, signatures):
    """Raises unless every signature says what it said before it was written.

    Args:
        folder: `pathlib.Path` of the SavedModel.
        model: The model.
        endpoints: Dict from name to `tf.ConcreteFunction`, which was written.
        signatures: Dict from name to `Signature`.
    """
    shape = (BATCH, *model.input_shape[1:])
    asked = {name: example(x.input, shape) for name, x in signatures.items()}
    names = {name: INPUT_NAMES[x.input] for name, x in signatures.items()}
    right = _answers(endpoints, asked, names)
    with named_errors("TensorFlow's loader", ADVICE):
        written = import_tensorflow().saved_model.load(str(folder)).signatures
        given = _answers(written, asked, names)
    for name in asked:
        found = difference(given[name], right[name])
        if not found <= tolerance_of(model):
            raise ValueError(
                "A signature must say what the model says. Received: answers "
                f"of {name!r} that differ by {found:.1e}. {ADVICE}"
            )


def _answers(functions, asked, names):
    """What functions say of images, by the name of the signature."""
    tf = import_tensorflow()
    answers = {}
    for name, images in asked.items():
        outputs = functions[name](**{names[name]: tf.constant(images)})
        answers[name] = {k: x.numpy() for k, x in outputs.items()}
    return answers
