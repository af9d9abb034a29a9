"""Settings of an export: signatures with their routing, and the rest.

No TensorFlow here: settings are checked under every backend, before anything
is written.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import Literal

import numpy as np

from keras_vmoe._checks import check_choice
from keras_vmoe._checks import check_flags
from keras_vmoe._checks import check_keys
from keras_vmoe._checks import check_sizes
from keras_vmoe._checks import is_integer
from keras_vmoe._preprocessing import Preprocessing
from keras_vmoe.data.untrusted import MAX_PIXELS

# Names of the input in requests, by `Signature.input`.
INPUT_NAMES = {
    "float": "images",
    "uint8": "images",
    "encoded": "image_bytes",
}
DIALS = (
    "capacity_factor",
    "num_selected_experts",
    "batch_priority",
    "images_per_group",
)
NAME = re.compile(r"[A-Za-z]\w*", re.ASCII)  # Of a signature.
MAX_BATCH_SIZE = 1024
WARMUP_BATCHES = (1, 8)
MAX_RECORDS = 1000  # Warm-up requests that TF Serving accepts in a version.


@dataclasses.dataclass(frozen=True)
class Signature:
    """One endpoint of an exported model: its input, output and routing.

    Attributes:
        input: `"float"` for images `(B, H, W, C)` normalized as in training,
            `"uint8"` for pixels `(B, H, W, C)`, `"encoded"` for the bytes
            `(B,)` of JPEG and PNG files of any size.
        features: Whether to return the features `(B, D)` before the head
            instead of classes.
        capacity_factor: Capacity of the experts relative to an even load, or
            "dropless"; None means that of the export.
        num_selected_experts: K; None means that of the model.
        batch_priority: Whether to route confident tokens first; None means as
            in the model.
        images_per_group: Images that are routed together, or "batch"; None
            means that of the export.

    Raises:
        ValueError: If `input`, `features` or `batch_priority` is invalid. The
            other dials are checked against the model, by `saved_model`.

    Example:

    >>> fast = Signature(capacity_factor=0.5, batch_priority=True)
    >>> fast.routing
    {'capacity_factor': 0.5, 'batch_priority': True}
    """

    input: Literal["float", "uint8", "encoded"] = "float"
    features: bool = False
    capacity_factor: float | str | None = None
    num_selected_experts: int | None = None
    batch_priority: bool | None = None
    images_per_group: int | str | None = None

    def __post_init__(self) -> None:
        check_choice("input", self.input, [*INPUT_NAMES])
        check_flags(features=self.features)
        if self.batch_priority is not None:
            check_flags(batch_priority=self.batch_priority)

    @property
    def routing(self) -> dict[str, Any]:
        """The dials that are set, as arguments of `models.set_routing`."""
        dials = {name: getattr(self, name) for name in DIALS}
        return {k: v for k, v in dials.items() if v is not None}


STANDARD = {
    "serving_default": Signature(),
    "serve_images": Signature(input="uint8"),
    "serve_jpeg": Signature(input="encoded"),
    "features": Signature(features=True),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The checked settings of an export.

    Attributes:
        signatures: Dict from name to `Signature`; an ONNX or LiteRT file has
            `"serving_default"` alone.
        quantize_experts: `"int8"`, `"float16"` or None.
        preprocessing: A `Preprocessing`.
        max_batch_size: Larger requests are refused.
        max_pixels: Encoded images of more pixels are not decoded.
        warmup_batches: Batch sizes of the warm-up requests; empty for none.
        class_names: One name for each class, or None.
        card: Dict of the user's own entries in the model card.
    """

    signatures: dict[str, Signature]
    quantize_experts: str | None = None
    preprocessing: Preprocessing = Preprocessing()
    max_batch_size: int = MAX_BATCH_SIZE
    max_pixels: int = MAX_PIXELS
    warmup_batches: tuple[int, ...] = ()
    class_names: tuple[str, ...] | None = None
    card: dict[str, Any] = dataclasses.field(default_factory=dict)


def make_signatures(table, **defaults):
    """The standard signatures and those in a user's table.

    Args:
        table: None, a dict from name to a dict of `Signature`'s attributes (or
            a `Signature`), or an iterable of such pairs.
        **defaults: Dials of all signatures that do not set them themselves.

    Returns:
        Dict from name to `Signature`.

    Raises:
        ValueError: If a name is invalid or given twice, or if a setting is
            unknown.
    """
    signatures = dict(STANDARD)
    for name, settings in _pairs(table):
        # Names with two leading underscores are TensorFlow's.
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(
                "The name of a signature must be a word of letters, digits and "
                "underscores that begins with a letter, such as 'fast'. "
                f"Received: {name!r}."
            )
        if name in signatures:
            raise ValueError(
                "Every signature must have its own name, other than "
                f"{list(STANDARD)}. Received: {name!r} twice. Choose another."
            )
        if not isinstance(settings, Signature):
            known = [field.name for field in dataclasses.fields(Signature)]
            check_keys(f"The signature {name!r}", settings, known)
            settings = Signature(**settings)
        signatures[name] = settings
    return {
        name: dataclasses.replace(x, **{**defaults, **x.routing})
        for name, x in signatures.items()
    }


