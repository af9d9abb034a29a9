"""`saved_model`: a folder that TF Serving loads.

Every folder has these signatures, beside those of the user:

- `serving_default`: `images` `(B, H, W, C)` float32, normalised as in training.
- `serve_images`: `images` `(B, H, W, C)` uint8.
- `serve_jpeg`: `image_bytes` `(B,)`, JPEG or PNG files, decoded and resized as
  in evaluation; where the images are RGB, or grey with C = 1.
- `features`: `images` as `serving_default`; gives `features` `(B, D)`, what the
  last layer gets, where that is a `Dense`.

The others give `logits` and `probabilities` `(B, classes)`, `class_id` `(B,)`
int64 and, with `class_names`, `class_name` `(B,)`. An image whose logits are
not finite, as one with a NaN or a file that cannot be decoded, has the class -1
and the name "". A model without a head has features only.
"""

import contextlib
import json
import pathlib
import warnings

from keras_vmoe import _files
from keras_vmoe._checks import check_sizes
from keras_vmoe._extras import require
from keras_vmoe.data.tensorflow_runtime import import_tensorflow
from keras_vmoe.export import contents
from keras_vmoe.export import process
from keras_vmoe.export import settings as checked
from keras_vmoe.export.compaction import compact_version
from keras_vmoe.export.endpoints import make_endpoints
from keras_vmoe.export.variants import KINDS
from keras_vmoe.export.variants import check_model
from keras_vmoe.export.variants import check_quantization
from keras_vmoe.export.variants import default_dials
from keras_vmoe.export.variants import features_of
from keras_vmoe.export.variants import has_classes
from keras_vmoe.export.variants import routed
from keras_vmoe.export.variants import with_quantized_experts

LARGEST_BATCH, LARGEST_VERSION = 2**31 - 1, 2**63 - 1  # Integers of the server.
ADVICE = (
    "Use keras.ops in layers of your own, and no tables, whose state is not "
    "made of weights."
)


def saved_model(
    model,
    directory,
    version=1,
    signatures=None,
    images_per_group=1,
    capacity_factor=None,
    warmup=True,
    preprocessing=None,
    *,
    class_names=None,
    max_batch_size=checked.MAX_BATCH_SIZE,
    quantize_experts=None,
    card=None,
):
    """Exports a model as a SavedModel for TF Serving, from every backend.

    Writes `directory/<version>/`, whole or not at all, after a process of
    TensorFlow alone was answered as by the model. By default an image's answer
    does not depend on its batch mates; with larger groups it does, and whoever
    sends one can change it ([Hayes et al.](https://arxiv.org/abs/2402.05526)).

    Args:
        model: A functional or sequential Keras model, `(B, H, W, C)` to logits.
        directory: Folder of the versions, made if there is none.
        version: Integer of at least 1. An existing version is never touched.
        signatures: Further ones: dict from name to `Signature`'s attributes.
        images_per_group: Images that are routed together, or "batch".
        capacity_factor: Capacity of the experts, or "dropless"; None means
            that of the model.
        warmup: Whether to write warm-up requests; or their batch sizes.
        preprocessing: A `Preprocessing`; None means that of this package.
        class_names: Optional name for each class.
        max_batch_size: Larger requests are refused.
        quantize_experts: `"int8"` or `"float16"` kernels of the experts.
        card: Dict for the model card, such as `{"test_accuracy": 0.98}`.

    Returns:
        `pathlib.Path` of the version's folder.

    Raises:
        ValueError: If an argument does not fit, or TensorFlow's answers.
        FileExistsError: If the version exists.

    Example:

    >>> images = keras.Input((8, 8, 3))
    >>> x = keras.layers.Dense(2)(keras.layers.Flatten()(images))
    >>> saved_model(keras.Model(images, x), "served").as_posix()
    'served/1'
    """
    settings = _settings(
        model, signatures, images_per_group, capacity_factor, warmup,
        preprocessing, class_names, max_batch_size, quantize_experts, card,
    )  # fmt: skip
    path = _version(directory, version)
    with _files.creating(path) as folder:
        _warn_of_missing(settings.signatures, path.parent)
        process.write(write_version, model, settings, folder)
    return path


