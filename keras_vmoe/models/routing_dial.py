"""Adaptive compute: the same weights under other routing settings."""

import dataclasses
import warnings

import keras

from keras_vmoe import layers
from keras_vmoe.models.moe import MoEConfig

WHOLE_BATCH = "batch"
DROPLESS = "dropless"


def set_routing(
    model,
    capacity_factor=None,
    num_selected_experts=None,
    batch_priority=None,
    images_per_group=None,
):
    """Makes a model with the same weights and other routing settings.

    This is V-MoE's dial at test time: fewer places and Batch Prioritized
    Routing save compute, more experts per token cost some. Settings left at
    None stay as they are.

    The new model shares the weights of the given one, so that it needs no
    memory of its own and follows further training; `keras.Model.save` writes
    it as a whole. Its MoE layers are new; the layers between them are those of
    the given model, so that the `output` of such a layer belongs to the given
    model's graph: take features of that one. The new model compiles its own
    functions. It is compiled as the given model is, with a new optimizer.

    Args:
        model: A `ViTMoE` or any functional Keras model with `MoEMLP` layers,
            nested ones included.
        capacity_factor: Room of the experts relative to an even load, or
            "dropless".
        num_selected_experts: K.
        batch_priority: Whether confident tokens are served first.
        images_per_group: Images that are routed together, or "batch" for one
            group per batch.

    Returns:
        A model of the same class; nested models become functional ones.

    Raises:
        ValueError: If nothing is to be set, the model has no MoE layers, or a
            setting does not fit their routers.

    Example:

    >>> model.evaluate(images, labels)  # doctest: +SKIP
    >>> fast = set_routing(model, capacity_factor=0.5, batch_priority=True)
    ...  # doctest: +SKIP
    >>> fast.evaluate(images, labels)  # doctest: +SKIP

    Reference:
        [Riquelme et al., 2021](https://arxiv.org/abs/2106.05974), section 4.
    """
    router = {
        "capacity_factor": capacity_factor,
        "num_selected_experts": num_selected_experts,
        "batch_priority": batch_priority,
    }
    router = {k: v for k, v in router.items() if v is not None}
    if not router and images_per_group is None:
        raise ValueError(
            "At least one routing setting must be given. Received: none. "
            "Set for example `capacity_factor=0.5`."
        )
    if router.get("capacity_factor") == DROPLESS:
        router["capacity_factor"] = None
    if not isinstance(model, keras.Model) or not hasattr(model, "operations"):
        raise ValueError(
            "`model` must be a functional Keras model, whose layers can be "
            f"replaced. Received: model={model!r}. Build it from "
            "`keras.Input`, or set the routers' arguments."
        )
    changed = []

    def change(layer):
        if isinstance(layer, layers.MoEMLP):
            layer = _with_routing(layer, router, images_per_group)
            changed.append(layer)
        return layer

    clone = keras.models.clone_model(
        model, clone_function=change, recursive=True
    )
    if not changed:
        raise ValueError(
            "The model must have MoE layers. Received: model="
            f"{model.name!r} without any. A dense model has nothing to route."
        )
    if isinstance(getattr(model, "moe", None), MoEConfig):
        clone = model.with_graph(clone.inputs, clone.output)
        clone.moe = _changed_config(model.moe, router, images_per_group)
    if model.compiled:
        _compile_alike(clone, model)
    return clone


def _compile_alike(clone, model):
    try:
        clone.compile_from_config(model.get_compile_config())
    except (TypeError, ValueError) as error:
        warnings.warn(
            "The new model is not compiled: loss or metrics of the given one "
            f"cannot be serialized ({error}). Call its `compile`, or register "
            "them by keras.saving.register_keras_serializable.",
            stacklevel=3,
        )


def _with_routing(layer, settings, images_per_group):
    """A MoE layer with another router around the same weights."""
    router = _changed_router(layer.router, settings, layer.name)
    config = {**layer.get_config(), "router": router}
    if images_per_group is not None:
        if router.images_per_group is not None:
            raise ValueError(
                f"The {type(router).__name__} of {layer.name!r} routes each "
                "image alone. Received: images_per_group="
                f"{images_per_group!r}. Leave it out."
            )
        config["images_per_group"] = _images(images_per_group)
    new = type(layer).from_config(config)
    _share_parts(router, layer.router)
    if isinstance(router.gate, keras.layers.Layer):
        router.gate = router.gate_layer
    _share_parts(new, layer)
    new.build(layer.get_build_config()["input_shape"])
    return new


def _changed_router(router, settings, layer):
    config = router.get_config()
    if _is_dropless(settings) and "batch_priority" in config:
        settings = {"batch_priority": False, **settings}  # Nobody has to wait.
    for name, value in settings.items():
        if name not in config or isinstance(router, layers.SoftRouter):
            raise ValueError(
                f"The {type(router).__name__} of {layer!r} has no such dial. "
                f"Received: {name}={value!r}. Leave it out."
            )
    return type(router).from_config({**config, **settings})


def _share_parts(new, old):
    """Gives a layer the sublayers of another, and so their weights."""
    for name in old.parts:
        if isinstance(getattr(new, name), keras.layers.Layer):
            new._tracker.untrack(getattr(new, name))
        setattr(new, name, getattr(old, name))


def _changed_config(moe, settings, images_per_group):
    if images_per_group is not None:
        images = _images(images_per_group)
        moe = dataclasses.replace(moe, images_per_group=images)
    if not isinstance(moe.router, keras.layers.Layer):
        if _is_dropless(settings):
            settings = {"batch_priority": None, **settings}
        return dataclasses.replace(moe, **settings)
    router = _changed_router(moe.router, settings, "moe")
    return dataclasses.replace(moe, router=router)


def _is_dropless(settings):
    return settings.get("capacity_factor", "unset") is None


def _images(images_per_group):
    return None if images_per_group == WHOLE_BATCH else images_per_group