def _pairs(table):
    """The pairs of name and settings in a table of signatures, checked."""
    pairs = table.items() if isinstance(table, Mapping) else table or ()
    try:
        pairs = [(name, settings) for name, settings in pairs]
        good = all(isinstance(x, Mapping | Signature) for _, x in pairs)
    except (TypeError, ValueError):  # Not pairs.
        good = False
    if not good:
        raise ValueError(
            "`signatures` must map names to dicts of settings, such as "
            "{'fast': dict(capacity_factor=0.5)}. "
            f"Received: signatures={table!r}."
        )
    return pairs


def check_names(class_names, num_classes):
    """The class names as a tuple, checked; None without any."""
    if class_names is None:
        return None
    is_list = isinstance(class_names, Sequence | np.ndarray)
    is_text = isinstance(class_names, str | bytes)
    names = list(class_names) if is_list and not is_text else [None]
    if not all(isinstance(x, str) or is_integer(x) for x in names):
        raise ValueError(
            "`class_names` must be a list of names in the order of the "
            f"classes. Received: class_names={class_names!r}."
        )
    names = tuple(map(str, names))
    if len(names) != num_classes:
        raise ValueError(
            f"`class_names` must have one name for each of the {num_classes} "
            f"classes. Received: {len(names)} names."
        )
    # Unpaired surrogates have no bytes.
    lines = [x.encode("utf-8", "ignore").decode().splitlines() for x in names]
    if lines != [[x] for x in names] or len({*names}) < len(names):
        raise ValueError(
            "Class names must be distinct, non-empty lines of text. Received: "
            f"class_names={names}."
        )
    return names


def check_card(card, reserved):
    """The user's entries in the model card as JSON values, checked.

    Args:
        card: Dict from the user, or None.
        reserved: Names of the entries that every card has.
    """
    try:
        plain = json.dumps(dict(card or {}), default=float, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "`card` must be a dict of JSON values, such as "
            f"{{'test_accuracy': 0.98}}. Received: card={card!r} ({error})."
        ) from error
    for name in set(card or {}) & set(reserved):
        raise ValueError(
            f"Every model card has a {name!r} entry already. Received: "
            f"card={{{name!r}: {card[name]!r}}}. Choose another name."
        )
    return json.loads(plain)


def check_preprocessing(preprocessing, model):
    """A `Preprocessing` that fits a model; the model's own for None."""
    channels = model.input_shape[-1]
    if preprocessing is None:
        default = Preprocessing(channels=channels)
        return getattr(model, "preprocessing", default)
    return Preprocessing.of(preprocessing, channels=channels)


def check_warmup(warmup, max_batch_size, num_signatures):
    """Batch sizes of the warm-up requests, checked; see `saved_model`."""
    if warmup is True:
        warmup = sorted({min(x, max_batch_size) for x in WARMUP_BATCHES})
    is_list = isinstance(warmup, Iterable) and not isinstance(warmup, str)
    batches = tuple(warmup) if is_list else (warmup,) * (warmup is not False)
    for batch in batches:
        check_sizes(warmup=batch)
        if batch > max_batch_size:
            raise ValueError(
                "Warm-up requests must not exceed `max_batch_size`. Received: "
                f"a batch of {batch} with max_batch_size={max_batch_size}."
            )
    check_at_most(
        "warm-up requests", num_signatures * len(batches), MAX_RECORDS
    )
    return batches


def check_at_most(name, value, largest):
    """Raises if a number is larger than TF Serving accepts."""
    if value > largest:
        raise ValueError(
            f"`{name}` must be at most {largest}. Received: {name}={value}."
        )


def check_path(name, path):
    """Raises unless TensorFlow takes a path literally."""
    is_path = isinstance(path, str | os.PathLike)
    if not is_path or set("[\\") & set(pathlib.PurePath(path).as_posix()):
        raise ValueError(
            f"`{name}` must be a path without '[' and '\\', which TensorFlow "
            f"would read as a pattern. Received: {name}={path!r}."
        )
