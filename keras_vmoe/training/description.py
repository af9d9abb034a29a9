"""A run before it starts: settings, cost, memory and steps."""

import dataclasses
import json

from keras_vmoe import data
from keras_vmoe import models
from keras_vmoe._extras import require
from keras_vmoe.evaluation._description import cost_lines
from keras_vmoe.models.costs import without_weights
from keras_vmoe.training import batches
from keras_vmoe.training import building
from keras_vmoe.training import run_folder
from keras_vmoe.training.config import VIT_SIZES
from keras_vmoe.training.initialization import check_start

# Arrays of the weights' size: weights, gradients, optimizer slots.
COPIES = {"adamw": 4, "lamb": 4, "sgd": 3}


def describe(config):
    """The settings, cost, memory and steps of a run, as text.

    Memory is an estimate: weights, gradients and optimizer slots in float32,
    and the activations of all layers for a batch. A run folder that is taken
    is noted at the end.

    Args:
        config: A `TrainConfig`.

    Returns:
        String of several lines.

    Raises:
        ValueError: If the configuration fits no model or dataset.

    Example:

    >>> print(describe(TrainConfig()))  # doctest: +SKIP
    """
    strategy = building.make_strategy(config)  # Raises as a run would.
    info = data.info(config.data.dataset, config.data.data_dir)
    notes = []
    try:
        run_folder.check_run(config, info.class_names)
    except (OSError, ValueError) as error:
        notes.append(f"note: a run would be refused. {error}")
    if config.model.init is not None:
        check_start(config.model.init)
    steps = len(batches.datasets(config, info)[0])
    schedule = building.make_schedule(config, steps * config.epochs)
    no_values = dataclasses.replace(config.model, init=None, head_bias=0.0)
    with without_weights():
        model = building.make_model(
            dataclasses.replace(config, model=no_values), info.num_classes
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
        f"memory, estimated: {weights / 2**20:.0f} MiB for weights and "
        f"optimizer, {activations / 2**20:.0f} MiB for a batch",
        f"steps: {steps} per epoch, {schedule.steps} in all, "
        f"{schedule.warmup_steps} of warm-up",
        *notes,
    ]
    return "\n".join(lines)


def _used(config):
    """The settings, without those that a preset or a ConvNeXt sets aside."""
    settings = run_folder.settings_of(config)
    if config.model.preset is not None:
        del settings["moe"], settings["convnext"]
    if config.model.preset is not None or config.convnext is not None:
        for name in VIT_SIZES:
            del settings["model"][name]
    return settings


def _sizes(model):
    """The arguments that a model was made with, under its class."""
    given = json.loads(json.dumps(model.get_config()))
    given["moe"] = given["moe"] and _set(given["moe"])
    for name in ("name", "trainable", "parts"):
        del given[name]
    return {type(model).__name__: _set(given)}


def _set(arguments):
    return {name: x for name, x in arguments.items() if x is not None}
