"""`saved_model`: a folder that TF Serving loads."""

import contextlib
import json
import pathlib
import warnings

import numpy as np

from keras_vmoe import _files
from keras_vmoe._checks import check_sizes
from keras_vmoe._extras import require
from keras_vmoe.data.tensorflow_runtime import import_tensorflow
from keras_vmoe.export import process
from keras_vmoe.export.arguments import check_at_most
from keras_vmoe.export.arguments import check_card
from keras_vmoe.export.arguments import check_names
from keras_vmoe.export.arguments import check_path
from keras_vmoe.export.card import CARD
from keras_vmoe.export.errors import named_errors
from keras_vmoe.export.quantization import KINDS
from keras_vmoe.export.replay import newest_version
from keras_vmoe.export.settings import STANDARD
from keras_vmoe.export.settings import Preprocessing
from keras_vmoe.export.settings import ServedSettings
from keras_vmoe.export.settings import make_signatures
from keras_vmoe.export.variants import check_model
from keras_vmoe.export.variants import check_quantization
from keras_vmoe.export.variants import default_dials
from keras_vmoe.export.variants import features_of
from keras_vmoe.export.variants import has_classes
from keras_vmoe.export.variants import routed
from keras_vmoe.export.variants import with_small_experts
from keras_vmoe.models.cloning import clone_around

WARMUP_BATCHES = (1, 8)
MAX_RECORDS = 1000  # Of warm-up: with more TF Serving refuses the version.
MAX_BATCH_SIZE = 1024
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
    max_batch_size=MAX_BATCH_SIZE,
    quantize_experts=None,
    card=None,
):
    """Exports a model as a SavedModel for TF Serving.

    Writes `directory/<version>/`, whole or not at all, from every backend; TF
    Serving is given `directory`. Weights are stored once, whatever the number
    of signatures, and so are layers and routings that do the same. These are
    always there:

    - `serving_default`: `images` `(B, H, W, C)` float32, normalised as in
      training.
    - `serve_images`: `images` `(B, H, W, C)` uint8.
    - `serve_jpeg`: `image_bytes` `(B,)`, JPEG or PNG files, decoded and resized
      as in evaluation; where the images are RGB, or grey with C = 1.
    - `features`: `images` as `serving_default`; gives `features` `(B, D)`, what
      the last layer gets, where that is a `Dense`.

    The others give `logits` and `probabilities` `(B, classes)`, `class_id`
    `(B,)` int64 and, with `class_names`, `class_name` `(B,)`. An image whose
    logits are not finite, as one with a NaN or a file that cannot be decoded,
    has the class -1 and the name "". A model without a head has features only.

    By default every image is a routing group of its own: its answer does not
    depend on the images that share its batch. With larger groups it does, and
    whoever sends a batch mate can change it ([Hayes et al.,
    2024](https://arxiv.org/abs/2402.05526)).

    Args:
        model: A functional or sequential Keras model from `(B, H, W, C)` to
            logits.
        directory: Folder of the versions; made if there is none.
        version: Integer of at least 1. An existing version is never touched.
        signatures: Further positions of the routing dial: a dict from name to
            a dict of `Signature`'s attributes, such as `{"fast":
            dict(capacity_factor=0.5, batch_priority=True), "accurate":
            dict(num_selected_experts=3, input="encoded")}`.
        images_per_group: Images that are routed together, or "batch".
        capacity_factor: Room of the experts while serving, or "dropless"; None
            means that of the model.
        warmup: Whether to write warm-up requests, for batches of 1 and 8 (or
            `max_batch_size`, where that is less); or their batch sizes.
        preprocessing: A `Preprocessing`; None means that of this package.
        class_names: Optional name for each class.
        max_batch_size: Larger requests are refused.
        quantize_experts: `"int8"` or `"float16"` kernels of the experts; None
            keeps them.
        card: Optional dict for the model card, such as `{"test_accuracy":
            0.98, "preset": "vit_s16_e8_last2"}`.

    Returns:
        `pathlib.Path` of the version's folder.

    Raises:
        ValueError: If the model, a signature or another argument does not fit,
            before anything is written; if TensorFlow cannot run the model, or
            what it wrote does not say what the model says.
        FileExistsError: If the version exists.
        OSError: If the folder cannot be written.
        ImportError: If the extra `serving` is not installed.

    Example:

    >>> from keras_vmoe.models import ViTMoE
    >>> model = ViTMoE(
    ...     image_size=16, patch_size=4, hidden_dim=16, num_layers=2,
    ...     num_heads=2, mlp_dim=32, num_classes=10,
    ...     moe={"layers": [1], "num_experts": 4})
    >>> path = saved_model(model, "served", signatures={
    ...     "fast": dict(capacity_factor=0.5, batch_priority=True),
    ... })
    >>> path.as_posix()
    'served/1'
    """
    check_model(model)
    check_path("directory", directory)
    check_sizes(version=version, max_batch_size=max_batch_size)
    check_at_most("version", version, LARGEST_VERSION)
    check_at_most("max_batch_size", max_batch_size, LARGEST_BATCH)
    check_quantization(model, quantize_experts, KINDS)
    batches = warmup_batches(warmup, max_batch_size)
    model = clone_around(model)
    settings = ServedSettings(
        signatures=_signatures(
            model, signatures, images_per_group, capacity_factor
        ),
        preprocessing=_checked_preprocessing(
            preprocessing, model.input_shape[-1]
        ),
        max_batch_size=max_batch_size,
        warmup_batches=batches,
        class_names=check_names(class_names, model.output_shape[-1]),
        quantize_experts=quantize_experts,
        card=check_card(card),
    )
    check_at_most(
        "the number of warm-up requests",
        len(settings.signatures) * len(batches),
        MAX_RECORDS,
    )
    require("tensorflow", "serving")
    if batches:
        require("tensorflow_serving", "serving")
    path = pathlib.Path(directory, str(int(version)))
    with _files.creating(path) as folder:
        _warn_of_missing(settings.signatures, path.parent)
        process.write("saved_model", model, settings, folder)
    return path


