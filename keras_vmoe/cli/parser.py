"""The parser of `keras-vmoe`, derived from typed functions."""

import argparse
import dataclasses
import functools
import inspect
import re
import textwrap
import types
import typing
from typing import Any
from typing import Literal

import docstring_parser

from keras_vmoe._checks import check_keys
from keras_vmoe._checks import nearest
from keras_vmoe.training import ModelConfig
from keras_vmoe.training import TrainConfig
from keras_vmoe.training import recipes
from keras_vmoe.training import typed
from keras_vmoe.training.config import GROUPS
from keras_vmoe.training.config import VIT_SIZES
from keras_vmoe.version import __version__

BACKEND = Literal["jax", "tensorflow", "torch"] | None
FILES = {
    "config": "YAML file of settings; flags override it.",
    "recipe": "Recipe to start from; see keras-vmoe --help.",
}


def parse(commands, arguments):
    """The name of a command, a dict of its arguments, and the Keras backend.

    Args:
        commands: Dict from names to functions. Their parameters become flags,
            with help from the docstring, or positional arguments if they are
            no keywords; a `TrainConfig` stands for its attributes.
        arguments: Command line without the program's name.
    """
    name = _program(commands).parse_args(arguments[:1]).command
    function = commands[name]
    kinds = typing.get_type_hints(function)
    parser = _command(name, function, kinds)
    given = vars(parser.parse_intermixed_args(arguments[1:]))
    files = [given.pop(x) for x in ("recipe", "config") if x in given]
    if TrainConfig in kinds.values():
        config = _config(files, given)
        given = {x: y for x, y in given.items() if x in kinds}
        given |= {x: config for x in kinds if kinds[x] is TrainConfig}
        return name, given, config.backend
    kinds["backend"] = BACKEND
    for file in files:
        settings = recipes.read_yaml(file)
        check_keys(f"`{name}`", settings, kinds)
        found = {x: _fit(kinds[x], y, x) for x, y in settings.items()}
        given = {**found, **given}
    needed = inspect.signature(function).parameters.values()
    missing = [x.name for x in needed if x.default is x.empty]
    missing = [x for x in missing if x not in given]
    if missing:
        words = ", ".join(missing)
        parser.error(f"the following arguments are required: {words}")
    return name, given, given.pop("backend", None)


def _config(files, given):
    """The `TrainConfig` of some files, overridden by what is given."""
    settings, default = {}, dataclasses.asdict(TrainConfig())
    for file in files:
        settings = recipes.merge(settings, recipes.read(file))
    for name, value in given.items():
        if name.partition(".")[0] in default:
            settings = _put(settings, name, value, default)
    return typed.from_dict(TrainConfig, settings, "`keras-vmoe train`")


def _put(settings, name, value, default):
    """Settings with one more, by its dotted name.

    What it is a part of starts at its default.
    """
    first, _, rest = name.partition(".")
    if rest:
        default = default[first] or {}
        inner = settings.get(first, default) or {}
        value = _put(inner, rest, value, default)
    return {**settings, first: value}


def _fit(kind, value, name):
    """A value of a file as a parameter of this type."""
    try:
        return typed.fit(kind, value)
    except TypeError:
        raise ValueError(
            f"`{name}` must be {_values(kind)}. Received: {name}={value!r}."
        ) from None


def _parsed(kind, text):
    """A value of the command line, as one of this type."""
    parts = _parts_of(kind)
    if str in parts:
        return None if text == "null" and types.NoneType in parts else text
    try:
        return typed.fit(kind, recipes.parse_yaml(text))
    except (TypeError, ValueError):
        words = [x for x in parts if isinstance(x, str)]
        raise argparse.ArgumentTypeError(
            f"must be {_values(kind)}. Received: {text}.{nearest(text, words)}"
        ) from None


class _Parser(argparse.ArgumentParser):
    """Knows nothing of defaults, and hints at the nearest flag."""

    def __init__(self, **options):
        self.flags = []
        super().__init__(
            formatter_class=functools.partial(
                argparse.RawDescriptionHelpFormatter,
                max_help_position=36,
                width=80,
            ),
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
            **options,
        )

    def error(self, message):
        flag = re.search(r"unrecognized arguments: .*?(--[^\s=]+)", message)
        if flag:
            message += f".{nearest(flag[1], self.flags)}"
        super().error(f"{message}\nFor the options run: {self.prog} --help")


class _Help(argparse.Action):
    """Prints settings that the help of `train` leaves out."""

    def __call__(self, parser, *_):
        shown = _Parser(usage=argparse.SUPPRESS, add_help=False)
        for setting in self.const:
            _add(shown, shown, *setting)
        shown.print_help()
        parser.exit()


def _program(commands):
    """The parser of the name of a command."""
    briefs = [
        f"  {name:<10}{inspect.getdoc(function).partition(chr(10))[0]}"
        for name, function in commands.items()
    ]
    names = ", ".join(recipes.names())
    names = textwrap.fill(f"recipes: {names}", 78, subsequent_indent="  ")
    parser = _Parser(
        prog="keras-vmoe",
        usage="keras-vmoe COMMAND [options]",
        description="Sparse Mixture-of-Experts for vision.",
        epilog="\n".join(["commands:", *briefs, "", names]),
    )
    words = f"keras-vmoe {__version__}"
    parser.add_argument("--version", action="version", version=words)
    parser.add_argument(
        "command",
        metavar="COMMAND",
        type=functools.partial(_parsed, Literal[*commands]),
        help="What to do; `keras-vmoe COMMAND --help` says more.",
    )
    return parser


