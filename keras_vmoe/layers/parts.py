"""The state of sublayers whose own configs are not saved.

Keras keeps in a layer's own config whether it is trained, quantized or adapted
by LoRA. Here, a layer that makes its parts in `build`, or a model made from its
arguments, keeps this state for its parts.
"""

import gc
from typing import Self

import keras

from keras_vmoe._keras import parts_of
from keras_vmoe._typing import Config

UNCALIBRATED = ("int8", "int4", "float8")


def hand_down(layer):
    """Freezes the parts that a frozen layer made in its `build`."""
    if not layer.trainable:
        layer.trainable = True  # TensorFlow skips a value that is already set.
        layer.trainable = False


class KeepsParts:
    """Mixin of layers whose config holds the state of their parts.

    A layer that makes parts in `build` ends it with `set_up_parts`. One that
    makes or takes them in `__init__` ends that with `hand_down`, and `build`
    with `restore_parts`: parts thawed in between stay thawed.
    """

    parts_to_set = None  # States that wait until the parts are made.

    def set_up_parts(self) -> None:
        """Freezes, quantizes and adapts the parts as before."""
        hand_down(self)
        self.restore_parts()

    def restore_parts(self) -> None:
        """Does the same for parts that `__init__` has frozen."""
        set_state_of_parts(self, self.parts_to_set or {})
        self.parts_to_set = None

    def get_config(self) -> Config:
        found = self.parts_to_set or state_of_parts(self)
        config = super().get_config()  # type: ignore[misc]  # The layer's.
        return {**config, **({"parts": found} if found else {})}

    @classmethod
    def from_config(cls, config: Config) -> Self:
        config = dict(config)
        found = config.pop("parts", None)
        layer = super().from_config(config)  # type: ignore[misc]  # Its.
        layer.parts_to_set = found
        thaw(layer, found or {})
        return layer


def state_of_parts(layer):
    """Returns how the layers inside differ from their state when made.

    Args:
        layer: A layer or model.

    Returns:
        Dict from paths (of names) to states: `{"block_1_moe/router":
        {"trainable": False}, "head": {"quantized": "int8"}}`.
    """
    states = {
        path: _state_of(part, owner) for path, part, owner in _paths(layer)
    }
    return {path: state for path, state in states.items() if state}


def set_state_of_parts(layer, found):
    """Restores the states that `state_of_parts` found, for existing parts."""
    parts = thaw(layer, found)
    alike = {}
    for part, state in parts:
        if "quantized" in state and part.quantization_mode is None:
            config = state["quantized"]
            alike.setdefault(str(config), (config, []))[1].append(part)
    for config, same in alike.values():
        _quantize(layer, same, keras.saving.deserialize_keras_object(config))
    # Last: LoRA freezes a kernel, and `trainable` would thaw it.
    for part, state in parts:
        if "lora" in state and part.lora_rank is None:
            part.enable_lora(*state["lora"])


def thaw(layer, found):
    """Sets which parts are trained; returns the parts found, with states."""
    parts = [
        (part, found[path]) for path, part, _ in _paths(layer) if path in found
    ]
    for part, state in parts:
        part.trainable = state.get("trainable", part.trainable)
    return parts


def _paths(layer, start=""):
    """Yields path, part and owner of all layers inside, outer ones first."""
    for part in parts_of(layer):
        path = f"{start}{part.name}"
        yield path, part, layer
        yield from _paths(part, f"{path}/")


def _state_of(part, owner):
    state = {}
    if part.trainable != owner.trainable:
        state["trainable"] = part.trainable
    mode = part.quantization_mode
    if mode is not None:
        if mode not in UNCALIBRATED:
            raise ValueError(
                "Inside a layer or model of keras_vmoe, layers are saved "
                f"quantized to one of {UNCALIBRATED}. Received: {part.path!r}, "
                f"quantized to {mode!r}. Use one of these."
            )
        config = getattr(part, "quantization_config", None)
        state["quantized"] = keras.saving.serialize_keras_object(config or mode)
    if getattr(part, "lora_enabled", False):
        state["lora"] = [part.lora_rank, part.lora_alpha]
    return state


def _quantize(layer, parts, config):
    """Quantizes parts of a layer, all with the same config or mode."""
    mode = config if isinstance(config, str) else config.mode
    # Types were checked when the parts were first quantized.
    options = {"config": config, "type_check": False}
    # Keras collects garbage for each kernel that it replaces, which takes 0.2 s
    # each time if all objects are examined.
    gc.freeze()
    try:
        if isinstance(layer, keras.Model):
            # PyTorch then forgets the old parameters in all layers.
            chosen = {id(part) for part in parts}
            options["filters"] = lambda x: id(x) in chosen
            layer.quantize(mode, **options)
            return
        for part in parts:
            part.quantize(mode, **options)
    finally:
        gc.unfreeze()
