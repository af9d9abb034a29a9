"""What an export is told: signatures with their routing, preprocessing.

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
from collections.abc import Set
from typing import Literal

from keras_vmoe._checks import check_choice
from keras_vmoe._checks import check_flags
from keras_vmoe._checks import check_keys
from keras_vmoe._checks import check_sizes
from keras_vmoe._checks import is_integer
from keras_vmoe._checks import is_number

# What requests call the input of a signature, by `Signature.input`.
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
MAX_PIXELS = 2**25  # 100 MB of decoded RGB.
MAX_BATCH_SIZE = 1024
WARMUP_BATCHES = (1, 8)
MAX_RECORDS = 1000  # Of warm-up: with more TF Serving refuses the version.


@dataclasses.dataclass(frozen=True)
class Signature:
    """One way to ask an exported model: what goes in, how it is routed.

    Attributes:
        input: `"float"` for images `(B, H, W, C)` normalised as in training,
            `"uint8"` for pixels `(B, H, W, C)`, `"encoded"` for the bytes
            `(B,)` of JPEG and PNG files of any size.
        features: Whether to answer with the features `(B, D)` before the head
            instead of classes.
        capacity_factor: Capacity of the experts relative to an even load, or
            "dropless"; None means that of the export.
        num_selected_experts: K; None means that of the model.
        batch_priority: Whether to route confident tokens first; None means as
            in the model.
        images_per_group: Images that are routed together, or "batch"; None
            means that of the export.

    Raises:
        ValueError: If `input`, `features` or `batch_priority` is none of these.
            Other dials are checked with the model, by `saved_model`.

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

    def __post_init__(self):
        check_choice("input", self.input, [*INPUT_NAMES])
        check_flags(features=self.features)
        if self.batch_priority is not None:
            check_flags(batch_priority=self.batch_priority)

    @property
    def routing(self):
        """The dials that are turned, as arguments of `models.set_routing`."""
        dials = {name: getattr(self, name) for name in DIALS}
        return {k: v for k, v in dials.items() if v is not None}


STANDARD = {
    "serving_default": Signature(),
    "serve_images": Signature(input="uint8"),
    "serve_jpeg": Signature(input="encoded"),
    "features": Signature(features=True),
}


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """From pixels to the model's input: `(pixels - mean) / std`.

    The defaults are those of `data.preprocess`, with which this package trains.

    Attributes:
        mean: Mean subtracted from pixels in [0, 255]: a number, or one for each
            channel.
        std: Standard deviation by which the difference is divided: a number
            above 0, or one for each channel.
        test_crop: Share of the shorter side that the centre crop of encoded
            images keeps; None resizes whole images. See `data.load`.
        max_pixels: Encoded images of more pixels are not decoded.

    Raises:
        ValueError: If an attribute is out of its range.

    Example:

    >>> imagenet = Preprocessing(
    ...     mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
    """

    mean: float | tuple[float, ...] = 127.5
    std: float | tuple[float, ...] = 127.5
    test_crop: float | None = None
    max_pixels: int = MAX_PIXELS

    def __post_init__(self):
        for name in ("mean", "std"):
            value = getattr(self, name)
            values = value if isinstance(value, (list, tuple)) else (value,)
            good = len(values) > 0 and all(map(is_number, values))
            if not good or (name == "std" and min(values) <= 0):
                words = "numbers above 0" if name == "std" else "numbers"
                raise ValueError(
                    f"`{name}` must be {words} on the scale of 0 to 255, one "
                    f"or one for each channel. Received: {name}={value!r}."
                )
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(values))
        crop = self.test_crop
        if crop is not None and not (is_number(crop) and 0 < crop <= 1):
            raise ValueError(
                "`test_crop` must be a share in (0, 1] or None. "
                f"Received: test_crop={crop!r}."
            )
        check_sizes(max_pixels=self.max_pixels)


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that an export needs to know.

    Attributes:
        signatures: Dict from name to `Signature`; an ONNX or LiteRT file has
            `"serving_default"` alone.
        quantize_experts: `"int8"`, `"float16"` or None.
        preprocessing: A `Preprocessing`.
        max_batch_size: Larger requests are refused.
        warmup_batches: Batch sizes of the warm-up requests; empty for none.
        class_names: One name for each class, or None.
        card: Dict, what to write into the model card as it is.
    """

    signatures: dict
    quantize_experts: str | None = None
    preprocessing: Preprocessing = Preprocessing()
    max_batch_size: int = MAX_BATCH_SIZE
    warmup_batches: tuple = ()
    class_names: tuple | None = None
    card: dict = dataclasses.field(default_factory=dict)

    def to_json(self):
        """A string for `from_json`, NumPy's numbers as plain ones."""
        return json.dumps(
            dataclasses.asdict(self), default=lambda number: number.item()
        )

    @classmethod
    def from_json(cls, text):
        """What `to_json` was made of."""
        settings = json.loads(text)
        settings["preprocessing"] = Preprocessing(**settings["preprocessing"])
        for name, signature in settings["signatures"].items():
            settings["signatures"][name] = Signature(**signature)
        return cls(**settings)


