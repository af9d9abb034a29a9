"""The parser of `keras-vmoe`, derived from typed functions."""

import argparse
import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Sequence
from typing import Literal

import docstring_parser
import jsonargparse

from keras_vmoe._checks import check_keys
from keras_vmoe._checks import nearest
from keras_vmoe.cli.wording import explained
from keras_vmoe.cli.wording import nearest_flag
from keras_vmoe.cli.wording import values_of
from keras_vmoe.training import ModelConfig
from keras_vmoe.training import TrainConfig
from keras_vmoe.training import recipes
from keras_vmoe.training.config import GROUPS
from keras_vmoe.training.config import VIT_SIZES
from keras_vmoe.training.typed import convert
from keras_vmoe.training.typed import kinds_of
from keras_vmoe.training.typed import merge
from keras_vmoe.training.typed import read_yaml
from keras_vmoe.version import __version__

BACKEND = Literal["jax", "tensorflow", "torch"] | None
FILES = {
    "--config": "YAML file of settings; flags override it.",
    "--recipe": "Recipe to start from; see keras-vmoe --help.",
}


def parse(commands, arguments):
    """The name of a command, a dict of its arguments, and the Keras backend.

    Args:
        commands: Dict from names to functions. Their parameters become flags,
            with help from the docstring, or positional arguments if they have
            no default; a `TrainConfig` stands for its attributes.
        arguments: Command line without the program's name.
    """
    names = ", ".join(recipes.names())
    names = textwrap.fill(f"recipes: {names}", 78, subsequent_indent="  ")
    parser = _Parser(
        prog="keras-vmoe",
        usage="keras-vmoe COMMAND [options]",
        description="Sparse Mixture-of-Experts for vision.",
        epilog=names,
        version=__version__,
    )
    subcommands = parser.add_subcommands(required=True, prog="keras-vmoe")
    for name, function in commands.items():
        parser.commands[name] = command = _command(name, function)
        brief = command.description.partition("\n")[0]
        subcommands.add_subcommand(name, command, help=brief)
        if arguments[:1] == [name]:
            arguments = [name, *_read_files(command, function, arguments[1:])]
    settings = parser.instantiate(parser.parse_args(arguments))
    name = settings.subcommand
    return name, *_by_parameter(commands[name], settings[name])


class _Parser(jsonargparse.ArgumentParser):
    """Accepts flags without their group, and with dashes.

    jsonargparse gives each derived flag only one name.
    """

    def __init__(self, usage=argparse.SUPPRESS, **kwargs):
        self.commands = {}
        super().__init__(
            usage=usage, formatter_class=_Layout, allow_abbrev=False, **kwargs
        )

    def add_argument(self, *names, **kwargs):
        flags = [name for name in names if name.startswith("--")]
        for flag in flags:
            group, _, rest = flag.removeprefix("--").partition(".")
            if group in GROUPS and rest not in ("", "name", "help"):
                flags = [flag, f"--{rest}"]
        flags += [name.replace("_", "-") for name in flags]
        names = dict.fromkeys((*names, *flags))
        action = super().add_argument(*names, **kwargs)
        is_bool = kwargs.get("type") in (bool, bool | None)
        if is_bool and "nargs" not in kwargs:
            action.nargs, action.const = "?", True
        return action

    def error(self, message, ex=None):
        if not self.exit_on_error:  # Of a group: part of another message.
            return super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        command = re.search(r"are required: (\w+)\.", message)
        if command:
            message = message.replace(f"{command[1]}.", "")
            return self.commands[command[1]].error(message, ex)
        command = re.search(r"invalid choice: '(.*?)' ", message)
        if command:
            message += f".{nearest(command[1], self.commands)}"
        flag = re.search(r"unrecognized arguments: (--[^\s=]+)", message)
        if flag:
            message += f".{nearest_flag(flag[1], parser._actions)}"
        return super().error(explained(message, parser._actions), ex)


