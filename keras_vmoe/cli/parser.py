"""The parser of `keras-vmoe`, derived from typed functions."""

import argparse
import dataclasses
import inspect
import textwrap
import types
import typing
from typing import Literal

import docstring_parser
import jsonargparse

from keras_vmoe._checks import check_keys
from keras_vmoe.training import TrainConfig
from keras_vmoe.training import recipes
from keras_vmoe.training.config import GROUPS
from keras_vmoe.training.typed import from_dict
from keras_vmoe.training.typed import kinds_of
from keras_vmoe.version import __version__

BACKEND = Literal["jax", "tensorflow", "torch"] | None
FILES = {
    "--config": "YAML file of settings; flags count more.",
    "--recipe": "Recipe to start from, see below.",
}


def parse(commands, arguments):
    """The command that is asked for, and its settings.

    Args:
        commands: Dict from names to functions. Their parameters, by types and
            docstring, are flags with help, and positional without a default; a
            `TrainConfig` stands for its attributes.
        arguments: Command line without the program's name.

    Returns:
        Name of the command, dict of its arguments, and the Keras backend or
        None.

    Raises:
        SystemExit: After help, or the message of a wrong command line.
        ValueError: If a file or a setting is wrong.
    """
    parser = _Parser(
        prog="keras-vmoe",
        description="Sparse Mixture-of-Experts for vision.",
        version=__version__,
    )
    subcommands = parser.add_subcommands(required=True)
    for name, function in commands.items():
        command = _command(name, function)
        subcommands.add_subcommand(name, command, help=command.description)
        if arguments[:1] == [name]:
            arguments = [name, *_read_files(command, function, arguments[1:])]
    settings = parser.instantiate(parser.parse_args(arguments))
    name = settings.subcommand
    return name, *_by_parameter(commands[name], settings[name])


class _Parser(jsonargparse.ArgumentParser):
    def __init__(self, **kwargs):
        super().__init__(formatter_class=_Layout, allow_abbrev=False, **kwargs)


