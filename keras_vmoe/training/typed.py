"""Dataclasses of settings: built from plain values, checked by their types."""

import dataclasses
import pathlib
import types
import typing
from typing import Literal

from keras_vmoe import _checks
from keras_vmoe._extras import require


def kinds_of(cls):
    """Returns the types of a dataclass's attributes, without `| None`."""
    kinds = typing.get_type_hints(cls)
    for name, kind in kinds.items():
        if isinstance(kind, types.UnionType):
            parts = [x for x in kind.__args__ if x is not types.NoneType]
            kinds[name] = parts[0] if len(parts) == 1 else kind
    return kinds


def merge(below, above):
    """Returns nested settings, with those `above` overriding those `below`."""
    merged = {**below, **above}
    for name in below.keys() & above.keys():
        if isinstance(below[name], dict) and isinstance(above[name], dict):
            merged[name] = merge(below[name], above[name])
    return merged


def read_yaml(path):
    """Reads the mapping in a YAML file as a dict."""
    path = pathlib.Path(path)
    jsonargparse = require("jsonargparse", "cli")
    yaml = require("yaml", "cli")
    try:
        # Not PyYAML's loader, which reads 1e-3 as a string.
        text = path.read_text(encoding="utf-8")
        settings = jsonargparse.get_loader("yaml")(text)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(
            f"A recipe must be a YAML file. Received: {path} ({error})."
        ) from error
    if not isinstance(settings, dict):
        raise ValueError(
            "A recipe must be a mapping of names to values. "
            f"Received: {path}, which holds {settings!r}. An empty one is {{}}."
        )
    return settings


def from_dict(cls, settings, what):
    """Makes an instance of a dataclass, and of the dataclasses inside it.

    For an unknown key, the error names `what` has it and the nearest key.
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
    """Converts a plain value to a setting of this type."""
    if value is None or not dataclasses.is_dataclass(kind):
        return tuple(value) if isinstance(value, list) else value
    if hasattr(kind, "from_dict"):
        return kind.from_dict(value)
    return from_dict(kind, value, f"`{name}`")


def check_types(config, group=""):
    """Raises unless flags, words and sizes match their types.

    NumPy numbers become Python numbers, which files can hold.

    A setting that can only be an integer is a size, at least 1, except `seed`.
    `group` precedes the names in messages.
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
