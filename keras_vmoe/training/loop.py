"""The training loop: datasets, model, `fit`, and the files of a run."""

import contextlib
import pathlib
import sys
from typing import NamedTuple

import keras
import numpy as np

from keras_vmoe import data
from keras_vmoe import evaluation
from keras_vmoe import inspection
from keras_vmoe import models
from keras_vmoe._extras import require
from keras_vmoe.data import _corruption
from keras_vmoe.distribution import _processes
from keras_vmoe.training import callbacks
from keras_vmoe.training.batches import check_batches
from keras_vmoe.training.batches import datasets
from keras_vmoe.training.batches import parts_of
from keras_vmoe.training.batches import stream
from keras_vmoe.training.building import compile_model
from keras_vmoe.training.building import make_loss
from keras_vmoe.training.building import make_strategy
from keras_vmoe.training.checkpointing import Checkpoints
from keras_vmoe.training.checkpointing import SaveCheckpoint
from keras_vmoe.training.initialization import restore
from keras_vmoe.training.initialization import starting_model
from keras_vmoe.training.run_folder import CHECKPOINTS
from keras_vmoe.training.run_folder import MODEL
from keras_vmoe.training.run_folder import flat
from keras_vmoe.training.run_folder import open_run
from keras_vmoe.training.run_folder import settings_of
from keras_vmoe.training.run_folder import write_result
from keras_vmoe.training.validation import Validation


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

    The folder holds `config.yaml` (to be given to `keras-vmoe train --config`),
    `classes.json`, `history.csv`, a checkpoint of each epoch while it trains,
    `model.keras` (the model of the last epoch, written when the run ends or is
    interrupted; `restore` has that of a killed run) and, when all is done,
    `curves.png` and `result.json`. Test images are looked at once, after the
    training.

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
        **flat(settings_of(config)),
        **_processes.versions(),
    )
    keras.utils.set_random_seed(config.seed)
    strategy = make_strategy(config)
    with strategy.scope() if strategy else contextlib.nullcontext():
        return _train(config, strategy)


def _train(config, strategy):
    """A run, in the scope of what spreads it over the devices."""
    info = data.info(config.data.dataset, config.data.data_dir)
    train_data, validation_data, test_data = datasets(config, info)
    length = len(train_data)
    _processes.check_agreement(
        "data", steps=length, classes=list(info.class_names)
    )
    model = starting_model(config, info)
    check_batches(config, model, strategy)
    steps, epochs = parts_of(config, length)
    compile_model(model, config, steps * epochs)
    run_dir = open_run(config, info.class_names)
    checkpoints = Checkpoints(
        run_dir / CHECKPOINTS, config.checkpoint.keep_checkpoints
    )
    state = checkpoints.restore(model) or {"epoch": 0}
    done = state["epoch"]
    _processes.check_agreement("checkpoint", epoch=done)
    if done and _processes.is_first_process():
        print(f"resumed after epoch {done}", flush=True)
    routing = callbacks.RoutingHistory(epochs=_to_arrays(state))
    history = callbacks.HistoryFile(
        run_dir / "history.csv", routing, state.get("rows", ())
    )
    save = SaveCheckpoint(
        checkpoints, lambda: _to_lists(history.rows, routing.epochs)
    )
    with _named_damage(config):
        if done < epochs:
            with _last_epoch_kept(run_dir):
                model.fit(
                    stream(config, info, done * steps, train_data, strategy),
                    steps_per_epoch=steps,
                    initial_epoch=done,
                    epochs=epochs,
                    shuffle=False,  # The dataset shuffles itself.
                    verbose=_verbosity(),
                    callbacks=_callbacks(
                        config, run_dir, validation_data, routing, history, save
                    ),
                )
        elif config.optimizer.ema:  # Which `fit` ends with.
            model.optimizer.finalize_variable_values(model.trainable_variables)
        models.save(model, run_dir / MODEL)
        test = evaluation.measure(model, test_data, routing=False)
    if _processes.is_first_process():
        _draw_curves(history.rows, routing.epochs, run_dir / "curves.png")
        write_result(run_dir, test)
    # All leave together: JAX ends a process that is long in coming.
    _processes.check_agreement("end of the run", epochs=epochs)
    return RunResult(test.accuracy, model, run_dir)


@contextlib.contextmanager
def _last_epoch_kept(run_dir):
    """Leaves a `model.keras` of the last whole epoch when a run is stopped."""
    try:
        yield
    except (KeyboardInterrupt, callbacks.NonFiniteLossError):
        checkpoints = Checkpoints(run_dir / CHECKPOINTS)
        # Of several processes the others may not come along.
        if checkpoints.epochs() and _processes.num_processes() == 1:
            models.save(restore(run_dir), run_dir / MODEL)
        raise


def _named_damage(config):
    """Names damaged images in errors, unless they are to be skipped."""
    reads = config.data
    splits = (reads.train_split, reads.validation_split, reads.test_split)
    splits = () if reads.skip_corrupt else splits
    return _corruption.named_corruption(reads.dataset, splits, reads.data_dir)


def _verbosity():
    """Of `fit`: nothing, a bar, or a line per epoch."""
    if not _processes.is_first_process():
        return 0
    return 1 if sys.stdout.isatty() else 2


def _callbacks(config, run_dir, validation_data, routing, history, save):
    """The callbacks of a run, in their order."""
    average = []
    if config.optimizer.ema:
        average.append(keras.callbacks.SwapEMAWeights())
    logs = run_dir / "tensorboard"
    board = []
    if config.tensorboard:
        board.append(callbacks.RoutingTensorBoard(logs))
        if _processes.is_first_process():
            board.append(keras.callbacks.TensorBoard(logs, write_graph=False))
    return [
        callbacks.StopOnNonFiniteLoss(run_dir / CHECKPOINTS),
        Validation(validation_data, make_loss(config), *average),
        routing,
        history,
        *board,
        save,
        *average,
    ]


def _draw_curves(rows, routing, path):
    """Draws the logs of all epochs, and every expert's load."""
    curves = {name: [row.get(name) for row in rows] for name in rows[0]}
    inspection.plot_history(curves, routing, path)


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
