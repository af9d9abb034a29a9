"""Adapting a model: feature maps, a new head, other image sizes."""

import itertools
import re
from collections.abc import Sequence
from typing import Any
from typing import Literal

import keras

from keras_vmoe._checks import is_integer
from keras_vmoe._checks import nearest
from keras_vmoe.layers.patches import patch_grid
from keras_vmoe.layers.positions import LearnedPositions
from keras_vmoe.layers.positions import resize_positions
from keras_vmoe.models.base import MoEModel


def features(
    model: MoEModel, layers: str | int | Sequence[str | int] | None = None
) -> keras.Model:
    """Returns a model that also outputs feature maps.

    The new model, for detection or segmentation, shares the given model's
    weights. The maps leave out a ViT's class token.

    Args:
        model: A `ViTMoE`, `ConvNeXtMoE` or `SwinMoE`.
        layers: One or several names of blocks (`"block_3"`, or 3, or -1 for
            the last) and, except in a ViT, stages (`"stage_0"`, the output of
            its last block). None means all blocks of a ViT, and all stages of
            other models.

    Returns:
        A `keras.Model` from images to a dict: `"output"`, the model's output,
        and for each name a map `(B, H, W, D)`, where H and W count rows and
        columns of patches.

    Raises:
        TypeError: If `model` is another Keras model.
        ValueError: If a block or stage does not exist.

    Example:

    >>> model = ConvNeXtMoE((1, 2), (8, 16), num_classes=10, image_size=32)
    >>> for name, x in features(model, ["stage_0", -1]).output.items():
    ...     print(name, x.shape)
    stage_0 (None, 8, 8, 8)
    block_2 (None, 4, 4, 16)
    output (None, 10)
    """
    _check(model)
    ends = _ends(model)
    if layers is None:
        stages = [name for name in ends if name.startswith("stage")]
        layers = stages or list(ends)
    wanted: Any = layers
    if isinstance(wanted, str) or is_integer(wanted):
        wanted = [wanted]
    names = [_name_of(x, ends) for x in wanted]
    outputs = {name: _map_of(model, ends[name]) for name in names}
    return keras.Model(model.input, {**outputs, "output": model.output})


def with_head(model: MoEModel, num_classes: int | None) -> MoEModel:
    """Returns a copy of a model with a new head, for other classes.

    Args:
        model: A `ViTMoE`, `ConvNeXtMoE` or `SwinMoE`.
        num_classes: Classes; None leaves the head out, and the copy returns
            features `(B, D)`.

    Returns:
        A model with its own weights, copied except for the head.

    Raises:
        TypeError: If `model` is another Keras model.
        ValueError: If `num_classes` is not an integer of at least 1.

    Example:

    >>> model = ConvNeXtMoE((1,), (8,), num_classes=10, image_size=32)
    >>> with_head(model, 3).output_shape
    (None, 3)
    """
    return _copy(model, num_classes=num_classes)


def with_image_size(
    model: MoEModel,
    image_size: int | Sequence[int] | None,
    interpolation: Literal["bilinear", "bicubic"] = "bilinear",
) -> MoEModel:
    """Returns a copy of a model for images of another size.

    Learned positions are resized; see `checkpoints.resize_positions`. With a
    `capacity_factor` the experts' buffers fit the new number of tokens.

    Args:
        model: A `ViTMoE`, `ConvNeXtMoE` or `SwinMoE`.
        image_size: Side of the images in pixels, or `(height, width)`; for a
            ConvNeXt also None, for any size.
        interpolation: For learned positions: `"bilinear"`, or `"bicubic"` as
            in timm.

    Returns:
        A model with its own weights.

    Raises:
        TypeError: If `model` is another Keras model.
        ValueError: If the images do not divide into whole patches.

    Example:

    >>> model = ConvNeXtMoE((1,), (8,), num_classes=10, image_size=32)
    >>> with_image_size(model, (32, 64)).input_shape
    (None, 32, 64, 3)
    """
    _check(model)
    return _copy(model, interpolation, **model.for_images(image_size))


def _copy(model, interpolation="bilinear", **changes):
    """Returns a model with other arguments and the same weights."""
    _check(model)
    config = {**model.get_config(), **changes}
    if "num_classes" in changes:  # A new head is trained.
        config["parts"] = {
            k: x for k, x in config["parts"].items() if k != "head"
        }
    made = type(model).from_config(config)
    for layer in made.layers:
        is_new = layer.name == "head" and "num_classes" in changes
        if is_new or not layer.weights:
            continue
        weights = model.get_layer(layer.name).get_weights()
        if isinstance(layer, LearnedPositions):
            extra = int(model.pooling == "token")
            grids = _grid_of(model), _grid_of(made)
            weights = [
                resize_positions(weights[0], *grids, extra, interpolation)
            ]
        layer.set_weights(weights)
    return made


def _check(model):
    if not isinstance(model, MoEModel):
        raise TypeError(
            "`model` must be a ViTMoE, a ConvNeXtMoE or a SwinMoE. Received: "
            f"model={model!r} of type {type(model).__name__} (a clone is a "
            "plain model)."
        )


def _ends(model):
    """Maps blocks and stages to the names of their last layers."""
    ends = {}
    for layer in model.layers:
        match = re.fullmatch(r"(block_\d+)(_\w+)?_add", layer.name)
        if match:  # The last one of a block counts.
            ends[match[1]] = layer.name
    if hasattr(model, "depths"):
        depths = model.depths  # Perhaps a number if isotropic.
        depths = depths if isinstance(depths, (list, tuple)) else [depths]
        for stage, end in enumerate(itertools.accumulate(depths)):
            ends[f"stage_{stage}"] = ends[f"block_{end - 1}"]
    return ends


def _name_of(layer, ends):
    """The name of a block or stage."""
    if is_integer(layer):
        count = sum(name.startswith("block") for name in ends)
        layer = f"block_{layer % count if -count <= layer < count else layer}"
    if layer not in ends:
        raise ValueError(
            f"`layers` must be among {[*ends]}. "
            f"Received: {layer!r}.{nearest(layer, ends)}"
        )
    return layer


def _map_of(model, name):
    """The output of a layer as `(B, H, W, D)`."""
    x = model.get_layer(name).output
    if len(x.shape) == 4:
        return x
    rows, columns = _grid_of(model)
    x = x[:, x.shape[1] - rows * columns :]
    return keras.layers.Reshape((rows, columns, x.shape[-1]))(x)


def _grid_of(model):
    """`(rows, columns)` of the patches of a ViT."""
    return patch_grid(model.input_shape[1:3], model.patch_size)
