"""`saved_model`: a folder that TF Serving loads.

Every folder has these signatures, in addition to the user's:

- `serving_default`: `images` `(B, H, W, C)` float32, normalized as in training.
- `serve_images`: `images` `(B, H, W, C)` uint8.
- `serve_jpeg`: `image_bytes` `(B,)`, JPEG or PNG files, decoded and resized as
  in evaluation; for models of RGB images, or of grayscale with C = 1.
- `features`: `images` as in `serving_default`; returns `features` `(B, D)`, the
  input of the last layer, if that is a `Dense`.

The others return `logits` and `probabilities` `(B, classes)`, `class_id` `(B,)`
int64 and, with `class_names`, `class_name` `(B,)`. An image whose logits are
not finite, such as one with a NaN or a file that cannot be decoded, has the
class -1 and the name "". A model without a head returns features only.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import Literal

import keras

from keras_vmoe import _files
from keras_vmoe._checks import check_sizes
from keras_vmoe._extras import require
from keras_vmoe._preprocessing import Preprocessing
from keras_vmoe._warnings import warn
from keras_vmoe.data.tensorflow_runtime import import_tensorflow
from keras_vmoe.data.untrusted import MAX_PIXELS
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

LARGEST_BATCH, LARGEST_VERSION = 2**31 - 1, 2**63 - 1  # Of TF Serving.
ADVICE = (
    "Use keras.ops in custom layers, and no lookup tables, whose state is not "
    "in weights."
)


def saved_model(
    model: keras.Model,
    directory: str | os.PathLike[str],
    version: int = 1,
    signatures: Mapping[str, Any] | Iterable[tuple[str, Any]] | None = None,
    images_per_group: int | Literal["batch"] = 1,
    capacity_factor: float | Literal["dropless"] | None = None,
    warmup: bool | Iterable[int] = True,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
    *,
    class_names: Sequence[str] | None = None,
    max_batch_size: int = checked.MAX_BATCH_SIZE,
    max_pixels: int = MAX_PIXELS,
    quantize_experts: Literal["int8", "float16"] | None = None,
    card: Mapping[str, Any] | None = None,
) -> pathlib.Path:
    """Exports a model as a SavedModel for TF Serving, from any backend.

    Writes `directory/<version>/`, completely or not at all, once a process with
    only TensorFlow has reproduced the model's outputs. By default an image's
    answer does not depend on its batch mates. In larger groups it does, and
    other clients can change it ([Hayes et al.](https://arxiv.org/abs/2402.05526)).

    Args:
        model: A functional or sequential Keras model, `(B, H, W, C)` to logits.
        directory: Folder of the versions, created if missing.
        version: Integer of at least 1. An existing version is never changed.
        signatures: Extra ones: dict from name to `Signature`'s attributes.
        images_per_group: Images that are routed together, or "batch".
        capacity_factor: Capacity of the experts, or "dropless"; None means
            the model's.
        warmup: Whether to write warm-up requests, or their batch sizes.
        preprocessing: A `data.Preprocessing`; None means the model's own, and
            for other Keras models the default.
        class_names: Optional list with the name of each class.
        max_batch_size: Larger requests are rejected.
        max_pixels: Encoded images with more pixels are not decoded.
        quantize_experts: `"int8"` or `"float16"`: type in which the experts'
            kernels are stored.
        card: Dict for the model card, such as `{"test_accuracy": 0.98}`.

    Returns:
        `pathlib.Path` of the version's folder.

    Raises:
        ValueError: If an argument does not fit, or if TensorFlow cannot run
            the model or does not reproduce its outputs.
        FileExistsError: If the version exists.

    Example:

    >>> images = keras.Input((8, 8, 3))
    >>> x = keras.layers.Dense(2)(keras.layers.Flatten()(images))
    >>> saved_model(keras.Model(images, x), "served").as_posix()
    'served/1'
    """
    check_model(model)
    check_quantization(model, quantize_experts, KINDS)
    checked.check_path("directory", directory)
    check_sizes(
        version=version, max_batch_size=max_batch_size, max_pixels=max_pixels
    )
    checked.check_at_most("version", version, LARGEST_VERSION)
    checked.check_at_most("max_batch_size", max_batch_size, LARGEST_BATCH)
    dials = default_dials(
        model,
        images_per_group=images_per_group,
        capacity_factor=capacity_factor,
    )
    served = checked.make_signatures(signatures, **dials)
    served = _signatures(model, served)
    batches = checked.check_warmup(warmup, max_batch_size, len(served))
    require("tensorflow", "serving")
    if batches:
        require("tensorflow_serving", "serving")
    settings = checked.Settings(
        signatures=served,
        quantize_experts=quantize_experts,
        preprocessing=checked.check_preprocessing(preprocessing, model),
        max_batch_size=max_batch_size,
        max_pixels=max_pixels,
        warmup_batches=batches,
        class_names=checked.check_names(class_names, model.output_shape[-1]),
        card=checked.check_card(card, contents.CARD_NAMES),
    )
    path = pathlib.Path(directory, str(int(version)))
    with _files.creating(path) as folder:
        _warn_of_missing(served, path.parent)
        process.write(write_version, model, settings, folder)
    return path


def _signatures(model, signatures):
    """The signatures that a model supports; raises for one of the user's."""
    able = {}
    for name, signature in signatures.items():
        lacking = _lacking(model, signature)
        try:
            if lacking is None:
                routed(model, signature.routing)
                able[name] = signature
            elif name not in checked.STANDARD:
                raise ValueError(f"{lacking} Omit it.")
        except ValueError as error:
            raise ValueError(f"{error} (Signature {name!r}.)") from error
    if not has_classes(model):  # The others return the same.
        del able["features"]
    return able


def _lacking(model, signature):
    """Why a model cannot have a signature; None if it can."""
    *_, channels = model.input_shape
    if signature.input == "encoded" and channels not in (1, 3):
        words = "Files are decoded to grayscale or RGB. Received: a model of"
        return f"{words} {channels} channels."
    if signature.features and has_classes(model) and features_of(model) is None:
        words = "Features are the input of a `Dense` layer at the end."
        return f"{words} Received: a model without one."
    return None


def _warn_of_missing(signatures, directory):
    """Warns if clients of the newest version would miss a signature."""
    newest = contents.newest_version(directory)
    try:
        card = (
            json.loads((newest / contents.CARD).read_text()) if newest else {}
        )
    except (FileNotFoundError, ValueError):  # Not written by this package.
        return
    missing = card.get("signatures", {}).keys() - signatures
    if missing:
        warn(
            "A version should have the signatures of the one before. Received: "
            f"no signature {', '.join(map(repr, sorted(missing)))}, which "
            f"version {newest.name} has. Add it to `signatures`."
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
    with process.named_errors("TensorFlow must run the model", ADVICE):
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
    # Served functions need no gradients.
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
    with _disk_errors():
        tf.saved_model.save(module, str(folder), endpoints, options)


@contextlib.contextmanager
def _disk_errors():
    """Turns errors of TensorFlow's file system into OSErrors."""
    tf = import_tensorflow()
    try:
        yield
    except tf.errors.OpError as error:
        raise OSError(
            "The version must be written whole. Received: TensorFlow's "
            f"{error.message} Free space on the disk."
        ) from error