def _settings(
    model, signatures, images_per_group, capacity_factor, warmup,
    preprocessing, class_names, max_batch_size, quantize_experts, card,
):  # fmt: skip
    """The arguments of `saved_model`, checked."""
    check_model(model)
    check_quantization(model, quantize_experts, KINDS)
    check_sizes(max_batch_size=max_batch_size)
    checked.check_at_most("max_batch_size", max_batch_size, LARGEST_BATCH)
    dials = default_dials(
        model,
        images_per_group=images_per_group,
        capacity_factor=capacity_factor,
    )
    signatures = _signatures(
        model, checked.make_signatures(signatures, **dials)
    )
    *_, channels = model.input_shape
    batches = checked.check_warmup(warmup, max_batch_size, len(signatures))
    require("tensorflow", "serving")
    if batches:
        require("tensorflow_serving", "serving")
    return checked.Settings(
        signatures=signatures,
        quantize_experts=quantize_experts,
        preprocessing=checked.check_preprocessing(preprocessing, channels),
        max_batch_size=max_batch_size,
        warmup_batches=batches,
        class_names=checked.check_names(class_names, model.output_shape[-1]),
        card=checked.check_card(card, contents.CARD_NAMES),
    )


def _version(directory, version):
    """The folder of a version, which may be written."""
    checked.check_path("directory", directory)
    check_sizes(version=version)
    checked.check_at_most("version", version, LARGEST_VERSION)
    return pathlib.Path(directory, str(int(version)))


def _signatures(model, signatures):
    """Those signatures that a model can take; raises for a user's own."""
    able = {}
    for name, signature in signatures.items():
        lacking = _lacking(model, signature)
        try:
            if lacking is None:
                routed(model, signature.routing)
                able[name] = signature
            elif name not in checked.STANDARD:
                raise ValueError(f"{lacking} Leave it out.")
        except ValueError as error:
            raise ValueError(f"{error} (Signature {name!r}.)") from error
    if not has_classes(model):  # The others say no more.
        del able["features"]
    return able


def _lacking(model, signature):
    """Why a model of this kind cannot have a signature; None if it can."""
    *_, channels = model.input_shape
    if signature.input == "encoded" and channels not in (1, 3):
        lacking = f"Files are decoded to grey or RGB. Received: {channels}"
        return f"{lacking} channels."
    if signature.features and has_classes(model) and features_of(model) is None:
        lacking = "Features are what the last `Dense` layer gets."
        return f"{lacking} Received: a model without one."
    return None


def _warn_of_missing(signatures, directory):
    """Warns if clients of the newest version would not be answered any more."""
    newest = contents.newest_version(directory)
    try:
        card = (
            json.loads((newest / contents.CARD).read_text()) if newest else {}
        )
    except (FileNotFoundError, ValueError):  # Another's.
        return
    missing = card.get("signatures", {}).keys() - signatures
    if missing:
        warnings.warn(
            "A version should answer what the one before it does. Received: no "
            f"signature {', '.join(map(repr, sorted(missing)))}, as version "
            f"{newest.name} has. Give its `signatures` as well.",
            stacklevel=3,
        )


def write_version(model, settings, folder):
    """Writes a SavedModel, under the TensorFlow backend.

    Args:
        model: A model, not compiled.
        settings: `Settings`.
        folder: `pathlib.Path` that does not exist.
    """
    served = model
    if settings.quantize_experts is not None:
        served = with_quantized_experts(model, settings.quantize_experts)
    kind = import_tensorflow().errors.OpError
    with process.named_errors("TensorFlow must run the model", ADVICE, kind):
        write_graph(folder, make_endpoints(served, settings))
    compact_version(folder)
    contents.write_card(folder, model, settings)
    if settings.warmup_batches:
        with _disk_errors():
            contents.write_warmup(folder, model.input_shape[1:], settings)


def write_graph(folder, endpoints):
    """Writes functions and their variables as a SavedModel.

    Args:
        folder: `pathlib.Path` that does not exist.
        endpoints: Dict from name to `tf.ConcreteFunction`.
    """
    tf = import_tensorflow()
    module = tf.Module()
    variables = (x for f in endpoints.values() for x in f.variables)
    module.weights = list({id(x): x for x in variables}.values())
    # Gradients of served functions would only take room.
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
    with _disk_errors():
        tf.saved_model.save(module, str(folder), endpoints, options)


@contextlib.contextmanager
def _disk_errors():
    """Errors of TensorFlow's files as those of Python's."""
    tf = import_tensorflow()
    try:
        yield
    except tf.errors.OpError as error:
        raise OSError(
            "The version must be written whole. Received: an error of "
            f"TensorFlow, {error.message} Free space on the disk."
        ) from error
