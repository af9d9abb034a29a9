"""Sparse upcycling: a MoE model that starts from a dense one."""

import dataclasses

import keras
import numpy as np

from keras_vmoe._checks import check_flags
from keras_vmoe._checks import check_not_negative
from keras_vmoe._keras import all_layers
from keras_vmoe.models.base import MoEModel
from keras_vmoe.models.moe import MoEConfig


def upcycle(model, moe, noise_std=0.0, preserve_outputs=False, seed=0):
    """Makes a MoE model whose experts start as copies of the dense MLPs.

    All other weights are copied; gates are initialized at random, so the model
    needs further training. It starts with the dense model's outputs if the
    gates of a token sum to 1 (`renormalize=True`, or K = E) and no token is
    dropped. With K = 1 and `renormalize` outputs differ only by rounding
    (2.4e-7 of logits of order 1 in float32), but the gate learns from the
    auxiliary losses alone.

    Args:
        model: A dense `ViTMoE` or `ConvNeXtMoE`.
        moe: The `moe` argument of the new model; experts have the hidden
            features of the MLPs that they start from.
        noise_std: Standard deviation of noise added to the experts' kernels,
            relative to that of the kernel's own values.
        preserve_outputs: Whether to set `renormalize=True` and
            `capacity_factor="dropless"`, which keeps the dense model's outputs.
        seed: Seed of the noise.

    Returns:
        A new model of the same class, not compiled.

    Raises:
        ValueError: If the model is not dense, or quantized, experts would have
            other hidden features, or `preserve_outputs` contradicts `moe`.

    Example:

    >>> from keras_vmoe.models import ConvNeXtMoE
    >>> dense = ConvNeXtMoE(depths=[2], dims=[8], num_classes=9, image_size=8)
    >>> sparse = upcycle(dense, dict(layers=[1], num_experts=4))
    >>> [layer.name for layer in sparse.moe_layers]
    ['block_1_moe']

    Reference:
        [Komatsuzaki et al., 2022](https://arxiv.org/abs/2212.05055), section 3.
    """
    if not isinstance(model, MoEModel) or model.moe is not None:
        raise ValueError(
            "`model` must be a dense ViTMoE or ConvNeXtMoE, made with "
            f"moe=None. Received: model={model!r}. Weights of other models are "
            "read by `keras_vmoe.checkpoints`."
        )
    modes = {x.quantization_mode for x in all_layers(model)} - {None}
    if modes:
        raise ValueError(
            "Experts start from kernels in floating point. Received: "
            f"{model.name!r}, quantized to {sorted(modes)}. Upcycle the model "
            "first, and quantize the result."
        )
    check_not_negative(noise_std=noise_std)
    check_flags(preserve_outputs=preserve_outputs)
    moe = MoEConfig.from_dict(moe)
    if preserve_outputs:
        moe = _preserving(moe, noise_std)
    sparse = type(model).from_config({**model.get_config(), "moe": moe})
    dense = {layer.name: layer for layer in model.layers}
    generator = np.random.default_rng(seed)
    for layer in sparse.layers:
        if layer.name in dense:
            layer.set_weights(dense[layer.name].get_weights())
            layer.trainable = dense[layer.name].trainable
        else:
            mlp = dense[layer.name.removesuffix("_moe") + "_mlp"]
            _copy_experts(mlp, layer, noise_std, generator)
    return sparse


def _preserving(moe, noise_std):
    """The config whose model has the function of the dense one."""
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
            "Only a dropless top-K router with renormalised gates, no shared "
            "expert and no noise on the kernels keep the outputs of the dense "
            f"model. Received: preserve_outputs=True together with {given}. "
            "Leave these out, or `preserve_outputs`."
        )
    return dataclasses.replace(
        moe, renormalize=True, capacity_factor="dropless"
    )


def _copy_experts(mlp, layer, noise_std, generator):
    """Every expert becomes a copy of the MLP, with noise of its own."""
    if mlp.hidden_dim != layer.hidden_dim:
        raise ValueError(
            "Experts that start from an MLP have its hidden features. "
            f"Received: {layer.hidden_dim} for the experts of {layer.name!r} "
            f"and {mlp.hidden_dim} in the MLP. Leave `hidden_dim` and "
            "`mlp_ratio` out."
        )
    for part in ("hidden", "output"):
        for kind in ("kernel", "bias"):
            source = getattr(getattr(mlp, f"{part}_dense"), kind)
            weight = getattr(layer.experts, f"{part}_{kind}")
            value = keras.ops.convert_to_numpy(source)
            copies = np.broadcast_to(value, weight.shape)
            if noise_std and kind == "kernel":
                noise = generator.normal(size=weight.shape) * value.std()
                copies = copies + noise_std * noise.astype(value.dtype)
            weight.assign(copies)
