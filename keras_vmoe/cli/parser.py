"""What the command `keras-vmoe` takes."""

import argparse
import dataclasses
import pathlib

from keras_vmoe import training
from keras_vmoe._extras import require
from keras_vmoe.cli.options import add_backend
from keras_vmoe.cli.options import add_classes
from keras_vmoe.cli.options import add_config
from keras_vmoe.cli.options import add_dry_run
from keras_vmoe.cli.tools_parser import convert_parser
from keras_vmoe.cli.tools_parser import export_parser
from keras_vmoe.cli.tools_parser import presets_parser
from keras_vmoe.version import __version__

TRAIN_EPILOG = """The MoE layers have settings of their own, such as
--moe.num_experts. For a list: keras-vmoe train --moe.help

examples:
  keras-vmoe train --run_dir runs/digits
  keras-vmoe train --run_dir runs/dense --moe null
  keras-vmoe train --run_dir runs/big --moe.num_experts 16 --epochs 100
  keras-vmoe train --config runs/digits/config.yaml --run_dir runs/again
"""
PREDICT_EPILOG = """examples:
  keras-vmoe predict runs/digits seven.png three.png
  keras-vmoe predict model.keras *.jpg --classes names.json --top 5
"""
EVALUATE_EPILOG = """examples:
  keras-vmoe evaluate runs/digits digits
  keras-vmoe evaluate model.keras cifar10 --split 'test[:50%]' --data_dir DIR
"""


# Settings that are true or false: given bare, they are true.
SWITCHES = tuple(
    f"--{field.name}"
    for field in dataclasses.fields(training.TrainConfig)
    if field.type is bool
)
BOOLEANS = ("true", "false", "yes", "no")


def normalized(arguments):
    """The command line as the parser takes it.

    Args:
        arguments: List of strings: flags may have dashes for underscores, and
            switches no value.

    Returns:
        List of strings, `--config` first: what is given by flags counts more
        than what is in the file, in any order.

    Example:

    >>> normalized(["train", "--skip-corrupt", "--config", "x.yaml"])
    ['train', '--config', 'x.yaml', '--skip_corrupt=true']
    """
    arguments = [_with_underscores(argument) for argument in arguments]
    following = arguments[1:] + [""]
    arguments = [
        f"{argument}=true"
        if argument in SWITCHES and value.lower() not in BOOLEANS
        else argument
        for argument, value in zip(arguments, following, strict=False)
    ]
    for i, argument in enumerate(arguments):
        if argument.partition("=")[0] == "--config":
            end = i + (1 if "=" in argument else 2)
            rest = arguments[1:i] + arguments[end:]
            return arguments[:1] + arguments[i:end] + rest
    return arguments


def _with_underscores(argument):
    """`--dry-run` as `--dry_run`."""
    name, equals, value = argument.partition("=")
    if name.startswith("--") and " " not in name:
        name = "--" + name[2:].replace("-", "_")
    return name + equals + value


def recipe_of(arguments):
    """Settings of the recipe that the command line names, if any."""
    if "train" not in arguments:
        return {}
    file, path = {}, _value_of(arguments, "--config")
    if path is not None and pathlib.Path(path).is_file():
        file = require("yaml", "cli").safe_load(pathlib.Path(path).read_text())
        file = file if isinstance(file, dict) else {}
    name, preset = (
        _value_of(arguments, f"--{key}") or file.get(key)
        for key in ("recipe", "preset")
    )
    if name is None:
        return {}
    return training.recipes.find_recipe(name).settings(preset)


def _value_of(arguments, flag):
    """What follows a flag on the command line; None without it."""
    for i, argument in enumerate(arguments):
        if argument == flag and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(f"{flag}="):
            return argument.partition("=")[2]
    return None


