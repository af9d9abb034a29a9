"""Dataclasses of settings: built from plain values, checked by their types."""

import contextlib
import dataclasses
import types
import typing
from typing import Any
from typing import Literal

from keras_vmoe import _checks


def kinds_of(cls):
    """The types of a dataclass's attributes, without a `| None`."""
    kinds = typing.get_type_hints(cls)
    for name, kind in kinds.items():
        if isinstance(kind, types.UnionType):
            parts = [x for x in kind.__args__ if x is not types.NoneType]
            kinds[name] = parts[0] if len(parts) == 1 else kind
    return kinds


def from_dict(cls, settings, what):
    """An instance of a dataclass, and of those inside it.

    An unknown key is an error that says `what` has it, and the nearest key.
    """
    if not isinstance(settings, dict):
        raise ValueError(
            f"{what} must be a mapping of names to values. "
            f"Received: {settings!r}."
        )
    kinds = kinds_of(cls)
    _checks.check_keys(what, settings, kinds)
    return cls(**{x: convert(kinds[x], settings[x], x) for x in settings})


def convert(kind, value, name):
    """A plain value as a setting of this type."""
    if value is None or not dataclasses.is_dataclass(kind):
        return tuple(value) if isinstance(value, list) else value
    if hasattr(kind, "from_dict"):
        return kind.from_dict(value)
    return from_dict(kind, value, f"`{name}`")


def fit(kind, value):
    """A plain value as one of this type; raises a TypeError if it is none."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        for part in parts:
            with contextlib.suppress(TypeError):
                return fit(part, value)
    elif origin in (list, tuple) and isinstance(value, list | tuple):
        return origin(fit(parts[0], x) for x in value)
    elif origin is dict and isinstance(value, dict):
        return {key: fit(parts[1], x) for key, x in value.items()}
    elif kind is float and _checks.is_number(value):
        return float(value)
    elif origin is Literal:
        if any(value is x or value == x for x in parts):
            return value
    elif origin is None and _is_one(kind, value):
        return value
    raise TypeError(f"Expected {kind}. Received: {value!r}.")


def _is_one(kind, value):
    """Whether a value is of a type without parts."""
    if kind is int:
        return _checks.is_integer(value)
    if dataclasses.is_dataclass(kind):
        return isinstance(value, dict)
    return kind is Any or isinstance(value, kind)


def check_types(config, group=""):
    """Raises unless flags, words and sizes are what their types say.

    Numbers of NumPy become those of Python, which files hold.

    A setting that may only be an integer is a size, of at least 1; a `seed` is
    not. `group` comes before the names in messages.
    """
    for field, kind in typing.get_type_hints(type(config)).items():
        value = _checks.plain(getattr(config, field))
        parts = typing.get_args(kind)
        object.__setattr__(config, field, value)
        name = group + field
        words = [
            word
            for part in (kind, *parts)
            if typing.get_origin(part) is Literal
            for word in typing.get_args(part)
        ]
        if value is None and types.NoneType in parts:
            continue
        if dataclasses.is_dataclass(kind) and not isinstance(value, kind):
            raise ValueError(
                f"`{name}` must be of the class {kind.__name__}. "
                f"Received: {name}={value!r}. Leave it out for the defaults."
            )
        if kind is bool:
            _checks.check_flags(**{name: value})
        elif kind in (int, int | None) and field != "seed":
            _checks.check_sizes(**{name: value})
        elif words and not (float in parts and _checks.is_number(value)):
            _checks.check_choice(name, value, words)


def check_value(good, config, name, words):
    """Raises unless an attribute is good."""
    if not good:
        value = getattr(config, name)
        raise ValueError(
            f"`{name}` must be {words}. Received: {name}={value!r}."
        )


def check_positive(config, *names):
    """Raises unless these attributes are positive numbers, or None."""
    for name in names:
        value = getattr(config, name)
        good = value is None or (_checks.is_number(value) and value > 0)
        check_value(good, config, name, "a positive number")
