"""The training loop: datasets, model, `fit`, and the files of a run."""

import contextlib
import dataclasses
import pathlib
import sys
from typing import NamedTuple

import keras
import numpy as np

from keras_vmoe import data
from keras_vmoe import distribution
from keras_vmoe import evaluation
from keras_vmoe import inspection
from keras_vmoe import models
from keras_vmoe._extras import require
from keras_vmoe.data import _corruption
from keras_vmoe.distribution import _processes
from keras_vmoe.models.presets import find_preset
from keras_vmoe.training import callbacks
from keras_vmoe.training import optimizers
from keras_vmoe.training.batches import check_batches
from keras_vmoe.training.batches import datasets
from keras_vmoe.training.batches import is_one_hot
from keras_vmoe.training.batches import parts_of
from keras_vmoe.training.batches import stream
from keras_vmoe.training.checkpointing import Checkpoints
from keras_vmoe.training.checkpointing import SaveCheckpoint
from keras_vmoe.training.config import SHARED
from keras_vmoe.training.initialization import freeze
from keras_vmoe.training.initialization import initialize
from keras_vmoe.training.run_folder import open_run
from keras_vmoe.training.run_folder import settings_of
from keras_vmoe.training.run_folder import write_result
from keras_vmoe.training.validation import Validation

POSITIONS = r"positions/embedding$"
MOMENTUM = 0.9  # Of SGD.


class RunResult(NamedTuple):
    """What a run came to.

    Attributes:
        test_accuracy: Share of the test images classified right.
        model: The trained model.
        run_dir: `pathlib.Path` of the run's files.
    """

    test_accuracy: float
    model: keras.Model
    run_dir: pathlib.Path


def train(config):
    """Trains a model and writes a run folder.

    The folder holds `model.keras` (the model of the last epoch), `config.yaml`
    (to be given to `keras-vmoe train --config`), `classes.json`, `history.csv`,
    `curves.png` and, when all is done, `result.json`. Test images are looked at
    once, after the training.

    A run that was stopped continues from its last checkpoint when it is started
    again with the same settings, and ends as if it had never stopped:
    weights, optimizer, noise, order and augmentation of the images are those of
    the epoch.

    Args:
        config: A `TrainConfig`.

    Returns:
        A `RunResult`.

    Raises:
        ValueError: If the configuration fits no model or dataset, before
            anything is written, or is not that of the run in the folder.
        FileExistsError: If the run folder holds a finished run or other files.
        NonFiniteLossError: If the loss becomes NaN; the model of the last good
            epoch stays in the folder.

    Example:

    >>> train(TrainConfig(epochs=10))  # doctest: +SKIP
    """
    require("matplotlib", "plots")  # Before an hour of training, not after.
    if config.tensorboard:
        require("tensorboard", "data")
    _processes.check_agreement(
        "configuration and versions",
        **settings_of(config),
        **_processes.versions(),
    )
    keras.utils.set_random_seed(config.seed)
    strategy = make_strategy(config)
    with strategy.scope() if strategy else contextlib.nullcontext():
        return _train(config, strategy)


def make_strategy(config):
    """What spreads a run over several devices; None on one.

    Raises:
        ValueError: If the run cannot be spread so.
    """
    name, processes = config.distribution, _processes.num_processes()
    if name is None:
        if config.expert_shards or config.shard_dense or processes > 1:
            raise ValueError(
                "Several processes or expert shards need a distribution. "
                f"Received: expert_shards={config.expert_shards}, "
                f"shard_dense={config.shard_dense}, {processes} processes, "
                "distribution=None. Set distribution='auto'."
            )
        return None
    num_experts, dropless = _experts_of(config)
    if dropless and name == "expert_parallel":
        raise ValueError(
            "Under 'expert_parallel' tokens travel in buffers of a fixed "
            "capacity. Received: dropless experts. Set a capacity factor, or "
            "use 'data_parallel'."
        )
    strategy = distribution.resolve(
        name,
        None if dropless else num_experts,
        config.expert_shards,
        config.shard_dense,
    )
    if hasattr(strategy, "num_replicas_in_sync") and config.accumulate > 1:
        raise ValueError(
            "Keras adds up gradients on one device of TensorFlow only. "
            f"Received: accumulate={config.accumulate} with distribution="
            f"{name!r}. Leave it out; more devices take larger batches."
        )
    if config.ema is not None and processes > 1:
        raise ValueError(
            "Keras keeps an average of the weights in one process only. "
            f"Received: ema={config.ema} in {processes} processes. Leave it "
            "out."
        )
    return strategy