def make_signatures(table, **defaults):
    """The standard signatures and those of a user's table.

    Args:
        table: None, a dict from name to a dict of `Signature`'s attributes (or
            a `Signature`), or an iterable of such pairs.
        **defaults: Dials of all signatures that do not turn them themselves.

    Returns:
        Dict from name to `Signature`.

    Raises:
        ValueError: If a name is there twice or is no name, or if a setting is
            unknown.
    """
    signatures = dict(STANDARD)
    for name, settings in _pairs(table):
        # Those with two underscores before them are TensorFlow's.
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(
                "The name of a signature must be a word of letters, digits and "
                "underscores that begins with a letter. "
                f"Received: {name!r}. Write for example 'fast'."
            )
        if name in signatures:
            raise ValueError(
                "Every signature must have a name of its own. Received: "
                f"{name!r} twice; {list(STANDARD)} are always there. Choose "
                "another name."
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
    """The pairs of name and settings of a table of signatures, checked."""
    pairs = table.items() if isinstance(table, Mapping) else table or ()
    if not isinstance(pairs, Iterable) or isinstance(pairs, str):
        pairs = [table]
    pairs = list(pairs)
    for pair in pairs:
        good = isinstance(pair, (tuple, list)) and len(pair) == 2
        if not good or not isinstance(pair[1], (Mapping, Signature)):
            raise ValueError(
                "`signatures` must go from names to dicts of settings. "
                f"Received: {pair!r} in signatures={table!r}. Write for "
                "example {'fast': dict(capacity_factor=0.5)}."
            )
    return pairs


def check_names(class_names, num_classes):
    """The names of the classes as a tuple, checked; None without."""
    if class_names is None:
        return None
    other = (str, bytes, bytearray, memoryview, Mapping, Set)
    good = isinstance(class_names, Iterable)
    good = good and not isinstance(class_names, other)
    names = tuple(class_names) if good else ()
    if not good or not all(isinstance(x, str) or is_integer(x) for x in names):
        raise ValueError(
            "`class_names` must be a list of names in the order of the "
            f"classes. Received: class_names={class_names!r}. Write for "
            "example ['cat', 'dog']."
        )
    names = tuple(map(str, names))
    if len(names) != num_classes:
        raise ValueError(
            f"`class_names` must have one name for each of the {num_classes} "
            f"classes. Received: {len(names)} names. Give all, or None."
        )
    text = "".join(names)
    encodes = text.encode("utf-8", "ignore").decode() == text
    lines = all(len(name.splitlines()) == 1 for name in names)
    if not encodes or not lines or len({*names}) < len(names):
        raise ValueError(
            "Class names must be lines of text that differ, and '' is that of "
            f"no class. Received: class_names={names}. Rename some."
        )
    return names


def check_card(card, reserved):
    """A model card's own entries as plain values, checked.

    Args:
        card: What the user gave.
        reserved: Names that the card has anyway.
    """
    if card is not None and not isinstance(card, Mapping):
        raise ValueError(
            f"`card` must be a dict or None. Received: card={card!r}. "
            "Write for example {'test_accuracy': 0.98}."
        )
    card = dict(card or {})
    for name in card:
        if name in reserved:
            raise ValueError(
                f"The model card tells {name!r} itself. Received: "
                f"card={{{name!r}: {card[name]!r}}}. Choose another name."
            )
    try:
        return json.loads(json.dumps(card, default=float, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            "`card` must hold what JSON takes. "
            f"Received: card={card!r} ({error}). Use numbers and strings."
        ) from error


def check_preprocessing(preprocessing, channels):
    """A `Preprocessing` that fits a model; the package's own for None."""
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
        count = len(value) if isinstance(value, tuple) else 1
        if count not in (1, channels):
            raise ValueError(
                f"`{name}` must be one number, or one for each channel. "
                f"Received: {name}={value} for images of {channels} channels."
            )
    return preprocessing


def check_warmup(warmup, max_batch_size, num_signatures):
    """Batch sizes of the warm-up requests, checked; see `saved_model`."""
    if isinstance(warmup, bool):
        fitting = {min(x, max_batch_size) for x in WARMUP_BATCHES}
        batches = tuple(sorted(fitting)) if warmup else ()
    else:
        is_list = isinstance(warmup, Iterable) and not isinstance(warmup, str)
        batches = tuple(warmup) if is_list else (warmup,)
    for batch in batches:
        check_sizes(warmup=batch)
        if batch > max_batch_size:
            raise ValueError(
                "Warm-up requests must not be refused. Received: a batch of "
                f"{batch} with max_batch_size={max_batch_size}."
            )
    check_at_most(
        "warm-up requests", num_signatures * len(batches), MAX_RECORDS
    )
    return batches


def check_at_most(name, value, largest):
    """Raises if a number is larger than what a server takes."""
    if value > largest:
        raise ValueError(
            f"`{name}` must be at most {largest}. Received: {name}={value}."
        )


def check_path(name, path):
    """Raises unless this is a path."""
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(
            f"`{name}` must be a path. Received: {name}={path!r}. "
            "Write for example 'served/digits'."
        )
    if set("[\\") & set(pathlib.PurePath(path).as_posix()):
        raise ValueError(
            f"`{name}` must be a path that TensorFlow reads as it is, not as a "
            f"pattern. Received: {name}={str(path)!r}. Choose one without "
            "'[' and '\\'."
        )
