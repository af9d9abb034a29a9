"""What an export is told: signatures with their routing, preprocessing.

No TensorFlow here: these settings are checked under every backend, before
anything is written.
"""

import dataclasses
import difflib
import json
import re
from collections.abc import Iterable
from collections.abc import Mapping
from typing import Literal

from keras_vmoe._checks import check_sizes
from keras_vmoe._checks import is_number

INPUTS = ("float", "uint8", "encoded")
DIALS = (
    "capacity_factor",
    "num_selected_experts",
    "batch_priority",
    "images_per_group",
)
NAME = re.compile(r"[A-Za-z]\w*", re.ASCII)  # Of a signature.
MAX_PIXELS = 2**25  # 100 MB of decoded RGB.


@dataclasses.dataclass(frozen=True)
class Signature:
    """One way to ask an exported model: what goes in, how it is routed.

    Attributes:
        input: `"float"` for images `(B, H, W, C)` normalised as in training,
            `"uint8"` for pixels `(B, H, W, C)`, `"encoded"` for the bytes
            `(B,)` of JPEG and PNG files of any size.
        features: Whether to answer with the features `(B, D)` before the head
            instead of classes.
        capacity_factor: Room of the experts, or "dropless"; None means that of
            the export.
        num_selected_experts: K; None means that of the model.
        batch_priority: Whether confident tokens are served first; None means
            as in the model.
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
        if self.input not in INPUTS:
            raise ValueError(
                f"`input` must be one of {INPUTS}. "
                f"Received: input={self.input!r}. The default is 'float'."
            )
        for name, choices in (
            ("features", (True, False)),
            ("batch_priority", (True, False, None)),
        ):
            if not any(getattr(self, name) is x for x in choices):
                raise ValueError(
                    f"`{name}` must be True or False. "
                    f"Received: {name}={getattr(self, name)!r}. "
                    "Leave it out for the default."
                )

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
        mean: Number, or one for each channel, on the scale of 0 to 255.
        std: Number, or one for each channel, above 0, on the same scale.
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
                    f"or one for each channel. Received: {name}={value!r}. "
                    "Give those of training; this package trains with 127.5."
                )
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(values))
        crop = self.test_crop
        if crop is not None and not (is_number(crop) and 0 < crop <= 1):
            raise ValueError(
                "`test_crop` must be a share in (0, 1] or None. "
                f"Received: test_crop={crop!r}. Give that of the evaluation, "
                "such as 0.875."
            )
        check_sizes(max_pixels=self.max_pixels)


@dataclasses.dataclass(frozen=True)
class ServedSettings:
    """All that an export in the form of a SavedModel needs to know.

    Attributes:
        signatures: Dict from name to `Signature`, with the standard ones.
        preprocessing: A `Preprocessing`.
        max_batch_size: Larger requests are refused.
        warmup_batches: Batch sizes of the warm-up requests; empty for none.
        class_names: One name for each class, or None.
        quantize_experts: `"int8"`, `"float16"` or None.
        card: Dict, what to write into the model card as it is.
    """

    signatures: dict
    preprocessing: Preprocessing
    max_batch_size: int
    warmup_batches: tuple
    class_names: tuple | None
    quantize_experts: str | None
    card: dict

    @property
    def routing(self):
        """The dials of what is asked by default."""
        return self.signatures["serving_default"].routing

    def to_json(self):
        """A string for `from_json`."""
        return _to_json(self)

    @classmethod
    def from_json(cls, text):
        """What `to_json` was made of."""
        settings = json.loads(text)
        settings["preprocessing"] = Preprocessing(**settings["preprocessing"])
        for name, signature in settings["signatures"].items():
            settings["signatures"][name] = Signature(**signature)
        return cls(**settings)


@dataclasses.dataclass(frozen=True)
class ConvertSettings:
    """All that an export to ONNX or LiteRT needs to know.

    Attributes:
        signature: A `Signature` of float images.
        quantize_experts: `"int8"`, `"float16"` or None.
    """

    signature: Signature
    quantize_experts: str | None

    @property
    def routing(self):
        """The dials of the file."""
        return self.signature.routing

    def to_json(self):
        """A string for `from_json`."""
        return _to_json(self)

    @classmethod
    def from_json(cls, text):
        """What `to_json` was made of."""
        settings = json.loads(text)
        return cls(
            Signature(**settings["signature"]), settings["quantize_experts"]
        )


def _to_json(settings):
    """Dataclasses as JSON, NumPy's numbers as plain ones."""
    return json.dumps(
        dataclasses.asdict(settings), default=lambda number: number.item()
    )


def table_pairs(table):
    """The pairs of name and settings of a table of signatures, checked."""
    if isinstance(table, str) or not isinstance(
        table, (Mapping, Iterable, type(None))
    ):
        raise ValueError(
            "`signatures` must go from names to dicts of settings. "
            f"Received: signatures={table!r}. Write for example "
            "{'fast': dict(capacity_factor=0.5)}."
        )
    pairs = list(table.items() if isinstance(table, Mapping) else table or ())
    for pair in pairs:
        good = isinstance(pair, (tuple, list)) and len(pair) == 2
        if not good or not isinstance(pair[1], (Mapping, Signature)):
            raise ValueError(
                "`signatures` must go from names to dicts of settings. "
                f"Received: {pair!r}. Write for example "
                "{'fast': dict(capacity_factor=0.5)}."
            )
    return pairs


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
    for name, settings in table_pairs(table):
        # Those with two underscores before them are TensorFlow's.
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(
                "The name of a signature must be a word of letters, digits and "
                "underscores that begins with a letter. "
                f"Received: {name!r}. Write for example 'fast'."
            )
        if name in STANDARD:
            raise ValueError(
                "Every signature must have a name of its own. "
                f"Received: {name!r} twice, as {list(STANDARD)} are always "
                "there. Choose another name."
            )
        if name in signatures:
            raise ValueError(
                "Every signature must have a name of its own. "
                f"Received: {name!r} twice. Choose another name."
            )
        signatures[name] = _signature(name, settings)
    return {
        name: dataclasses.replace(
            signature,
            **{
                k: v
                for k, v in defaults.items()
                if getattr(signature, k) is None
            },
        )
        for name, signature in signatures.items()
    }


def _signature(name, settings):
    if isinstance(settings, Signature):
        return settings
    known = [field.name for field in dataclasses.fields(Signature)]
    settings = dict(settings)
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"A signature takes the settings {known}. "
                f"Received: {key}={settings[key]!r} for {name!r}.{hint}"
            )
    return Signature(**settings)
