"""Which blocks of a model hold a MoE layer."""

import itertools
import re
from collections.abc import Sequence

import keras

from keras_vmoe._checks import counted
from keras_vmoe._checks import is_integer
from keras_vmoe._checks import nearest
from keras_vmoe._keras import all_layers
from keras_vmoe.layers import MoEMLP


def moe_blocks(
    layers: str | Sequence[int], num_layers: int, more_names: str = ""
) -> tuple[int, ...]:
    """Resolves a placement to block indices.

    V-MoE counts over odd blocks: `every_2` is blocks 1, 3, 5, ..., and
    `last_n` is the last n of these.

    Args:
        layers: `"every_<n>"` (blocks n - 1, 2n - 1, ...), `"last_<n>"`, or a
            sequence of block indices.
        num_layers: Blocks of the model.
        more_names: More names that the caller accepts, for the message.

    Returns:
        Tuple of increasing block indices.

    Raises:
        ValueError: If the name is unknown, if an index is out of range or
            repeated, or if the model has too few blocks.

    Example:

    >>> moe_blocks("every_2", 6), moe_blocks("last_2", 6), moe_blocks([4], 6)
    ((1, 3, 5), (3, 5), (4,))

    Reference:
        [Riquelme et al., 2021](https://arxiv.org/abs/2106.05974), section 2.2
        and the configurations of its code.
    """
    if isinstance(layers, str):
        return _named(layers, num_layers, more_names)
    layers = layers.tolist() if hasattr(layers, "tolist") else layers
    if not _are_blocks(layers, num_layers):
        raise ValueError(
            "Block indices must be a list of different integers from 0 to "
            f"{num_layers - 1}, at least one. Received: layers={layers!r}. "
            "A name such as 'last_1' works as well."
        )
    return tuple(sorted(layers))


def stage_blocks(
    layers: str | Sequence[int], depths: Sequence[int]
) -> tuple[int, ...]:
    """Resolves a placement in a model of several stages to block indices.

    Blocks are counted from 0 through all stages. `moe_blocks` resolves a model
    of one stage, except for `"stage"`.

    Args:
        layers: `"stage"` (the last block of each stage), `"last_1"`, `"last_2"`
            (of the last one or two stages), `"last_3"` (these two and the
            middle block of the penultimate stage, `depth // 2`), or a placement
            for `moe_blocks`.
        depths: Blocks of each stage.

    Returns:
        Tuple of increasing block indices.

    Raises:
        ValueError: As `moe_blocks`.

    Example:

    >>> stage_blocks("last_3", [3, 3, 9, 3]), stage_blocks("last_2", [18])
    ((10, 14, 17), (15, 17))

    Reference:
        [Videau et al., 2024](https://arxiv.org/abs/2411.18322).
    """
    ends = list(itertools.accumulate(depths))
    last = tuple(end - 1 for end in ends)
    if layers == "stage":
        return last
    is_last = isinstance(layers, str) and layers.startswith("last_")
    if len(depths) == 1 or not is_last:
        return moe_blocks(layers, ends[-1], ", 'stage'")
    middle = ends[-2] - depths[-2] + depths[-2] // 2
    named = {"last_1": last[-1:], "last_2": last[-2:]}
    if depths[-2] > 2:
        named["last_3"] = (middle, *last[-2:])
    if layers not in named:
        raise ValueError(
            f"In {len(depths)} stages the placement must be one of "
            f"{list(named)}, 'stage', 'every_<n>' or a list of block indices; "
            "'last_3' needs three blocks or more in the penultimate stage. "
            f"Received: layers={layers!r} with depths={list(depths)}."
        )
    return named[layers]


def moe_layers(
    model: keras.Model, names: str | Sequence[str] | None = None
) -> list[MoEMLP]:
    """Returns the MoE layers of a functional model, all or by name.

    Args:
        model: A functional model with `MoEMLP` layers of its own.
        names: Their names, or one name; None means all.

    Raises:
        ValueError: If the model has none, or none of a name.
    """
    found = {x.name: x for x in model.layers if isinstance(x, MoEMLP)}
    if not found:
        inner = [
            part.name
            for part in model.layers
            if isinstance(part, keras.Model)
            and any(isinstance(x, MoEMLP) for x in all_layers(part))
        ]
        mend = (
            f"Use the inner model, `model.get_layer({inner[0]!r})`."
            if inner
            else "`models.upcycle` turns MLPs of a dense model into experts."
        )
        raise ValueError(
            "The model must have MoE layers to look at. Received: model="
            f"{model.name!r} without any of its own. {mend}"
        )
    if names is None:
        return list(found.values())
    names = [names] if isinstance(names, str) else list(names)
    for name in names or (None,):
        if name not in found:
            raise ValueError(
                f"`layers` must be MoE layers of the model: {[*found]}. "
                f"Received: {name!r}.{nearest(name, found)}"
            )
    return [layer for name, layer in found.items() if name in names]


def _are_blocks(layers, num_layers):
    """Whether these are different block indices, at least one."""
    if not isinstance(layers, (list, tuple, range)) or not layers:
        return False
    inside = [is_integer(i) and 0 <= i < num_layers for i in layers]
    return all(inside) and len(set(layers)) == len(layers)


def _named(layers, num_layers, more_names):
    match = re.fullmatch(r"(every|last)_([1-9]\d*)", layers)
    if not match:
        raise ValueError(
            "The placement of MoE layers must be 'every_<n>', 'last_<n>' (such "
            f"as 'every_2' or 'last_2'){more_names} or a list of block "
            f"indices. Received: layers={layers!r}."
            f"{nearest(layers, ('last_1', 'last_2', 'every_2', 'stage'))}"
        )
    kind, number = match[1], int(match[2])
    if kind == "every":
        blocks = tuple(range(number - 1, num_layers, number))
    else:
        blocks = tuple(range(1, num_layers, 2))
    if not blocks or (kind == "last" and number > len(blocks)):
        raise ValueError(
            f"A model of {counted(num_layers, 'block')} is too small for this "
            f"many MoE layers. Received: layers={layers!r} (the default is "
            f"'last_2'). 'last_<n>' counts over the {num_layers // 2} odd "
            "blocks; take fewer, a list of block indices, or no experts "
            "(moe=None)."
        )
    return blocks[-number:] if kind == "last" else blocks
