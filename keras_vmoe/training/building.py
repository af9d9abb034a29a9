"""The parts of a run: distribution, model, optimizer and loss."""

import re

import keras
import numpy as np

from keras_vmoe import distribution
from keras_vmoe import models
from keras_vmoe.distribution import _processes
from keras_vmoe.training import optimizers
from keras_vmoe.training.architecture import resolved
from keras_vmoe.training.batches import is_one_hot
from keras_vmoe.training.config import given
from keras_vmoe.training.sizes import MODELS
from keras_vmoe.training.sizes import SIZES

MOMENTUM = 0.9  # Of SGD.


def make_strategy(config):
    """Returns the distribution or strategy of a run; None on one device."""
    devices, optimizer = config.devices, config.optimizer
    name, processes = devices.distribution, _processes.num_processes()
    if name is None:
        if devices.expert_shards or devices.shard_dense or processes > 1:
            raise ValueError(
                "Several processes or expert shards need a distribution. "
                f"Received: distribution=None, {processes} processes, "
                f"expert_shards={devices.expert_shards}, "
                f"shard_dense={devices.shard_dense}. Set distribution='auto'."
            )
        return None
    num_experts, dropless = _experts_of(config)
    if dropless and name == "expert_parallel":
        raise ValueError(
            "Under 'expert_parallel' tokens are exchanged in buffers of a "
            "fixed capacity. Received: capacity_factor='dropless'. Set a "
            "number, or use 'data_parallel'."
        )
    strategy = distribution.resolve(
        name,
        None if dropless else num_experts,
        devices.expert_shards,
        devices.shard_dense,
    )
    if hasattr(strategy, "num_replicas_in_sync") and optimizer.accumulate > 1:
        raise ValueError(
            "On TensorFlow, Keras accumulates gradients on one device only. "
            f"Received: accumulate={optimizer.accumulate} with distribution="
            f"{name!r}. Leave it out; more devices take larger batches."
        )
    if optimizer.ema is not None and processes > 1:
        raise ValueError(
            "Keras averages weights in a single process only. "
            f"Received: ema={optimizer.ema} in {processes} processes. Leave it "
            "out."
        )
    return strategy


def _experts_of(config):
    """The number of experts of a model, and whether routing is dropless."""
    moe = resolved(config).moe
    if moe is None:
        return None, False
    moe = models.MoEConfig.from_dict(given(moe))
    factor = config.model.capacity_factor or moe.capacity_factor
    return moe.num_experts, factor == "dropless"


def make_model(config, num_classes):
    """Makes the model of a `TrainConfig`, newly initialized."""
    config = resolved(config)
    sizes, moe = config.model, config.moe
    if moe is not None:
        moe = given(moe)
        if sizes.capacity_factor is not None:
            moe["capacity_factor"] = sizes.capacity_factor
    make = MODELS[config.family]
    parts = {x: getattr(config.part, x) for x in SIZES[config.family]}
    if sizes.preset is not None:
        parts = {**parts, "name": re.sub(r"\W", "_", sizes.preset)}
    model = make(
        num_classes=config.data.num_classes or num_classes,
        image_size=config.image_size,
        channels=config.data.channels,
        preprocessing=config.data.preprocessing,
        drop_path_rate=config.drop_path_rate,
        dtype=sizes.dtype,
        remat=sizes.remat,
        moe=moe,
        **parts,
    )
    if sizes.head_bias:
        bias = model.get_layer("head").bias
        bias.assign(np.full(bias.shape, sizes.head_bias))
    return model


def compile_model(model, config, steps):
    """Compiles a model with the optimizer, loss and metrics of a run.

    `steps` includes steps that only accumulate gradients.
    """
    settings = config.optimizer
    arguments = {"momentum": MOMENTUM} if settings.name == "sgd" else {}
    optimizer = optimizers.OPTIMIZERS[settings.name](
        make_schedule(config, steps),
        weight_decay=settings.weight_decay,
        expert_weight_decay=settings.expert_weight_decay,
        decay_positions=settings.decay_positions,
        decay_gates=settings.decay_gates,
        global_clipnorm=settings.clip_norm,
        use_ema=settings.ema is not None,
        # Keras moves the average every step, even between updates.
        ema_momentum=(settings.ema or 0.99) ** (1 / settings.accumulate),
        gradient_accumulation_steps=(
            settings.accumulate if settings.accumulate > 1 else None
        ),
        **arguments,
    )
    kind = keras.metrics.SparseCategoricalAccuracy
    if is_one_hot(config):
        kind = keras.metrics.CategoricalAccuracy
    model.compile(optimizer, make_loss(config), metrics=[kind(name="accuracy")])


def make_schedule(config, steps):
    """Returns the learning rate schedule of a run with so many steps."""
    return optimizers.WarmUp(
        config.optimizer.learning_rate,
        steps=steps,
        warmup_steps=config.warmup_of(steps),
        decay=config.optimizer.schedule,
        end=config.optimizer.final_learning_rate,
    )


def make_loss(config):
    """Returns the loss of a run, on logits."""
    if config.optimizer.loss == "bce":
        return keras.losses.BinaryCrossentropy(from_logits=True)
    if config.optimizer.loss == "sigmoid":
        return sigmoid_crossentropy
    if is_one_hot(config):
        return keras.losses.CategoricalCrossentropy(
            from_logits=True, label_smoothing=config.optimizer.label_smoothing
        )
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def sigmoid_crossentropy(labels, logits):
    """V-MoE's loss: binary cross-entropy, summed over the classes, `(B,)`."""
    losses = keras.ops.binary_crossentropy(labels, logits, from_logits=True)
    return keras.ops.sum(losses, axis=-1)
