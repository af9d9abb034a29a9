"""Words for the values of settings, also in jsonargparse's errors."""

import dataclasses
import re
import types
import typing
from typing import Literal

from keras_vmoe._checks import nearest
from keras_vmoe.models import MoEConfig
from keras_vmoe.training import TrainConfig
from keras_vmoe.training.typed import kinds_of

METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", bool: ""}


def values_of(kind):
    """The values of a flag of this type in the help: `FLOAT|dropless`."""
    parts = [METAVARS.get(x, x) for x in _parts_of(kind)]
    words = [x for x in parts if isinstance(x, str)]
    found = "|".join(dict.fromkeys(words))
    return found or ("" if kind in (bool, bool | None) else "YAML")


def explained(message, actions):
    """An error of jsonargparse about a setting, without classes of Python.

    It names each level of a setting, then its type and, level by level
    outwards, the value.
    """
    name = ""
    for part in re.findall(r"Parser key \"([\w.]+)\"", message):
        inner = not f"{part}.".startswith(f"{name}.") and name
        name = f"{name}.{part}" if inner else part
    unknown = re.search(r"Option '(\w+)' is not accepted", message)
    unknown = unknown and f"{name}.{unknown[1]}"
    if not name:
        found = re.search(r"does not accept option '([\w.]+)'", message)
        unknown = found and found[1]
    if not name and not unknown:
        return message
    nested = re.search(r"NestedArg\(key='.*?', val='?(.*?)'?\)", message)
    value = re.search(r"(?:Got|Given) value: ([^\n]*)", message)
    value = value or re.search(r"Unable to load config '(.*)'", message)
    value = nested or value
    value = value[1] if value else ""
    received = f"Received: --{unknown or name} {value}".rstrip()
    if unknown:
        group, _, name = unknown.rpartition(".")
        hint = nearest(name, kinds_of(_kind_of(group, actions)))
        return f"`{group}` has no such setting. {received}.{hint}"
    kind = _kind_of(name, actions)
    if dataclasses.is_dataclass(kind):
        names = list(kinds_of(kind))
        return (
            f"`{name}` is a group of settings, to be set one by one, such as "
            f"--{name}.{names[0]}. {received}. It has {', '.join(names)}."
        )
    parts = [x for x in _parts_of(kind) if x is not types.NoneType]
    hint = nearest(value, [x for x in parts if isinstance(x, str)])
    kinds = "|".join(dict.fromkeys(map(_words, parts)))
    return f"`{name}` must be {kinds}. {received}.{hint}"


def nearest_flag(flag, actions):
    """The flag that was meant by an unknown one, as a hint, in its group."""
    known = [x for action in actions for x in action.option_strings]
    known += [f"--moe.{name}" for name in kinds_of(MoEConfig)]
    group, dot, _ = flag.rpartition(".")
    inside = [x for x in known if x.startswith(f"{group}.")] if dot else []
    if not inside:
        return nearest(flag, known)
    start = len(group) + 1
    hint = nearest(flag[start:], [x[start:] for x in inside])
    return hint.replace("'", f"'{group}.", 1)


def _kind_of(name, actions):
    """The type of a setting of runs, or of a flag, by its dotted name."""
    kind = TrainConfig
    for part in name.split("."):
        kinds = kinds_of(kind) if dataclasses.is_dataclass(kind) else {}
        if part not in kinds:
            flags = {x.dest: getattr(x, "_typehint", str) for x in actions}
            return flags.get(name, str)
        kind = kinds[part]
    return kind


def _words(kind):
    """A type in words; a word of a literal is its own."""
    if kind is bool:
        return "true or false"
    if typing.get_origin(kind) in (list, tuple):
        return f"a list of {_words(typing.get_args(kind)[0])}"
    if typing.get_origin(kind) is dict:
        return f"a mapping to {_words(typing.get_args(kind)[1])}"
    return METAVARS.get(kind, str(kind))


def _parts_of(kind):
    """A type, or those that it is a union of, and the words of literals."""
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return parts
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return [x for part in parts for x in _parts_of(part)]
    return [kind]
