"""Weights of the reference program (google-research/vmoe) into a `ViTMoE`."""

import os
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_vmoe.checkpoints._torch import TorchArrays
from keras_vmoe.checkpoints.assignment import GATE
from keras_vmoe.checkpoints.assignment import POSITIONS
from keras_vmoe.checkpoints.assignment import assign
from keras_vmoe.checkpoints.assignment import check_model
from keras_vmoe.checkpoints.assignment import fit_head
from keras_vmoe.checkpoints.assignment import fit_positions
from keras_vmoe.checkpoints.assignment import kernel_bias
from keras_vmoe.checkpoints.assignment import known_to
from keras_vmoe.checkpoints.assignment import scale_bias
from keras_vmoe.checkpoints.assignment import with_head
from keras_vmoe.checkpoints.sharded import read_vmoe
from keras_vmoe.layers.gates import LinearGate
from keras_vmoe.layers.soft_router import SoftGate
from keras_vmoe.models.vit import ViTMoE


def load_vmoe(
    model: ViTMoE,
    arrays: str | os.PathLike[str] | Mapping[str, Any],
    grid: int | Sequence[int] | None = None,
) -> ViTMoE:
    """Assigns a checkpoint of the reference program to a model.

    All arrays are checked before the first assignment: a model is loaded
    completely or left unchanged. Learned position embeddings of another
    resolution are resized bilinearly. A head with other classes is newly
    initialized, with a warning; a model without a head takes none.
    `model.preprocessing` then maps pixels to [-1, 1], as the reference program
    does; crop and interpolation stay.

    Args:
        model: A `ViTMoE` of the same architecture; `checkpoints.vmoe_config`
            finds it.
        arrays: Prefix of a sharded checkpoint, see `read_vmoe`, or a dict from
            the reference's names, such as
            `"Encoder/encoderblock_0/LayerNorm_0/scale"`, to arrays.
        grid: `(rows, columns)` of the patches that learned positions were made
            for. None means a square, as in the reference program.

    Returns:
        The model.

    Raises:
        TypeError: If `model` is not a ViTMoE, or `arrays` not a path or dict.
        ValueError: If arrays are missing, unknown or of another shape; the
            message lists them. `CheckpointError` for corrupt files.
        FileNotFoundError: If a file is missing.

    Example:

    >>> load_vmoe(model, "checkpoints/vmoe_b16")  # doctest: +SKIP

    Reference:
        https://github.com/google-research/vmoe, `vmoe/nn/vit_moe.py` for the
        names.
    """
    check_model(model, ViTMoE)
    if isinstance(arrays, (str, os.PathLike)):
        arrays = read_vmoe(arrays)
    if not isinstance(arrays, Mapping):
        raise TypeError(
            "`arrays` must be the prefix of a checkpoint or a dict from the "
            f"reference's names to arrays. Received: arrays={arrays!r}."
        )
    known, options = {"mean": 127.5, "std": 127.5}, {}
    if isinstance(arrays, TorchArrays):
        _check_arguments(model, arrays)
        known |= arrays.preprocessing
        options = {"of_class": arrays.of_class, "interpolation": "bicubic"}
        arrays = with_head(arrays.with_heads(model.num_heads), model)
    preprocessing = known_to(model, known)
    weights = vmoe_weights(model)
    arrays = _joined_gates(fit_head(dict(arrays), model), model)
    if model.position_embedding == "learned" and POSITIONS in arrays:
        arrays[POSITIONS] = fit_positions(
            arrays[POSITIONS], model, grid, **options
        )
    assign(model, weights, arrays)
    model.preprocessing = preprocessing
    return model


def _joined_gates(arrays, model) -> dict:
    """An ensemble's gates `(D, M, E / M)` as `(D, E)`."""
    for name, x in arrays.items():
        if not name.endswith(GATE) or np.ndim(x) != 3:
            continue
        if np.shape(x)[1] != model.ensemble_size:
            raise ValueError(
                "The ensemble must have the members of the checkpoint. "
                f"Received: ensemble_size={model.ensemble_size} for {name} "
                f"{np.shape(x)}. Set ensemble_size={np.shape(x)[1]}."
            )
        arrays[name] = np.reshape(x, (len(x), -1))
    return arrays