class _Layout(
    argparse.RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter
):
    """A line for each setting: its shortest name, what it is, its default."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=33)

    def _get_help_string(self, action):
        text, default = action.help or "", action.default
        is_plain = isinstance(default, str | int | float) and default != ""
        if action.option_strings and is_plain and action.nargs != 0:
            return text + " [%(default)s]"
        return text

    def _format_action_invocation(self, action):
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        kind = getattr(action, "_typehint", str)  # Of jsonargparse's own.
        words = [x for x in _parts_of(kind) if isinstance(x, str)]
        metavars = [_METAVARS[x] for x in _parts_of(kind) if x in _METAVARS]
        value = "|".join(words) or (*metavars, "YAML")[0]
        name = min(action.option_strings, key=len)
        return name if kind is bool else f"{name} {value}"


def _parts_of(kind):
    """A type, or those that it is a union of, and the words of literals."""
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return parts
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return [x for part in parts for x in _parts_of(part)]
    return [kind]


_METAVARS = {int: "INT", float: "FLOAT", str: "TEXT"}


def _command(name, function):
    """The parser of one command."""
    doc = docstring_parser.parse(inspect.getdoc(function))
    texts = {x.arg_name: x.description for x in doc.params}
    hints = typing.get_type_hints(function)
    command = _Parser(
        description=doc.short_description, epilog=_epilog(function, doc)
    )
    for flag in _files_of(function):
        command.add_argument(flag, help=FILES[flag])
    usage = ["keras-vmoe", name]
    for parameter in inspect.signature(function).parameters.values():
        if hints[parameter.name] is TrainConfig:
            command.add_class_arguments(TrainConfig)
            continue
        flag, options = _argument(parameter, hints[parameter.name])
        command.add_argument(flag, help=texts[parameter.name], **options)
        if not flag.startswith("-"):
            usage.append(f"[{flag}]" if options.get("nargs") == "?" else flag)
    if TrainConfig not in hints.values():
        text = "Keras backend; null leaves the choice to Keras."
        command.add_argument("--backend", type=BACKEND, help=text)
    command.usage = " ".join([*usage, "[options]"])
    _add_names(command)
    return command


def _argument(parameter, kind):
    """Name and options of the argument that a parameter is.

    Keyword-only parameters are flags, true or false ones without a value.
    """
    is_flag = parameter.kind is parameter.KEYWORD_ONLY
    is_optional = parameter.default is not parameter.empty
    options = {"type": kind}
    if is_optional:
        options["default"] = parameter.default
    if kind is bool:
        options = {"action": "store_true"}
    elif kind == list[str]:
        options |= {"type": str, "nargs": "*" if is_optional else "+"}
        if is_optional:  # A flag that is given twice adds to the first.
            options |= {"action": "extend", "default": []}
    elif is_optional and not is_flag:
        options["nargs"] = "?"
    return f"--{parameter.name}" if is_flag else parameter.name, options


def _epilog(function, doc):
    """Examples of a command, and what it can be based on."""
    parts = [doc.long_description]
    for example in doc.examples:
        parts.append("examples:\n" + textwrap.indent(example.description, "  "))
    if "--recipe" in _files_of(function):
        names = f"recipes: {', '.join(recipes.names())}"
        parts.append(textwrap.fill(names, 78, subsequent_indent="  "))
    return "\n\n".join(filter(None, parts))


def _add_names(command):
    """Other names of flags: without their group, and with dashes.

    jsonargparse takes several names of an argument, but gives those that it
    derives only one; hence argparse's own lists.
    """
    names = command._option_string_actions
    for action in list(command._actions):
        group, _, rest = action.dest.partition(".")
        if group in GROUPS and not rest:
            action.help = argparse.SUPPRESS  # A file for each group.
        if any(name.endswith(".help") for name in action.option_strings):
            action.help = argparse.SUPPRESS
        if group in GROUPS and rest not in ("", "name"):
            for name in list(action.option_strings):
                brief = name.replace(f"--{group}.", "--", 1)
                action.option_strings.append(brief)
                names[brief] = action
        if _kind_of(group, rest) is bool:
            action.nargs, action.const = "?", True
        for name in action.option_strings:
            names[name.replace("_", "-")] = action


def _kind_of(group, rest):
    """The type of a setting of `TrainConfig`; None if it is none."""
    kind = kinds_of(TrainConfig).get(group)
    return kinds_of(kind).get(rest) if rest and group in GROUPS else kind


def _files_of(function):
    """The flags that name files of settings for a command."""
    kinds = typing.get_type_hints(function).values()
    return list(FILES) if TrainConfig in kinds else ["--config"]


def _read_files(command, function, arguments):
    """Makes the settings of files the defaults of a command.

    Returns:
        The arguments without the files: flags count more, in any order.
    """
    parser = argparse.ArgumentParser(
        prog=command.prog, usage=command.usage, add_help=False,
        allow_abbrev=False,
    )  # fmt: skip
    for flag in _files_of(function):
        parser.add_argument(flag)
    files, arguments = parser.parse_known_args(arguments)
    if len(vars(files)) == 1 and files.config is not None:
        settings = recipes.read_yaml(files.config)
        known = [action.dest for action in command._actions]
        check_keys(f"`{command.usage.split()[1]}`", settings, known)
        command.set_defaults(settings)
    elif len(vars(files)) > 1:
        settings = {}
        for file in (files.recipe, files.config):
            if file is not None:
                settings = recipes.merge(settings, recipes.read(file))
        command.set_defaults(_dotted(settings))
    return arguments


def _dotted(settings):
    """Settings of files as defaults: groups whole and by dotted names."""
    defaults = {}
    for name, value in settings.items():
        kind = kinds_of(TrainConfig)[name]
        if name in GROUPS:
            group = from_dict(kind, value, f"`{name}`")
            defaults |= {
                f"{name}.{field.name}": _plain(getattr(group, field.name))
                for field in dataclasses.fields(group)
            }
        elif dataclasses.is_dataclass(kind) and value is not None:
            make = getattr(kind, "from_dict", None)
            made = make(value) if make else from_dict(kind, value, f"`{name}`")
            defaults[name] = _plain(made)
        else:
            defaults[name] = value
    return defaults


def _plain(value):
    """A dataclass as a dict."""
    is_settings = dataclasses.is_dataclass(value)
    return dataclasses.asdict(value) if is_settings else value


def _by_parameter(function, settings):
    """The arguments of a command's function, and the backend."""
    found = {}
    for name, kind in typing.get_type_hints(function).items():
        if kind is TrainConfig:
            names = [field.name for field in dataclasses.fields(TrainConfig)]
            found[name] = TrainConfig(**{x: settings[x] for x in names})
        else:
            found[name] = settings[name]
    return found, settings.backend
