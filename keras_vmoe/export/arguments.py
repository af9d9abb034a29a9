"""Checks of what an export is given, under every backend."""

import json
import os
import pathlib
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Set

from keras_vmoe._checks import is_integer

CARD_NAMES = (
    "name",
    "model",
    "params",
    "image_size",
    "channels",
    "num_classes",
    "preprocessing",
    "max_batch_size",
    "quantize_experts",
    "signatures",
    "versions",
)


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
    bad = any(
        len(name.splitlines()) != 1 or any(map(_is_surrogate, name))
        for name in names
    )
    if bad or len({*names}) < len(names):
        raise ValueError(
            "Class names must be lines of text that differ, and '' is that of "
            f"no class. Received: class_names={names}. Rename some."
        )
    return names


def _is_surrogate(character):
    """Whether this is half a character, which no encoding has."""
    return "\ud800" <= character <= "\udfff"


def check_card(card):
    """A model card's own entries as plain values, checked."""
    if card is not None and not isinstance(card, Mapping):
        raise ValueError(
            f"`card` must be a dict or None. Received: card={card!r}. "
            "Write for example {'test_accuracy': 0.98}."
        )
    card = dict(card or {})
    for name in card:
        if name in CARD_NAMES:
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


def check_at_most(name, value, largest):
    """Raises if a number is larger than what a server takes."""
    if value > largest:
        raise ValueError(
            f"`{name}` must be at most {largest}. Received: {name}={value}. "
            "Take a smaller one."
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
