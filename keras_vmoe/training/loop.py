"""The training loop: datasets, model, `fit`, and the files of a run."""

import contextlib
import pathlib
import sys
from typing import NamedTuple

import keras

from keras_vmoe import data
from keras_vmoe import evaluation
from keras_vmoe import inspection
from keras_vmoe import models
from keras_vmoe._extras import require
from keras_vmoe.data import _corruption
from keras_vmoe.distribution import _processes
from keras_vmoe.training import batches
from keras_vmoe.training import building
from keras_vmoe.training import callbacks
from keras_vmoe.training import run_folder
from keras_vmoe.training.architecture import check_init
from keras_vmoe.training.architecture import resolved
from keras_vmoe.training.checkpointing import Checkpoints
from keras_vmoe.training.checkpointing import SaveCheckpoint
from keras_vmoe.training.config import TrainConfig
from keras_vmoe.training.description import announcement
from keras_vmoe.training.initialization import restore
from keras_vmoe.training.initialization import starting_model
from keras_vmoe.training.validation import Validation

NOTHING_DONE = {"epoch": 0, "rows": [], "routing": []}


class RunResult(NamedTuple):
    """The outcome of a run.

    Attributes:
        test_accuracy: Share of the test images classified correctly.
        model: The trained model.
        run_dir: `pathlib.Path` of the run folder.
    """

    test_accuracy: float
    model: keras.Model
    run_dir: pathlib.Path


def train(config: TrainConfig) -> RunResult:
    """Trains a model and writes a run folder.

    The folder holds `config.yaml` (an input of `keras-vmoe train --config`),
    `classes.json`, `history.csv`, checkpoints of the last epochs during
    training, `model.keras` (the model of the last epoch, written when the run
    ends or is interrupted; for a killed run, use `restore`) and, at the end,
    `curves.png`, `predictions.npz` (of the test images) and `result.json`.
    Test images are used once, after training.

    A stopped run, started again with the same settings, resumes from its last
    checkpoint and ends as if it had never stopped. The checkpoint restores
    weights, optimizer state and noise; the epoch determines the order and
    augmentation of the images.

    Args:
        config: A `TrainConfig`.

    Returns:
        A `RunResult`.

    Raises:
        ValueError: If the configuration fits no model or dataset (before
            anything is written), or differs from that of the run in the folder.
        FileExistsError: If the run folder holds a finished run or other files.
        BlockingIOError: If another process trains in the folder.
        NonFiniteLossError: If the loss becomes NaN; the model of the last good
            epoch remains in the folder.

    Example:

    >>> train(TrainConfig(epochs=10))  # doctest: +SKIP
    """
    require("matplotlib", "plots")  # Before training, not after.
    if config.tensorboard:
        require("tensorboard", "data")
    if _processes.num_processes() > 1:
        require("orbax.checkpoint", "checkpoints")
    check_init(config)
    config = resolved(config)
    _processes.check_agreement(
        "configuration and versions",
        **run_folder.flat(run_folder.settings_of(config)),
        **_processes.versions(),
    )
    keras.utils.set_random_seed(config.seed)
    strategy = building.make_strategy(config)
    with contextlib.ExitStack() as stack:
        if strategy:
            stack.enter_context(strategy.scope())
        return _train(config, strategy, stack)


def _train(config, strategy, stack):
    """Trains in the scope of the strategy; `stack` holds the run folder."""
    info = data.info(config.data.dataset, config.data.data_dir)
    config = batches.with_splits(config, info)
    train_data, validation_data, test_data = batches.datasets(config, info)
    length = len(train_data)
    _processes.check_agreement(
        "data", steps=length, classes=list(info.class_names)
    )
    model = starting_model(config, info)
    batches.check_batches(config, model, strategy)
    steps, epochs = batches.parts_of(config, length)
    building.compile_model(model, config, steps * epochs)
    run_dir = stack.enter_context(run_folder.open_run(config, info.class_names))
    checkpoints = Checkpoints(
        run_dir / run_folder.CHECKPOINTS, config.checkpoint.keep_checkpoints
    )
    state = checkpoints.restore(model) or NOTHING_DONE
    done = state["epoch"]
    _processes.check_agreement("checkpoint", epoch=done)
    if _processes.is_first_process():
        print(announcement(config, info, done), flush=True)
    routing = callbacks.RoutingHistory(epochs=state["routing"])
    history = callbacks.HistoryFile(
        run_dir / "history.csv", routing, state["rows"]
    )
    clock = callbacks.StepTime(steps)
    average = [keras.callbacks.SwapEMAWeights()] if config.optimizer.ema else []
    loss = building.make_loss(config)
    start = done * steps
    with _naming_corruption(config):
        if done < epochs:
            with _last_epoch_kept(run_dir, checkpoints):
                model.fit(
                    batches.stream(config, info, start, train_data, strategy),
                    steps_per_epoch=steps,
                    initial_epoch=done,
                    epochs=epochs,
                    shuffle=False,  # The dataset shuffles itself.
                    verbose=_verbosity(),
                    callbacks=[
                        clock,
                        callbacks.StopOnNonFiniteLoss(checkpoints.folder),
                        Validation(validation_data, loss, *average),
                        routing,
                        history,
                        *_tensorboard(config, run_dir / "tensorboard"),
                        SaveCheckpoint(checkpoints, history, routing),
                        *average,
                    ],
                )
        elif average:  # As at the end of `fit`.
            model.optimizer.finalize_variable_values(model.trainable_variables)
        models.save(model, run_dir / run_folder.MODEL)
        test = evaluation.measure(model, test_data, routing=False)
    if _processes.is_first_process():
        _plot(history.rows, routing.epochs, run_dir / "curves.png")
        facts = {**_costs(model), "seconds_per_step": clock.seconds_per_step}
        run_folder.write_result(run_dir, test, facts)
    # All exit together: JAX ends a process whose peers take too long.
    _processes.check_agreement("end of the run", epochs=epochs)
    return RunResult(test.accuracy, model, run_dir)


def _costs(model):
    cost = models.cost(model)
    return {x: getattr(cost, x) for x in ("params", "active_params", "macs")}


def _plot(rows, routing, path):
    curves = {name: [row.get(name) for row in rows] for name in rows[0]}
    inspection.plot_history(curves, routing, path)


@contextlib.contextmanager
def _last_epoch_kept(run_dir, checkpoints):
    """Writes the last complete epoch's `model.keras` if a run is stopped."""
    try:
        yield
    except (KeyboardInterrupt, callbacks.NonFiniteLossError):
        # With several processes, the others may not reach this point.
        if checkpoints.epochs() and _processes.num_processes() == 1:
            models.save(restore(run_dir), run_dir / run_folder.MODEL)
        raise


def _naming_corruption(config):
    """Names corrupt images in errors, unless they are skipped."""
    reads = config.data
    splits = (reads.train_split, reads.validation_split, reads.test_split)
    splits = () if reads.skip_corrupt else splits
    return _corruption.named_corruption(reads.dataset, splits, reads.data_dir)


def _verbosity():
    """The verbosity of `fit`: silent, a progress bar, or a line per epoch."""
    if not _processes.is_first_process():
        return 0
    return 1 if sys.stdout.isatty() else 2


def _tensorboard(config, folder):
    """Callbacks that write logs for TensorBoard, if set."""
    if not config.tensorboard:
        return []
    routing = callbacks.RoutingTensorBoard(folder)
    if not _processes.is_first_process():
        return [routing]
    return [routing, keras.callbacks.TensorBoard(folder, write_graph=False)]