def _experts_of(config):
    """How many experts a model will have, and whether they drop nothing."""
    moe = config.moe
    if config.preset is not None:
        moe = find_preset(config.preset).moe
        moe = None if moe is None else models.MoEConfig.from_dict(moe)
    if moe is None:
        return None, False
    factor = config.capacity_factor or moe.capacity_factor
    return moe.num_experts, factor is None


def _train(config, strategy):
    """A run, in the scope of what spreads it over the devices."""
    info = data.info(config.dataset, config.data_dir)
    train_data, validation_data, test_data = datasets(config, info)
    length = len(train_data)
    _processes.check_agreement(
        "data", steps=length, classes=list(info.class_names)
    )
    model = make_model(config, info)
    check_batches(config, model, strategy)
    steps, epochs = parts_of(config, length)
    compile_model(model, config, steps * epochs)
    run_dir = open_run(config, info.class_names)
    checkpoints = Checkpoints(run_dir / "checkpoints", config.keep_checkpoints)
    state = checkpoints.restore(model) or {"epoch": 0}
    _processes.check_agreement("checkpoint", epoch=state["epoch"])
    first = _processes.is_first_process()
    if state["epoch"] and first:
        print(f"resumed after epoch {state['epoch']}", flush=True)

    routing = callbacks.RoutingHistory(epochs=_to_arrays(state))
    history = callbacks.HistoryFile(
        run_dir / "history.csv", routing, state.get("rows", ())
    )
    splits = (config.train_split, config.validation_split, config.test_split)
    splits = () if config.skip_corrupt else splits
    reads = (config.dataset, splits, config.data_dir)
    if state["epoch"] < epochs:
        save = SaveCheckpoint(
            checkpoints, lambda: _to_lists(history.rows, routing.epochs)
        )
        verbose = 1 if sys.stdout.isatty() else 2
        with _corruption.named_corruption(*reads):
            model.fit(
                stream(
                    config, info, state["epoch"] * steps, train_data, strategy
                ),
                steps_per_epoch=steps,
                initial_epoch=state["epoch"],
                epochs=epochs,
                shuffle=False,  # The dataset shuffles itself.
                verbose=verbose if first else 0,
                callbacks=_callbacks(
                    config, run_dir, validation_data, routing, history, save
                ),
            )
    else:  # Stopped behind its last checkpoint.
        if config.ema:
            model.optimizer.finalize_variable_values(model.trainable_variables)
        models.save(model, run_dir / "model.keras")
    with _corruption.named_corruption(*reads):
        test = evaluation.measure(model, test_data, routing=False)
    if first:
        curves = {
            name: [row.get(name) for row in history.rows]
            for name in history.rows[0]
        }
        path = run_dir / "curves.png"
        inspection.plot_history(curves, routing.epochs, path)
        write_result(run_dir, test)
    # All leave together: JAX ends a process that is long in coming.
    _processes.check_agreement("end of the run", epochs=epochs)
    return RunResult(test.accuracy, model, run_dir)


def _callbacks(config, run_dir, validation_data, routing, history, save):
    """The callbacks of a run, in their order."""
    average = None
    if config.ema:
        average = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    logs = run_dir / "tensorboard"
    board = []
    if config.tensorboard:
        board.append(callbacks.RoutingTensorBoard(logs))
        if _processes.is_first_process():
            board.append(keras.callbacks.TensorBoard(logs, write_graph=False))
    return [
        callbacks.StopOnNonFiniteLoss(run_dir / "model.keras"),
        Validation(validation_data, make_loss(config), average),
        routing,
        history,
        *board,
        save,
        # Behind the checkpoint, which has the weights themselves: what puts
        # their average into the saved model.
        *([average] if average else []),
        callbacks.SaveModel(run_dir / "model.keras"),
    ]