class _Layout(
    argparse.RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter
):
    """A line for each setting: its shortest name, meaning and default."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=36, width=80)

    def _get_help_string(self, action):
        text, default = action.help or "", action.default
        values = values_of(getattr(action, "_typehint", str))
        if len(values) > _WIDEST:  # They do not fit after the name.
            text = f"{text.rstrip('.')}: {values.replace('|', ', ')}"
        is_plain = isinstance(default, str | int | float) and default != ""
        is_plain &= default is not False and action.nargs != 0
        if action.option_strings and is_plain:
            return text + " [%(default)s]"
        return text

    def _format_action_invocation(self, action):
        if not action.option_strings:
            return super()._format_action_invocation(action)
        if action.nargs == 0:
            names = action.option_strings
            return ", ".join(x for x in names if "-" not in x.lstrip("-"))
        values = values_of(getattr(action, "_typehint", str))
        values = values if len(values) <= _WIDEST else "NAME"
        if action.nargs in ("*", "+"):
            values = f"{values or 'true|false'} ..."
        return f"{min(action.option_strings, key=len)} {values}".rstrip()


_WIDEST = 17


class _SizesHelp(argparse.Action):
    """Prints the sizes of a ViT, which the help of `train` leaves out."""

    def __call__(self, parser, *_):
        sizes = _Parser()
        sizes.add_class_arguments(ModelConfig)
        for action in sizes._actions:
            if action.dest not in VIT_SIZES:
                action.help = argparse.SUPPRESS
            action.default = VIT_SIZES.get(action.dest)
        sizes.print_help()
        parser.exit()


def _command(name, function):
    """The parser of one command."""
    doc = docstring_parser.parse(inspect.getdoc(function))
    texts = {x.arg_name: x.description for x in doc.params}
    hints = typing.get_type_hints(function)
    examples = textwrap.indent(doc.examples[0].description, "  ")
    command = _Parser(
        description=doc.description, epilog=f"examples:\n{examples}"
    )
    for flag in _files_of(function):
        command.add_argument(flag, help=FILES[flag])
    usage = ["keras-vmoe", name]
    for parameter in inspect.signature(function).parameters.values():
        if hints[parameter.name] is TrainConfig:
            command.add_class_arguments(TrainConfig, as_group=False)
            command.add_argument(
                "--model.help", action=_SizesHelp, nargs=0,
                default=argparse.SUPPRESS,
            )  # fmt: skip
            _hide(command)
            continue
        flag, options = _argument(parameter, hints[parameter.name])
        command.add_argument(flag, help=texts[parameter.name], **options)
        if not flag.startswith("-"):
            usage.append(f"[{flag}]" if options.get("nargs") == "?" else flag)
    if TrainConfig not in hints.values():
        command.add_argument("--backend", type=BACKEND, help="Keras backend.")
    command.usage = " ".join([*usage, "[options]"])
    return command


def _hide(command):
    """Hides options that have their own help."""
    for action in command._actions:
        group, _, rest = action.dest.partition(".")
        is_size = group == "model" and rest in VIT_SIZES
        if action.dest in GROUPS or is_size or rest.endswith("help"):
            action.help = argparse.SUPPRESS


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
    elif typing.get_origin(kind) in (list, Sequence):
        (kind,) = typing.get_args(kind)
        options |= {"type": kind, "nargs": "+"}
        if is_optional and kind is str:  # Given twice, a flag adds up.
            options |= {"action": "extend", "default": []}
    elif is_optional and not is_flag:
        options["nargs"] = "?"
    return f"--{parameter.name}" if is_flag else parameter.name, options


def _files_of(function):
    """The flags that name files of settings for a command."""
    kinds = typing.get_type_hints(function).values()
    return list(FILES) if TrainConfig in kinds else ["--config"]


def _read_files(command, function, arguments):
    """Makes the settings of files the defaults of a command.

    Returns the arguments without the files: flags override them in any order.
    """
    parser = argparse.ArgumentParser(
        prog=command.prog, usage=command.usage, add_help=False,
        allow_abbrev=False,
    )  # fmt: skip
    for flag in _files_of(function):
        parser.add_argument(flag)
    files, arguments = parser.parse_known_args(arguments)
    if "recipe" in files:
        settings = {}
        for file in filter(None, (files.recipe, files.config)):
            settings = merge(settings, recipes.read(file))
        command.set_defaults(_defaults(settings))
    elif files.config is not None:
        settings = read_yaml(files.config)
        known = [action.dest for action in command._actions]
        known = [name for name in known if name not in ("help", "config")]
        check_keys(f"`{command.usage.split()[1]}`", settings, known)
        command.set_defaults(settings)
    return arguments


def _defaults(settings):
    """Settings of files as defaults; those of groups by dotted names."""
    defaults = {}
    for name, value in settings.items():
        value = convert(kinds_of(TrainConfig)[name], value, name)
        if dataclasses.is_dataclass(value):
            value = dataclasses.asdict(value)
        if name in GROUPS:
            defaults |= {f"{name}.{key}": x for key, x in value.items()}
        else:
            defaults[name] = value
    return defaults


def _by_parameter(function, settings):
    """The arguments of a command's function, and the backend."""
    found, hints = {}, typing.get_type_hints(function)
    for name in inspect.signature(function).parameters:
        kind = hints[name]
        if kind is TrainConfig:
            names = [field.name for field in dataclasses.fields(TrainConfig)]
            found[name] = TrainConfig(**{x: settings[x] for x in names})
        else:
            found[name] = settings[name]
    return found, settings.backend