def make_parser(jsonargparse, recipe):
    """Makes the parser of the whole command.

    Args:
        jsonargparse: The module.
        recipe: Settings that are the defaults of `train`; see `recipe_of`.

    Returns:
        A `jsonargparse.ArgumentParser`.
    """

    # Keeps the lines of the examples apart; subcommands inherit it.
    class layout(  # noqa: N801
        argparse.RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter
    ):
        pass

    parser = jsonargparse.ArgumentParser(
        prog="keras-vmoe",
        description="Sparse Mixture-of-Experts for vision.",
        version=__version__,
        formatter_class=layout,
        allow_abbrev=False,
    )
    commands = parser.add_subcommands(required=True)
    for name, make, text in (
        ("train", _train_parser, "Train a model."),
        ("evaluate", _evaluate_parser, "Measure a model on a dataset."),
        ("predict", _predict_parser, "Classify images."),
        ("export", export_parser, "Write a model for servers or devices."),
        ("convert", convert_parser, "Read other weights."),
        ("presets", presets_parser, "List the papers' models."),
    ):
        command = make(jsonargparse)
        if name == "train":
            command.set_defaults(_dotted(recipe))
        commands.add_subcommand(name, command, help=text)
    return parser


def _dotted(settings, prefix=""):
    """Nested settings and dataclasses by dotted names."""
    dotted = {}
    for name, value in settings.items():
        if dataclasses.is_dataclass(value):
            value = dataclasses.asdict(value)
        if isinstance(value, dict):
            dotted |= _dotted(value, f"{prefix}{name}.")
        else:
            dotted[prefix + name] = value
    return dotted


def _train_parser(jsonargparse):
    parser = jsonargparse.ArgumentParser(
        usage="keras-vmoe train [options]",
        description="Trains a ViTMoE on a TFDS dataset; writes a run folder.",
        epilog=TRAIN_EPILOG,
        allow_abbrev=False,
    )
    add_config(parser)
    parser.add_class_arguments(training.TrainConfig)
    parser.add_argument(
        "--recipe",
        type=str | None,
        default=None,
        help="Name of a recipe whose settings are the defaults of all others: "
        + ", ".join(training.recipes.RECIPES),
    )
    for name, kind, text in (
        ("job_addresses", str, "host:port of the first of several processes."),
        ("num_processes", int, "How many processes train together."),
        ("process_id", int, "Which of them this one is, from 0."),
    ):
        parser.add_argument(
            f"--{name}",
            type=kind | None,
            default=None,
            help=f"{text} Default: KERAS_DISTRIBUTION_{name.upper()}.",
        )
    add_dry_run(parser)
    return parser


def _evaluate_parser(jsonargparse):
    parser = jsonargparse.ArgumentParser(
        usage="keras-vmoe evaluate [options] model dataset",
        description="Accuracy, loss, a table of the classes and what the "
        "routers do, on one split of a TFDS dataset. Prints, and writes no "
        "logs.",
        epilog=EVALUATE_EPILOG,
        allow_abbrev=False,
    )
    add_config(parser)
    parser.add_argument("model", type=str, help="Run folder or .keras file.")
    parser.add_argument("dataset", type=str, help='TFDS dataset or "digits".')
    parser.add_argument("--split", type=str, default="test", help="TFDS split.")
    parser.add_argument(
        "--data_dir", type=str | None, default=None, help="Folder of datasets."
    )
    parser.add_argument(
        "--batch_size", type=int, default=64, help="Images at a time."
    )
    parser.add_argument(
        "--test_crop",
        type=float | None,
        default=None,
        help="Share of the shorter side that the centre crop keeps; default: "
        "that of the run folder.",
    )
    parser.add_argument(
        "--skip_corrupt",
        type=bool,
        default=False,
        help="Skip images that cannot be decoded, with a warning.",
    )
    add_classes(parser)
    add_backend(parser)
    add_dry_run(parser)
    return parser


def _predict_parser(jsonargparse):
    parser = jsonargparse.ArgumentParser(
        usage="keras-vmoe predict [options] model image [image ...]",
        description="Prints the most probable classes of image files.",
        epilog=PREDICT_EPILOG,
        allow_abbrev=False,
    )
    add_config(parser)
    parser.add_argument("model", type=str, help="Run folder or .keras file.")
    parser.add_argument(
        "images",
        type=str,
        nargs="+",
        help="PNG, JPEG, BMP or GIF files that look like the training images "
        "(the embedded digits are white on black).",
    )
    add_classes(parser)
    parser.add_argument(
        "--top", type=int, default=3, help="Classes to print for each image."
    )
    add_backend(parser)
    add_dry_run(parser)
    return parser