def make_model(config, info):
    """The model of a configuration, with the weights that it starts from."""
    num_classes = config.num_classes or info.num_classes
    settings = dataclasses.asdict(config.model)
    settings["image_size"] = config.image_size
    moe, factor = config.moe, config.capacity_factor
    if config.preset is not None:
        settings = {name: settings[name] for name in SHARED}
        if factor is not None and find_preset(config.preset).moe:
            settings["moe"] = {"capacity_factor": factor}
        model = models.from_preset(
            config.preset, num_classes=num_classes, **settings
        )
    else:
        if factor is not None and moe is not None:
            moe = dataclasses.replace(moe, capacity_factor=factor)
        make = models.ViTMoE
        if config.convnext is not None:
            make = models.ConvNeXtMoE
            settings = {name: settings[name] for name in SHARED}
            settings |= dataclasses.asdict(config.convnext)
        model = make(**settings, num_classes=num_classes, moe=moe)
    if config.head_bias:
        bias = model.get_layer("head").bias
        bias.assign(np.full(bias.shape, config.head_bias))
    if config.init is not None:
        initialize(model, config.init, info.class_names)
    freeze(model, config.freeze)
    return model


def compile_model(model, config, steps):
    """Compiles a model with the optimizer, loss and metrics of a run.

    Args:
        model: A model.
        config: A `TrainConfig`.
        steps: Steps of the whole run; Keras counts also those that only add up
            their gradients.
    """
    decayed = list(optimizers.KERNELS)
    arguments = {"momentum": MOMENTUM} if config.optimizer == "sgd" else {}
    optimizer = optimizers.OPTIMIZERS[config.optimizer](
        make_schedule(config, steps),
        weight_decay=config.weight_decay,
        expert_weight_decay=config.expert_weight_decay,
        decayed=decayed + [POSITIONS] * config.decay_positions,
        decay_gates=config.decay_gates,
        global_clipnorm=config.clip_norm,
        use_ema=config.ema is not None,
        # The average moves at every step, and by an update's momentum in all.
        ema_momentum=(config.ema or 0.99) ** (1 / config.accumulate),
        gradient_accumulation_steps=(
            config.accumulate if config.accumulate > 1 else None
        ),
        **arguments,
    )
    model.compile(optimizer, make_loss(config), metrics=make_metrics(config))


def make_schedule(config, steps):
    """The learning rate of a run, which has so many steps."""
    return optimizers.WarmUp(
        config.learning_rate,
        steps=steps,
        warmup_steps=config.warmup_of(steps),
        decay=config.schedule,
        end=config.final_learning_rate,
    )


def make_loss(config):
    """The loss of a run, of logits."""
    if config.loss == "bce":
        return keras.losses.BinaryCrossentropy(from_logits=True)
    if config.loss == "sigmoid":
        return sigmoid_crossentropy
    if is_one_hot(config):
        return keras.losses.CategoricalCrossentropy(
            from_logits=True, label_smoothing=config.label_smoothing
        )
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def sigmoid_crossentropy(labels, logits):
    """Binary cross-entropies, summed over the classes: V-MoE's loss.

    Args:
        labels: `(B, classes)`, in [0, 1].
        logits: `(B, classes)`.

    Returns:
        `(B,)` tensor.
    """
    losses = keras.ops.binary_crossentropy(labels, logits, from_logits=True)
    return keras.ops.sum(losses, axis=-1)


def make_metrics(config):
    """The metrics of a run."""
    if is_one_hot(config):
        return [keras.metrics.CategoricalAccuracy(name="accuracy")]
    return [keras.metrics.SparseCategoricalAccuracy(name="accuracy")]


def _to_lists(rows, epochs):
    """What a checkpoint keeps of the history, for JSON."""
    routing = [
        {
            name: {key: np.asarray(value).tolist() for key, value in x.items()}
            for name, x in layers.items()
        }
        for layers in epochs
    ]
    return {"rows": rows, "routing": routing}


def _to_arrays(state):
    """The routing of the epochs before, as it was."""
    return [
        {
            name: {**x, "load_share": np.array(x["load_share"])}
            for name, x in layers.items()
        }
        for layers in state.get("routing", ())
    ]
