"""Sparse upcycling: a MoE model that starts from a dense one."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_vmoe._checks import check_flags
from keras_vmoe._checks import check_not_negative
from keras_vmoe._keras import all_layers
from keras_vmoe.layers import MoEMLP
from keras_vmoe.models.base import MoEModel
from keras_vmoe.models.moe import MoEConfig


def upcycle(
    model: MoEModel,
    moe: Mapping[str, Any] | MoEConfig,
    noise_std: float = 0.0,
    preserve_outputs: bool = False,
    seed: int = 0,
) -> MoEModel:
    """Makes a MoE model whose experts start as copies of the dense MLPs.

    A model with E experts becomes one with a multiple of E in the same blocks:
    expert e and its gate's weights start as copies of those of expert e mod E.
    With twice the experts and twice the K, it starts with the model's outputs
    if no token is dropped.

    From a dense model all other weights are copied; gates are initialized at
    random, so the model needs further training. It starts with the dense
    model's outputs if the gates of a token sum to 1 (`renormalize=True`, or
    K = E) and no token is dropped. With K = 1 and `renormalize` outputs differ
    only by rounding (2.4e-7 for logits of order 1 in float32), but the gate
    learns from the auxiliary losses alone.

    Frozen layers stay frozen: a bank that starts from a frozen MLP is frozen,
    while its new router is trained.

    Args:
        model: A `ViTMoE`, `ConvNeXtMoE` or `SwinMoE`, dense or with experts.
        moe: The `moe` argument of the new model, which overrides that of
            `model`; experts have the hidden features of their sources.
        noise_std: Standard deviation of noise added to the experts' kernels,
            relative to that of the kernel.
        preserve_outputs: Whether to set `renormalize=True` and
            `capacity_factor="dropless"`, which keeps the dense model's outputs.
        seed: Seed of the noise.

    Returns:
        A new model of the same class, not compiled.

    Raises:
        ValueError: If the model is quantized, if experts differ from their
            source MLPs or experts in hidden features, or are not a multiple of
            them, if nothing would change, or if `preserve_outputs` contradicts
            `moe`.

    Example:

    >>> from keras_vmoe.models import ConvNeXtMoE
    >>> dense = ConvNeXtMoE(depths=[2], dims=[8], num_classes=9, image_size=8)
    >>> sparse = upcycle(dense, dict(layers=[1], num_experts=4))
    >>> [layer.name for layer in sparse.moe_layers]
    ['block_1_moe']

    Reference:
        [Komatsuzaki et al., 2022](https://arxiv.org/abs/2212.05055), section 3.
    """
    check_not_negative(noise_std=noise_std)
    check_flags(preserve_outputs=preserve_outputs)
    _check_source(model)
    moe = _new_config(model, moe, noise_std, preserve_outputs)
    config = model.get_config()
    # The bank of an MLP that is frozen, or trained where the model is not.
    of_mlps = {
        path.replace("_mlp", "_moe/experts"): state
        for path, state in config["parts"].items()
        if path.endswith("_mlp")
    }
    config["parts"] = {**config["parts"], **of_mlps}
    sparse = type(model).from_config({**config, "moe": moe})
    sources = {layer.name: layer for layer in model.layers}
    generator = np.random.default_rng(seed)
    for layer in sparse.layers:
        name = layer.name
        source = sources.get(name, sources.get(name.replace("_moe", "_mlp")))
        if isinstance(layer, MoEMLP):
            _copy_experts(source, layer, noise_std, generator)
        elif source is None:
            raise ValueError(
                "Experts cannot become an MLP again. Received: "
                f"layers={moe.layers!r}, which leaves out the experts of block "
                f"{name.split('_')[1]}. Name its block, too."
            )
        else:
            layer.set_weights(source.get_weights())
    return sparse


def _check_source(model):
    """Raises unless this is a model of ours in floating point."""
    if not isinstance(model, MoEModel):
        raise ValueError(
            "`model` must be a ViTMoE, ConvNeXtMoE or SwinMoE. "
            f"Received: model={model!r}. `keras_vmoe.checkpoints` reads the "
            "weights of other models."
        )
    modes = {x.quantization_mode for x in all_layers(model)} - {None}
    if modes:
        raise ValueError(
            "Experts start from kernels in floating point. Received: "
            f"{model.name!r}, quantized to {sorted(modes)}. Upcycle the model "
            "first, and quantize the result."
        )


def _new_config(model, moe, noise_std, preserve_outputs) -> MoEConfig:
    """The new model's config, which adds to that of `model`."""
    if model.moe is not None and isinstance(moe, Mapping):
        moe = {**model.moe.to_dict(), **moe}
    moe = MoEConfig.from_dict(moe)
    if moe == model.moe and not noise_std:
        raise ValueError(
            "`moe` must add experts or change them. Received: "
            f"num_experts={moe.num_experts}, layers={moe.layers!r} and what "
            "else the model has. Add experts or layers."
        )
    if preserve_outputs and model.moe is not None:
        raise ValueError(
            "`preserve_outputs` is for a dense model. Received: a model with "
            "experts. Twice its `num_experts` and `num_selected_experts` keep "
            "its outputs where nothing is dropped."
        )
    return _preserving(moe, noise_std) if preserve_outputs else moe


def _preserving(moe, noise_std) -> MoEConfig:
    """The config that preserves the outputs of the dense model."""
    wrong = {
        name: getattr(moe, name)
        for name, good in (
            ("router", ("top_k", "bias_balanced")),
            ("capacity_factor", (None, "dropless")),
            ("renormalize", (None, True)),
            ("batch_priority", (None, False)),
            ("shared_hidden_dim", (None,)),
        )
        if getattr(moe, name) not in good
    }
    if noise_std:
        wrong["noise_std"] = noise_std
    if wrong:
        given = ", ".join(f"{key}={value!r}" for key, value in wrong.items())
        raise ValueError(
            "Keeping the outputs of the dense model takes a dropless top-K "
            "router with renormalized gates, no shared expert and no noise on "
            f"the kernels. Received: preserve_outputs=True together with "
            f"{given}. Leave these out, or `preserve_outputs`."
        )
    return dataclasses.replace(
        moe, renormalize=True, capacity_factor="dropless"
    )


def _copy_experts(source, layer, noise_std, generator):
    """Makes every expert a copy, with its own noise."""
    if source.hidden_dim != layer.hidden_dim:
        raise ValueError(
            "Experts must have the hidden features of their source. "
            f"Received: {layer.hidden_dim} for the experts of {layer.name!r} "
            f"and {source.hidden_dim} in {source.name!r}. Leave `hidden_dim` "
            "and `mlp_ratio` out."
        )
    if isinstance(source, MoEMLP):
        _tile(source, layer)
    else:
        for part in ("hidden", "output"):
            for kind in ("kernel", "bias"):
                value = getattr(getattr(source, f"{part}_dense"), kind)
                weight = getattr(layer.experts, f"{part}_{kind}")
                if value is None:
                    continue
                value = keras.ops.convert_to_numpy(value)
                weight.assign(np.broadcast_to(value, weight.shape))
    if noise_std:
        for weight in (
            layer.experts.hidden_kernel,
            layer.experts.output_kernel,
        ):
            value = keras.ops.convert_to_numpy(weight)
            noise = generator.normal(size=value.shape) * value[0].std()
            weight.assign(value + noise_std * noise.astype(value.dtype))


def _tile(source, layer):
    """Copies a MoE layer, its experts and their gates several times."""
    values = source.get_weights()
    shapes = [tuple(weight.shape) for weight in layer.weights]
    fits = len(values) == len(shapes) and all(
        len(value.shape) == len(shape)
        and all(
            new % old == 0 for new, old in zip(shape, value.shape, strict=True)
        )
        for value, shape in zip(values, shapes, strict=True)
    )
    if not fits or type(source.router) is not type(layer.router):
        raise ValueError(
            "Experts must be a multiple of their source's, under the same "
            "router and gate. Received: num_experts="
            f"{layer.num_experts} with a {type(layer.router).__name__} for "
            f"{source.num_experts} with a {type(source.router).__name__}. Take "
            f"{2 * source.num_experts} experts, say, and the source's router."
        )
    for weight, value, shape in zip(layer.weights, values, shapes, strict=True):
        times = [
            new // old for new, old in zip(shape, value.shape, strict=True)
        ]
        weight.assign(np.tile(value, times))