def _command(name, function, kinds):
    """The parser of the arguments of a command."""
    doc = docstring_parser.parse(inspect.getdoc(function))
    texts = {x.arg_name: x.description for x in doc.params}
    examples = textwrap.indent(doc.examples[0].description, "  ")
    trains = TrainConfig in kinds.values()
    parameters = inspect.signature(function).parameters.values()
    flags = [x for x in parameters if x.kind is x.KEYWORD_ONLY]
    places = [x for x in parameters if x not in flags]
    places = [x for x in places if kinds[x.name] is not TrainConfig]
    words = [x.name if x.default is x.empty else f"[{x.name}]" for x in places]
    parser = _Parser(
        prog=f"keras-vmoe {name}",
        usage=" ".join(["keras-vmoe", name, *words, "[options]"]),
        description=doc.description,
        epilog=f"examples:\n{examples}",
    )
    for place in places:  # Those that a file has need not be given.
        nargs = "*" if kinds[place.name] == list[str] else "?"
        parser.add_argument(place.name, nargs=nargs, help=texts[place.name])
    for file in FILES if trains else ["config"]:
        _add(parser, parser, file, str, FILES[file])
    if trains:
        _add_run(parser)
    for flag in flags:
        kind = kinds[flag.name]
        kind = None if kind is bool else kind  # It has no value.
        _add(parser, parser, flag.name, kind, texts[flag.name], flag.default)
    if not trains:
        _add(parser, parser, "backend", BACKEND, "Keras backend.")
    return parser


def _add_run(parser):
    """Adds the settings of a `TrainConfig`, in their groups."""
    kinds = typed.kinds_of(TrainConfig)
    for name, kind, text, default in _settings(TrainConfig):
        if name not in GROUPS:
            _add(parser, parser, name, kind, text, default)
            continue
        section = parser.add_argument_group(text.rstrip("."))
        for setting in _settings(kinds[name], f"{name}."):
            is_size = name == "model" and setting[0][6:] in VIT_SIZES
            _add(parser, section, *setting, is_hidden=is_size)
    sizes = [
        (*setting[:3], VIT_SIZES[setting[0][6:]])
        for setting in _settings(ModelConfig, "model.")
        if setting[0][6:] in VIT_SIZES
    ]
    _add_help(parser, "--model.help", sizes)


def _settings(cls, prefix=""):
    """Name, type, meaning and default of each attribute of a dataclass."""
    texts = docstring_parser.parse(inspect.getdoc(cls)).params
    texts = {x.arg_name: x.description for x in texts}
    kinds = typing.get_type_hints(cls)
    return [
        (prefix + x.name, kinds[x.name], texts[x.name], x.default)
        for x in dataclasses.fields(cls)
    ]


def _add(parser, section, name, kind, text, default=None, is_hidden=False):
    """Adds a flag: shown by its shortest name, and known by others.

    Those have the name of its group, and dashes.
    """
    group, _, rest = name.partition(".")
    names = [f"--{name}"]
    if group in GROUPS and rest != "name":
        names.insert(0, f"--{rest}")
    parser.flags += names
    if kind is None:
        options = {"action": "store_true"}
    elif kind == list[str]:  # Given twice, it adds to the first.
        options = {"action": "extend", "nargs": "*", "metavar": "TEXT"}
    else:
        options = {"type": functools.partial(_parsed, kind)}
        options["metavar"] = values = _values(kind)
        if len(values) > 17:  # They do not fit after the name.
            options["metavar"] = "NAME"
            text = f"{text.rstrip('.')}: {values.replace('|', ', ')}"
        if {*_parts_of(kind)} <= {bool, types.NoneType}:
            options |= {"nargs": "?", "const": True}
    is_plain = isinstance(default, str | int | float) and default != ""
    if is_plain and default is not False:
        text += f" [{default}]"
    text = argparse.SUPPRESS if is_hidden else text.replace("%", "%%")
    section.add_argument(names[0], dest=name, help=text, **options)
    more = [x.replace("_", "-") for x in names if "_" in x] + names[1:]
    if more:
        parser.add_argument(*more, dest=name, help=argparse.SUPPRESS, **options)
    for part in filter(dataclasses.is_dataclass, _parts_of(kind)):
        inner = _settings(part, f"{name}.")
        for setting in inner:
            _add(parser, parser, *setting, is_hidden=True)
        _add_help(parser, f"{names[0]}.help", inner)


def _add_help(parser, flag, settings):
    parser.flags.append(flag)
    parser.add_argument(
        flag, action=_Help, nargs=0, const=settings, help=argparse.SUPPRESS
    )


def _values(kind):
    """What may be given for a setting, such as `FLOAT|dropless`."""
    return "|".join(filter(None, map(_word, _parts_of(kind))))


def _word(part):
    if isinstance(part, str):
        return part
    if typing.get_origin(part) in (list, tuple):
        return f"[{_values(typing.get_args(part)[0])},...]"
    if typing.get_origin(part) is dict or dataclasses.is_dataclass(part):
        return "{...}"
    return _WORDS[part]


_WORDS = {int: "INT", float: "FLOAT", str: "TEXT", bool: "true|false"}
_WORDS |= {types.NoneType: "", Any: "YAML"}


def _parts_of(kind):
    """A type, or those that it is a union of, and the words of literals."""
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return parts
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return [x for part in parts for x in _parts_of(part)]
    return [kind]
