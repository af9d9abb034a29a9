"""Recipes: settings of runs as YAML files, including those of the papers.

A recipe is a file such as those in this folder, or the `config.yaml` of a run.
It holds settings of a `TrainConfig` in groups. Group names may be left out
(`learning_rate` is `optimizer.learning_rate`), as in files of version 0.1.0.
`recipe: NAME` bases a file on another.
"""

import dataclasses
import os
import pathlib
from typing import Any

from keras_vmoe._checks import nearest
from keras_vmoe.models.base import RENAMED
from keras_vmoe.models.moe import of_version_0_1
from keras_vmoe.training.config import GROUPS
from keras_vmoe.training.config import TrainConfig
from keras_vmoe.training.typed import from_dict
from keras_vmoe.training.typed import kinds_of
from keras_vmoe.training.typed import merge
from keras_vmoe.training.typed import read_yaml

__all__ = ["load", "names", "read"]

FOLDER = pathlib.Path(__file__).parent
# The group of each setting whose name is unique.
GROUP_OF = {
    field.name: group
    for group in GROUPS
    for field in dataclasses.fields(kinds_of(TrainConfig)[group])
    if field.name != "name"
}


def names() -> list[str]:
    """Returns the names of the recipes in the package.

    Example:

    >>> [name for name in names() if name.endswith("small")]
    ['cifar10_small', 'digits_small']
    """
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read(source: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the settings of a recipe, including those of the recipe it extends.

    Args:
        source: Name of a recipe, or path of a YAML file.

    Returns:
        Dict of `TrainConfig`'s attributes that are set, with groups as dicts.

    Raises:
        ValueError: If the recipe does not exist, or has an unknown key. The
            message has the nearest name.

    Example:

    >>> read("sweet_spot_vit_in1k")["optimizer"]["name"]
    'lamb'
    """
    return _read(source, ())


def _read(source, above):
    """Reads the settings of a recipe that the recipes `above` it extend."""
    path = pathlib.Path(source)
    if str(source) in names():
        path = FOLDER / f"{source}.yaml"
    elif not path.is_file():
        if path.suffix or len(path.parts) > 1:
            raise ValueError(
                "A settings file must be an existing YAML file. "
                f"Received: {source}. `keras-vmoe --help` names the recipes."
            )
        raise ValueError(
            f"The recipe must be a YAML file or one of {names()}. "
            f"Received: {source}.{nearest(source, names())}"
        )
    if path.resolve() in above:
        raise ValueError(
            "A recipe must not be based on itself. Received: "
            f"recipe={str(source)!r}, which leads back to {path}. Leave "
            "`recipe` out of one of the files."
        )
    settings = read_yaml(path)
    base = settings.pop("recipe", None)
    if not isinstance(base, str | None):
        raise ValueError(
            "`recipe` must be the name of a recipe or the path of a YAML file. "
            f"Received: recipe={base!r} in {path}."
        )
    settings = _grouped(settings, path)
    if base is None:
        return settings
    return merge(_read(base, (*above, path.resolve())), settings)


def load(source: str | os.PathLike[str], **settings: Any) -> TrainConfig:
    """Loads a recipe as a `TrainConfig`.

    Args:
        source: Name of a recipe, or path of a YAML file.
        **settings: Attributes that override the recipe's. A group is a dict
            of some of its attributes.

    Returns:
        A `TrainConfig`.

    Raises:
        ValueError: If the recipe or a setting does not exist, or the recipe is
            for models of another family.

    Example:

    >>> config = load("sweet_spot_vit_in1k", model={"preset": "vit_s16"})
    >>> config.optimizer.name, config.drop_path_rate
    ('lamb', 0.1)
    """
    return from_dict(TrainConfig, merge(read(source), settings), str(source))


def _grouped(settings, path):
    """Sorts settings into their groups, under their current names."""
    known = kinds_of(TrainConfig)
    if _is_old(settings, path):
        settings = {name: _renamed(name, x) for name, x in settings.items()}
        if settings.get("preset") is not None:  # The sizes were not used.
            for name in ("model", "convnext", "moe"):
                settings.pop(name, None)
    grouped = {}
    for name, value in settings.items():
        if name == "optimizer" and isinstance(value, str):
            value = {"name": value}
        if name in GROUPS and not isinstance(value, dict):
            raise ValueError(
                f"`{name}` must be a mapping of names to values. Received: "
                f"{name}={value!r} in {path}. Leave it out for the defaults."
            )
        if name in GROUP_OF:
            name, value = GROUP_OF[name], {name: value}
        elif name not in known:
            raise ValueError(
                f"A recipe holds settings of `keras-vmoe train`. Received: "
                f"{path}, with {name}={value!r}."
                f"{nearest(name, [*known, *GROUP_OF])}"
            )
        grouped = merge(grouped, {name: value})
    return grouped


def _is_old(settings, path):
    """Whether a file is from version 0.1.0, by names that only it has.

    Its only group was `model`, whose name is still in use. If a file could be
    from either version, a null that each would read differently is an error.
    """
    parts = {x: y for x, y in settings.items() if isinstance(y, dict)}
    if parts.keys() & (set(GROUPS) - {"model"}):
        return False
    if parts.get("moe", {}).get("capacity_factor") == "auto":
        return True
    if any(RENAMED.keys() & parts.get(x, {}).keys() for x in OLD_PARTS):
        return True
    for name, word in (
        ("capacity_factor", "dropless"),
        ("images_per_group", "batch"),
    ):
        if parts.get("moe", {}).get(name, word) is None:
            raise ValueError(
                f"A file without groups must not set `moe.{name}` to null, "
                f"which was {word!r} in version 0.1.0 and is the default "
                f"today. Received: moe.{name}=None in {path}. Write {word!r}, "
                "or leave it out."
            )
    return False


OLD_PARTS = ("model", "convnext")


def _renamed(name, value):
    """A setting of version 0.1.0 under its current name."""
    if name == "moe" and isinstance(value, dict):
        return of_version_0_1(value)
    if name in OLD_PARTS and isinstance(value, dict):
        return {RENAMED.get(key, key): x for key, x in value.items()}
    return value
