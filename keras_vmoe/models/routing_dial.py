"""Adaptive compute: the same weights under other routing settings."""

import dataclasses
from typing import Any
from typing import Literal

import keras

from keras_vmoe import layers
from keras_vmoe._checks import check_keys
from keras_vmoe._checks import plain
from keras_vmoe._keras import all_layers
from keras_vmoe._warnings import warn
from keras_vmoe.models.cloning import clone_around
from keras_vmoe.models.cloning import is_graph


def set_routing(
    model: keras.Model,
    capacity_factor: float | Literal["dropless"] | None = None,
    num_selected_experts: int | None = None,
    batch_priority: bool | None = None,
    images_per_group: int | Literal["batch"] | None = None,
    **others: Any,
) -> keras.Model:
    """Makes a model with the same weights and other routing settings.

    This is V-MoE's dial at test time: fewer slots and Batch Prioritized
    Routing save compute, more experts per token cost some. None leaves a
    setting unchanged.

    The new model shares the given model's weights: it needs no extra memory and
    follows further training; `keras.Model.save` writes it as a whole. Both
    consist of the same gates, experts and dense layers: freezing them in one
    model freezes them in the other. The new model is compiled like the given
    one, with a new optimizer.

    Args:
        model: A `ViTMoE` or any functional or sequential Keras model with
            `MoEMLP` layers, nested ones included.
        capacity_factor: Capacity of the experts relative to an even load, or
            "dropless".
        num_selected_experts: K.
        batch_priority: Whether confident tokens are served first.
        images_per_group: Images that are routed together, or "batch" for all.

    Returns:
        A model of the same class.

    Raises:
        ValueError: If no setting is given, the model has no MoE layers or
            hides them inside other layers, or a setting does not fit their
            routers.

    Example:

    >>> model.evaluate(images, labels)  # doctest: +SKIP
    >>> fast = set_routing(model, capacity_factor=0.5, batch_priority=True)
    ...  # doctest: +SKIP
    >>> fast.evaluate(images, labels)  # doctest: +SKIP

    Reference:
        [Riquelme et al., 2021](https://arxiv.org/abs/2106.05974), section 4.
    """
    settings = {
        "capacity_factor": capacity_factor,
        "num_selected_experts": num_selected_experts,
        "batch_priority": batch_priority,
        "images_per_group": images_per_group,
    }
    check_keys("`set_routing`", others, settings)
    settings = {k: plain(v) for k, v in settings.items() if v is not None}
    _check(model, settings)
    clone = clone_around(
        model,
        lambda layer: _with_routing(layer, **settings),
        lambda moe: _changed_config(moe, **settings),
    )
    if model.compiled:
        _compile_alike(clone, model)
    return clone


def _check(model, settings):
    """Raises unless a setting is given and the model can take it."""
    if not settings:
        raise ValueError(
            "At least one routing setting must be given. Received: none (None "
            "leaves a setting as it is). Set for example `capacity_factor=0.5`."
        )
    factor = settings.get("capacity_factor")
    if isinstance(factor, str) and factor != "dropless":
        raise ValueError(
            "`capacity_factor` must be a number above 0 or 'dropless'. "
            f"Received: capacity_factor={factor!r}."
        )
    if not is_graph(model) or not model.built:
        raise ValueError(
            "`model` must be a built functional or sequential Keras model, "
            f"whose layers can be replaced. Received: model={model!r}. Build "
            "it from `keras.Input`, or set the routers' arguments."
        )
    if not any(isinstance(x, layers.MoEMLP) for x in all_layers(model)):
        raise ValueError(
            "The model must have MoE layers. Received: model="
            f"{model.name!r} without any. A dense model has nothing to route."
        )


def _compile_alike(clone, model):
    try:
        clone.compile_from_config(model.get_compile_config())
    except (TypeError, ValueError) as error:
        warn(
            "The new model is not compiled: the loss or metrics of the given "
            f"one cannot be serialized ({error}). Call its `compile`, or "
            "register them with keras.saving.register_keras_serializable."
        )


def _with_routing(layer, images_per_group=None, **settings):
    """Returns a MoE layer with another router and the same weights."""
    router, changes = layer.router, {}
    if settings:
        changes["router"] = router.sharing(
            **_settings_for(router, settings, layer.name)
        )
    if images_per_group is not None:
        if router.images_per_group is not None:
            raise ValueError(
                f"The {type(router).__name__} of {layer.name!r} routes each "
                "image alone. Received: images_per_group="
                f"{images_per_group!r}. Leave it out."
            )
        changes["images_per_group"] = images_per_group
    return layer.sharing(**changes)


def _settings_for(router, settings, layer):
    """The settings, if the router has them all.

    Dropless settings come without priority: no token has to wait.
    """
    config = router.get_config()
    for name, value in settings.items():
        if name not in config or isinstance(router, layers.SoftRouter):
            raise ValueError(
                f"The {type(router).__name__} of {layer!r} lacks this setting. "
                f"Received: {name}={value!r}. Leave it out."
            )
    if _is_dropless(settings) and "batch_priority" in config:
        return {"batch_priority": False, **settings}
    return settings


def _changed_config(moe, images_per_group=None, **settings):
    """The model's `MoEConfig` with other settings."""
    if images_per_group is not None:
        moe = dataclasses.replace(moe, images_per_group=images_per_group)
    if isinstance(moe.router, keras.layers.Layer):
        settings = _settings_for(moe.router, settings, "moe")
        config = {**moe.router.get_config(), **settings}
        settings = {"router": type(moe.router).from_config(config)}
    elif _is_dropless(settings):
        settings = {"batch_priority": None, **settings}
    return dataclasses.replace(moe, **settings)


def _is_dropless(settings):
    return settings.get("capacity_factor") == "dropless"
