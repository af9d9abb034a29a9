"""A run before it starts: settings, cost, memory and steps."""

import dataclasses
import json

import keras

from keras_vmoe import data
from keras_vmoe import models
from keras_vmoe._checks import counted
from keras_vmoe._extras import require
from keras_vmoe.evaluation._description import cost_lines
from keras_vmoe.evaluation._description import memory
from keras_vmoe.models.costs import without_weights
from keras_vmoe.models.presets import find_preset
from keras_vmoe.training import batches
from keras_vmoe.training import building
from keras_vmoe.training import run_folder
from keras_vmoe.training.architecture import check_init
from keras_vmoe.training.architecture import from_scratch
from keras_vmoe.training.architecture import resolved
from keras_vmoe.training.config import KINDS
from keras_vmoe.training.config import VIT_SIZES
from keras_vmoe.training.config import TrainConfig

# Arrays of the weights' size: weights, gradients, optimizer slots.
COPIES = {"adamw": 4, "lamb": 4, "sgd": 3}


def describe(config: TrainConfig) -> str:
    """Returns the settings, cost, memory and steps of a run, as text.

    Memory is an estimate: weights, gradients and optimizer slots in float32,
    and the activations of all layers for a batch. Notes at the end report a
    run folder in use, and a dataset that is missing or unsuitable. Steps are
    then for 1,000 images, and the number of classes is the preset's if the
    dataset does not define it.

    Args:
        config: A `TrainConfig`.

    Returns:
        String of several lines.

    Raises:
        ValueError: If the configuration fits no model.

    Example:

    >>> print(describe(TrainConfig()))  # doctest: +SKIP
    """
    config = resolved(config)
    strategy = building.make_strategy(config)  # Raises as a run would.
    info, length, notes = None, None, []
    try:
        check_init(config)
    except ValueError as error:
        notes.append(f"note: a run would be refused. {error}")
    try:
        info = data.info(config.data.dataset, config.data.data_dir)
        config = batches.with_splits(config, info)
        length = len(batches.datasets(config, info)[0])
        batches.parts_of(config, length)
        run_folder.check_run(config, info.class_names)
        run_folder.check_free(config)
    except (OSError, ValueError) as error:
        notes.append(f"note: a run would be refused. {error}")
    num_classes = _num_classes(config, info)
    no_values = dataclasses.replace(from_scratch(config).model, head_bias=0.0)
    with without_weights():
        model = building.make_model(
            dataclasses.replace(config, model=no_values), num_classes
        )
    batches.check_batches(config, model, strategy)
    cost = models.cost(model)
    optimizer = config.optimizer
    copies = COPIES[optimizer.name] + (optimizer.ema is not None)
    copies += optimizer.accumulate > 1
    weights = 4 * copies * cost.params
    activations = cost.activation_bytes * config.data.batch_size
    dump = require("yaml", "cli").safe_dump
    lines = [
        dump(_used(config), sort_keys=False),
        dump(_sizes(model), sort_keys=False, default_flow_style=None),
        *cost_lines(cost),
        f"memory, estimated: {memory(weights)} for weights and optimizer, "
        f"{memory(activations)} for a batch",
        *([f"files: {info.files}"] if info and info.files else []),
        _steps(config, length),
        *notes,
    ]
    return "\n".join(lines)


def _num_classes(config, info):
    """The number of classes of the dataset, else of the preset."""
    if info is not None and info.num_classes is not None:
        return info.num_classes
    preset = config.model.preset
    return find_preset(preset).num_classes if preset else 10


def _steps(config, length):
    """A line on the steps of a run; without a dataset, per 1,000 images."""
    if length is None:
        steps = 1000 / config.data.batch_size
        epochs = counted(config.epochs, "epoch")
        return f"steps: {steps:.2f} per 1,000 images, in {epochs}"
    schedule = building.make_schedule(config, length * config.epochs)
    return (
        f"steps: {length} per epoch, {schedule.steps} in all, "
        f"{schedule.warmup_steps} of warm-up"
    )


def announcement(config, info, done):
    """Describes a run after `done` epochs, and how to stop it."""
    sizes, moe, reads = config.model, config.moe, config.data
    kind = KINDS[config.family]
    if config.family == "vit":
        blocks = counted(sizes.num_layers, "block")
        kind = f"{kind} of {blocks}, {sizes.hidden_dim} features"
        if sizes.ensemble_size is not None:
            kind = f"{kind}, {sizes.ensemble_size} members"
    else:
        kind = f"{kind} of {[*config.part.depths]} blocks"
    kind = f"{sizes.preset}, a {kind}" if sizes.preset else kind
    where = moe and (
        moe.layers if isinstance(moe.layers, str) else [*moe.layers]
    )
    experts = f"{moe.num_experts} experts in {where}" if moe else "dense"
    start = f", from {sizes.init}" if sizes.init else ""
    epochs = counted(config.epochs, "epoch")
    lines = [
        f"backend: {keras.backend.backend()}",
        f"model: {kind}, {experts}{start}",
        f"data: {reads.dataset}, {reads.train_split}, in {epochs}",
        *([f"files: {info.files}"] if info.files else []),
        f"run folder: {config.run_dir}",
    ]
    if reads.test_split == reads.validation_split:
        lines.append(
            f"test: on the validation images, {reads.test_split}; "
            "--test_split names others"
        )
    if done:
        lines.append(f"resumed after epoch {done}")
    lines.append(
        "Ctrl-C stops the run; the same command resumes it after its last "
        "complete epoch."
    )
    return "\n".join(lines)


def _used(config):
    """The settings, without ViT sizes that other families do not use."""
    settings = run_folder.settings_of(config)
    if config.family != "vit":
        for name in VIT_SIZES:
            del settings["model"][name]
    return settings


def _sizes(model):
    """The arguments of a model, under its class."""
    given = json.loads(json.dumps(model.get_config()))
    given["moe"] = given["moe"] and _set(given["moe"])
    for name in ("name", "trainable", "parts"):
        del given[name]
    return {type(model).__name__: _set(given)}


def _set(arguments):
    return {name: x for name, x in arguments.items() if x is not None}