def _check_arguments(model, arrays):
    """Raises for SwiGLU, and for an activation other than the training's."""
    arguments = arrays.arguments
    if arrays.is_gated:
        raise ValueError(
            "MLPs must be of two products. Received: those of SwiGLU, such as "
            "DINOv2's giant has, which a ViTMoE has not."
        )
    if model.activation != arguments["activation"]:
        raise ValueError(
            "The model must have the activation of the checkpoint, "
            f"{arguments['activation']!r}. Received: activation="
            f"{model.activation!r}. Build it with "
            "ViTMoE(**checkpoints.vmoe_config(path))."
        )


def vmoe_weights(model):
    """The weights of a `ViTMoE` by the reference's names, in order of use."""
    weights = kernel_bias("embedding", model.get_layer("embedding").projection)
    for i in range(model.num_layers):
        block = f"Encoder/encoderblock_{i}"
        weights |= _encoder_block(block, model, f"block_{i}")
    weights |= scale_bias("Encoder/encoder_norm", model.get_layer("norm"))
    if model.pooling == "token":
        weights["cls"] = model.get_layer("class_token").token
    if model.num_registers:
        weights["registers"] = model.get_layer("registers").registers
    if model.pooling == "map":
        weights |= _map_head(model.get_layer("pooling"))
    if model.position_embedding == "learned":
        weights[POSITIONS] = model.get_layer("positions").embedding
    if model.representation_size is not None:
        weights |= kernel_bias("pre_logits", model.get_layer("pre_logits"))
    if model.num_classes is not None:
        weights |= kernel_bias("head", model.get_layer("head"))
    return weights


def _encoder_block(name, model, block):
    def layer(part):
        return model.get_layer(f"{block}_{part}")

    weights = (
        scale_bias(f"{name}/LayerNorm_0", layer("attention_norm"))
        | _attention(f"{name}/SelfAttention", layer("attention").attention)
        | scale_bias(f"{name}/LayerNorm_1", layer("mlp_norm"))
    )
    if f"{block}_moe" in {x.name for x in model.layers}:
        return weights | _moe(f"{name}/Moe", layer("moe"))
    return weights | _mlp(f"{name}/Mlp", layer("mlp"))


def _moe(name, layer):
    experts = {
        f"{name}/Mlp/Dense_{i}/{kind}": getattr(layer.experts, f"{part}_{kind}")
        for i, part in enumerate(("hidden", "output"))
        for kind in ("kernel", "bias")
    }
    return _router(f"{name}/Router", layer.router) | experts


def _router(name, router):
    gate = router.gate_layer
    if isinstance(gate, SoftGate):
        return {f"{name}/mu": gate.mu, f"{name}/scale": gate.scale}
    if isinstance(gate, LinearGate):
        return {f"{name}/dense/kernel": gate.kernel}
    raise ValueError(
        "The reference has linear and soft gates only. Received: "
        f"{type(router).__name__} with a {type(gate).__name__}. Build the "
        "model with gate='linear'."
    )


def _mlp(name, layer):
    hidden = kernel_bias(f"{name}/Dense_0", layer.hidden_dense)
    return hidden | kernel_bias(f"{name}/Dense_1", layer.output_dense)


def _map_head(layer):
    name = "MapHead"
    return (
        {f"{name}/probe": layer.probe}
        | _attention(f"{name}/MultiHeadDotProductAttention", layer.attention)
        | scale_bias(f"{name}/LayerNorm", layer.norm)
        | _mlp(f"{name}/Mlp", layer.mlp)
    )


def _attention(name, layer):
    weights = (
        kernel_bias(f"{name}/query", layer.query_dense)
        | kernel_bias(f"{name}/key", layer.key_dense)
        | kernel_bias(f"{name}/value", layer.value_dense)
        | kernel_bias(f"{name}/out", layer.output_dense)
    )
    if layer.qk_norm:
        weights[f"{name}/query_ln/scale"] = layer.query_norm.gamma
        weights[f"{name}/key_ln/scale"] = layer.key_norm.gamma
    return weights