def _checked_preprocessing(preprocessing, channels):
    if preprocessing is None:
        return Preprocessing()
    if not isinstance(preprocessing, Preprocessing):
        raise ValueError(
            "`preprocessing` must be a Preprocessing or None. Received: "
            f"preprocessing={preprocessing!r}. Write "
            "export.Preprocessing(test_crop=0.875)."
        )
    for name in ("mean", "std"):
        value = getattr(preprocessing, name)
        if np.size(value) not in (1, channels):
            raise ValueError(
                f"`{name}` must be one number, or one for each channel. "
                f"Received: {name}={value} for images of {channels} channels. "
                "Give one number."
            )
    return preprocessing


def warmup_batches(warmup, max_batch_size):
    """Batch sizes of the warm-up requests, checked; see `saved_model`."""
    if isinstance(warmup, bool):
        fitting = {min(x, max_batch_size) for x in WARMUP_BATCHES}
        return tuple(sorted(fitting)) if warmup else ()
    try:
        batches = tuple(warmup)
    except TypeError:
        batches = (warmup,)
    for batch in batches:
        check_sizes(warmup=batch)
        if batch > max_batch_size:
            raise ValueError(
                "Warm-up requests must not be refused. Received: a batch of "
                f"{batch} with max_batch_size={max_batch_size}. Warm up with "
                "smaller batches."
            )
    return batches


def _signatures(model, table, images_per_group, capacity_factor):
    """All signatures of a model, each of which it can take."""
    defaults = default_dials(
        model,
        images_per_group=images_per_group,
        capacity_factor=capacity_factor,
    )
    signatures = make_signatures(table, **defaults)
    for name, signature in [*signatures.items()]:
        lacking = _lacking(model, signature)
        if lacking is not None and name in STANDARD:
            del signatures[name]
            continue
        try:
            if lacking is not None:
                raise ValueError(f"{lacking} Leave it out.")
            routed(model, signature.routing)
        except ValueError as error:
            raise ValueError(f"{error} (Signature {name!r}.)") from error
    if not has_classes(model):  # The others say no more.
        del signatures["features"]
    return signatures


def _lacking(model, signature):
    """Why a model of this kind cannot have a signature; None if it can."""
    channels = model.input_shape[-1]
    if signature.input == "encoded" and channels not in (1, 3):
        return (
            "Files are decoded to grey or RGB. Received: a model of images of "
            f"{channels} channels."
        )
    if signature.features and has_classes(model) and features_of(model) is None:
        return (
            "Features are what the last `Dense` layer gets. Received: a model "
            "without one."
        )
    return None


def _warn_of_missing(signatures, directory):
    """Warns if clients of the newest version would not be answered any more."""
    try:
        newest = newest_version(directory)
        card = json.loads((newest / CARD).read_text())
    except (FileNotFoundError, ValueError):  # Of the first, or another's.
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
        settings: `ServedSettings`.
        folder: `pathlib.Path` that does not exist.
    """
    from keras_vmoe.export.card import write_card
    from keras_vmoe.export.compaction import compact_version
    from keras_vmoe.export.endpoints import make_endpoints
    from keras_vmoe.export.verification import verify_version
    from keras_vmoe.export.warmup import write_warmup

    whole = model
    if settings.quantize_experts is not None:
        model = with_small_experts(model, settings.quantize_experts)
    with named_errors("TensorFlow", ADVICE):
        endpoints = make_endpoints(model, settings)
        write_graph(folder, endpoints)
    compact_version(folder)
    verify_version(folder, model, endpoints, settings)
    model._clear_losses()  # Those of the graph; layers are the user's own.
    write_card(folder, whole, settings)
    if settings.warmup_batches:
        with _disk_errors():
            write_warmup(folder, model.input_shape[1:], settings)


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
