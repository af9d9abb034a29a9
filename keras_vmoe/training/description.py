"""What a run would do, before it does it."""

import dataclasses

from keras_vmoe import data
from keras_vmoe import models
from keras_vmoe._extras import require
from keras_vmoe.evaluation._description import cost_lines
from keras_vmoe.models.costs import without_weights
from keras_vmoe.training.batches import check_batches
from keras_vmoe.training.batches import datasets
from keras_vmoe.training.building import make_model
from keras_vmoe.training.building import make_schedule
from keras_vmoe.training.building import make_strategy
from keras_vmoe.training.initialization import check_start
from keras_vmoe.training.run_folder import check_run
from keras_vmoe.training.run_folder import settings_of

# Numbers of the size of the weights: themselves, gradients, optimizer's slots.
COPIES = {"adamw": 4, "lamb": 4, "sgd": 3}


def describe(config):
    """The settings, cost, memory and steps of a run, as text.

    Memory is an estimate: the weights, gradients and the optimizer's slots in
    float32, and what all layers make of a batch.

    Args:
        config: A `TrainConfig`.

    Returns:
        String of several lines.

    Raises:
        ValueError: If the configuration fits no model or dataset.

    Example:

    >>> print(describe(TrainConfig()))  # doctest: +SKIP
    """
    strategy = make_strategy(config)  # Raises where a run would.
    info = data.info(config.data.dataset, config.data.data_dir)
    check_run(config, info.class_names)
    if config.model.init is not None:
        check_start(config.model.init)
    steps = len(datasets(config, info)[0])
    schedule = make_schedule(config, steps * config.epochs)
    no_values = dataclasses.replace(config.model, init=None, head_bias=0.0)
    with without_weights():
        model = make_model(
            dataclasses.replace(config, model=no_values), info.num_classes
        )
    check_batches(config, model, strategy)
    cost = models.cost(model)
    optimizer = config.optimizer
    copies = COPIES[optimizer.name] + (optimizer.ema is not None)
    copies += optimizer.accumulate > 1
    weights = 4 * copies * cost.params
    activations = cost.activation_bytes * config.data.batch_size
    yaml = require("yaml", "cli")
    lines = [
        yaml.safe_dump(settings_of(config), sort_keys=False).rstrip(),
        "",
        *cost_lines(cost),
        f"memory, estimated: {weights / 2**20:.0f} MiB for weights and "
        f"optimizer, {activations / 2**20:.0f} MiB for a batch",
        f"steps: {steps} per epoch, {schedule.steps} in all, "
        f"{schedule.warmup_steps} of warm-up",
    ]
    return "\n".join(lines)
