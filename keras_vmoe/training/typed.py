"""Dataclasses of settings: made of plain values, checked by their types."""

import dataclasses
import types
import typing
from typing import Literal

from keras_vmoe._checks import check_choice
from keras_vmoe._checks import check_flags
from keras_vmoe._checks import check_keys
from keras_vmoe._checks import check_sizes
from keras_vmoe._checks import is_number


def kinds_of(cls):
    """The types of a dataclass's attributes, without a `| None`."""
    kinds = typing.get_type_hints(cls)
    for name, kind in kinds.items():
        if isinstance(kind, types.UnionType):
            parts = [x for x in kind.__args__ if x is not types.NoneType]
            kinds[name] = parts[0] if len(parts) == 1 else kind
    return kinds


def from_dict(cls, settings, what):
    """An instance of a dataclass, and of those inside of it.

    Args:
        cls: A dataclass.
        settings: Dict of its attributes; null, or such a dict for those that
            are dataclasses.
        what: What has these settings, for the message.

    Raises:
        ValueError: If a key is unknown; the message has the nearest one.
    """
    if not isinstance(settings, dict):
        raise ValueError(
            f"{what} must be a mapping of names to values. "
            f"Received: {settings!r}."
        )
    kinds, values = kinds_of(cls), {}
    check_keys(what, settings, kinds)
    for name, value in settings.items():
        kind = kinds[name]
        if value is None or not dataclasses.is_dataclass(kind):
            values[name] = tuple(value) if isinstance(value, list) else value
        elif hasattr(kind, "from_dict"):
            values[name] = kind.from_dict(value)
        else:
            values[name] = from_dict(kind, value, f"`{name}`")
    return cls(**values)


def check_types(config, group=""):
    """Raises unless words are among those known, and flags true or false.

    Args:
        config: A dataclass.
        group: What stands before its attributes in messages.
    """
    for name, kind in typing.get_type_hints(type(config)).items():
        value, parts = getattr(config, name), typing.get_args(kind)
        if kind is bool:
            check_flags(**{group + name: value})
        words = [
            word
            for part in (kind, *parts)
            if typing.get_origin(part) is Literal
            for word in typing.get_args(part)
        ]
        other = (value is None and types.NoneType in parts) or (
            float in parts and is_number(value)
        )
        if words and not other:
            check_choice(group + name, value, words)


def check_optional_sizes(config, *names):
    """Raises unless these are integers of at least 1, or None."""
    values = {name: getattr(config, name) for name in names}
    check_sizes(**{k: x for k, x in values.items() if x is not None})


def check_positive(config, name, at_most=None):
    """Raises unless an attribute is a positive number, or None."""
    value = getattr(config, name)
    if value is None:
        return
    good, words = is_number(value) and value > 0, "positive"
    if at_most is not None:
        good, words = good and value <= at_most, f"in (0, {at_most}]"
    check_value(good, config, name, words)


def check_value(good, config, name, words):
    """Raises unless an attribute is good."""
    if not good:
        value = getattr(config, name)
        raise ValueError(
            f"`{name}` must be {words}. Received: {name}={value!r}."
        )
