"""Recipes: settings of runs as YAML files, including those of the papers.

A recipe is a file such as those in this folder, or the `config.yaml` of a run:
settings of a `TrainConfig` in groups. The names of groups may be left out
(`learning_rate` is `optimizer.learning_rate`), as in files of version 0.1.0,
and `recipe: NAME` bases a file on another.
"""

import dataclasses
import pathlib

from keras_vmoe._checks import nearest
from keras_vmoe._extras import require
from keras_vmoe.models.moe import of_version_0_1
from keras_vmoe.training.config import GROUPS
from keras_vmoe.training.config import TrainConfig
from keras_vmoe.training.typed import from_dict
from keras_vmoe.training.typed import kinds_of

FOLDER = pathlib.Path(__file__).parent
# The group of each setting whose name is unique.
GROUP_OF = {
    field.name: group
    for group in GROUPS
    for field in dataclasses.fields(kinds_of(TrainConfig)[group])
    if field.name != "name"
}
# Names of version 0.1.0.
RENAMED = {
    "drop_path": "drop_path_rate",
    "layer_scale": "layer_scale_init_value",
}


def names():
    """Names of the recipes in the package.

    Example:

    >>> [name for name in names() if name.endswith("small")]
    ['cifar10_small', 'digits_small']
    """
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read(source):
    """The settings of a recipe, including those of the recipe it is based on.

    Args:
        source: Name of a recipe, or path of a YAML file.

    Returns:
        Dict of `TrainConfig`'s attributes, groups as dicts; only what is set.

    Raises:
        ValueError: If there is no such recipe, or it has an unknown key; the
            message has the nearest.

    Example:

    >>> read("sweet_spot_vit_in1k")["optimizer"]["name"]
    'lamb'
    """
    path = pathlib.Path(source)
    if str(source) in names():
        path = FOLDER / f"{source}.yaml"
    elif not path.is_file():
        raise ValueError(
            f"The recipe must be a YAML file or one of {names()}. "
            f"Received: {source}.{nearest(source, names())}"
        )
    settings = read_yaml(path)
    base = settings.pop("recipe", None)
    settings = _grouped(settings, path)
    return settings if base is None else merge(read(base), settings)


def load(source, **settings):
    """A recipe as a `TrainConfig`.

    Args:
        source: Name of a recipe, or path of a YAML file.
        **settings: Attributes that override the recipe's; for groups, dicts
            with some of theirs.

    Returns:
        A `TrainConfig`.

    Raises:
        ValueError: If there is no such recipe or setting, or the recipe is for
            models of another family.

    Example:

    >>> config = load("sweet_spot_vit_in1k", model={"preset": "vit_s16"})
    >>> config.optimizer.name, config.drop_path_rate
    ('lamb', 0.1)
    """
    return from_dict(TrainConfig, merge(read(source), settings), str(source))


def merge(below, above):
    """Nested settings, overridden by others."""
    merged = {**below, **above}
    for name in below.keys() & above.keys():
        if isinstance(below[name], dict) and isinstance(above[name], dict):
            merged[name] = merge(below[name], above[name])
    return merged


def read_yaml(path):
    """The mapping in a YAML file, a dict."""
    path = pathlib.Path(path)
    jsonargparse = require("jsonargparse", "cli")
    yaml = require("yaml", "cli")
    try:
        # Not PyYAML's loader, which reads 1e-3 as a string.
        settings = jsonargparse.get_loader("yaml")(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(
            f"A recipe must be a YAML file. Received: {path} ({error})."
        ) from error
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        raise ValueError(
            "A recipe must be a mapping of names to values. "
            f"Received: {path}, which holds {settings!r}."
        )
    return settings


def _grouped(settings, path):
    """Settings in their groups, under their current names."""
    known = kinds_of(TrainConfig)
    # Run folders of version 0.1.0 have all settings, without groups.
    is_old = isinstance(settings.get("optimizer"), str)
    grouped = {}
    for name, value in settings.items():
        if name in known:
            value = _renamed(name, value, is_old)
        elif name in GROUP_OF:
            name, value = GROUP_OF[name], {name: value}
        else:
            raise ValueError(
                f"A recipe holds settings of `keras-vmoe train`. Received: "
                f"{path}, with {name}={value!r}."
                f"{nearest(name, [*known, *GROUP_OF])}"
            )
        grouped = merge(grouped, {name: value})
    return grouped


def _renamed(group, value, is_old):
    """A group of version 0.1.0 under its current names."""
    if group == "optimizer" and isinstance(value, str):
        return {"name": value}
    if group == "moe" and is_old and isinstance(value, dict):
        return of_version_0_1(value)
    if group in ("model", "convnext") and isinstance(value, dict):
        return {RENAMED.get(name, name): x for name, x in value.items()}
    return value
