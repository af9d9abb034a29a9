"""`train`, `evaluate` and `predict`."""

import dataclasses
import pathlib
import signal
import sys
from collections.abc import Sequence
from typing import Any
from typing import Literal

import keras
import numpy as np

from keras_vmoe import data
from keras_vmoe import distribution
from keras_vmoe import evaluation
from keras_vmoe import training
from keras_vmoe.cli.opening import check_classes
from keras_vmoe.cli.opening import of_run
from keras_vmoe.cli.opening import open_model
from keras_vmoe.data import _corruption
from keras_vmoe.data import schema
from keras_vmoe.data.images import WANTED
from keras_vmoe.distribution import _processes
from keras_vmoe.evaluation import _description
from keras_vmoe.evaluation import comparison
from keras_vmoe.evaluation.comparison import SEED
from keras_vmoe.training import run_folder

# Of `models.set_routing`.
DIALS = (
    "capacity_factor",
    "num_selected_experts",
    "batch_priority",
    "images_per_group",
)


def train(
    config: training.TrainConfig,
    *,
    seeds: Sequence[int] = (),
    job_addresses: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    dry_run: bool = False,
) -> None:
    """Train a model: write a run folder, or resume a stopped run.

    Flags may name their group, as YAML files do: --optimizer.ema 0.99. With
    several seeds, finished runs are kept and a stopped one is resumed.

    Args:
        config: The run.
        seeds: One run each, in folders of run_dir.
        job_addresses: host:port of the first process.
        num_processes: Number of processes that train together.
        process_id: Index of this process, from 0.
        dry_run: Print settings, cost, memory and steps only.

    Example:
        keras-vmoe train --run_dir runs/big --moe.num_experts 16 --epochs 100
        keras-vmoe train --config runs/digits/config.yaml --run_dir runs/again
    """
    distribution.initialize(job_addresses, num_processes, process_id)
    if _processes.num_processes() > 1:
        # A process waiting in a collective would not be interrupted.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if dry_run:
        print(training.describe(config))
        return
    if seeds:
        _train_seeds(config, seeds)
        return
    result = training.train(config)
    if not _processes.is_first_process():
        return
    print(f"model: {result.run_dir / 'model.keras'}")
    print(f"history: {result.run_dir / 'history.csv'}")
    load = " and load of every expert" if result.model.moe_layers else ""
    print(f"curves{load}: {result.run_dir / 'curves.png'}")
    print(f"test accuracy: {result.test_accuracy:.4f}")


def _train_seeds(config, seeds):
    """Trains the runs of several seeds that are not finished, and compares."""
    folder = pathlib.Path(config.run_dir)
    runs = [
        dataclasses.replace(config, seed=seed, run_dir=f"{folder / SEED}{seed}")
        for seed in dict.fromkeys(seeds)
    ]
    done = [run_folder.is_finished(run) for run in runs]  # Or it raises.
    for run, is_finished in zip(runs, done, strict=True):
        if is_finished:
            print(f"{run.run_dir}: already finished")
            continue
        keras.backend.clear_session()
        result = training.train(run)
        print(f"{run.run_dir}: test accuracy {result.test_accuracy:.4f}")
    if _processes.is_first_process():
        found = evaluation.compare([[run.run_dir for run in runs]])
        print(comparison.comparison_table(found))


def predict(
    model: str,
    images: list[str],
    *,
    classes: str | None = None,
    top: int = 3,
    capacity_factor: float | Literal["dropless"] | None = None,
    num_selected_experts: int | None = None,
    batch_priority: bool | None = None,
    images_per_group: int | Literal["batch"] | None = None,
    dry_run: bool = False,
) -> None:
    """Classify image files.

    Args:
        model: Run folder or .keras file.
        images: PNG, JPEG, WebP, BMP or GIF files.
        classes: JSON list of names; default: the run's.
        top: Number of classes to print per image.
        capacity_factor: Experts'; default: the model's.
        num_selected_experts: K; default: the model's.
        batch_priority: Serve confident tokens first; default: the model's.
        images_per_group: Images routed together; default: the model's.
        dry_run: Print settings, cost, memory and steps only.

    Example:
        keras-vmoe predict runs/digits seven.png three.png
        keras-vmoe predict model.keras *.jpg --classes names.json --top 5
    """
    given = dict(locals())
    dials = {name: given[name] for name in DIALS}
    opened, names = open_model(model, classes, **dials)
    size, wanted = opened.input_shape[1:3], opened.preprocessing
    read = [(path, _read(path, size, wanted)) for path in images]
    good = [(path, x) for path, x in read if not isinstance(x, OSError)]
    bad = [str(x) for _, x in read if isinstance(x, OSError)]
    if not good or (bad and dry_run):
        raise OSError(_together(bad))
    pixels = np.stack([x for _, x in good])
    if dry_run:
        settings: dict[str, Any]
        settings = {"model": model, "images": images, "classes": classes}
        settings |= {"top": top, "backend": keras.backend.backend()}
        settings |= {"preprocessing": dataclasses.asdict(wanted), **dials}
        print(_description.describe(opened, settings, len(pixels), 1))
        return
    shows = sys.stdout.isatty()
    found = evaluation.classify(opened, pixels, names, top, shows)
    for (image, _), predictions in zip(good, found, strict=True):
        line = "  ".join(f"{name} {p:.3f}" for name, p in predictions)
        print(f"{image}: {line}")
    if bad:
        raise OSError(_together(bad))


def _together(messages):
    """Messages on several files, one per line, without repeating advice."""
    first, *others = messages
    return "\n".join([first, *(x.removeprefix(WANTED) for x in others)])


def _read(path, size, preprocessing):
    """The pixels of an image, or the error that says why there are none."""
    if pathlib.Path(path).is_dir():
        return IsADirectoryError(
            f"An image must be a file. Received: {path}, a folder. Name its "
            f"images: {pathlib.Path(path)}/*"
        )
    try:
        (image,) = data.read_images(path, size, preprocessing=preprocessing)
    except OSError as error:
        return error
    return image


def evaluate(
    model: str,
    dataset: str | None = None,
    *,
    split: str | None = None,
    data_dir: str | None = None,
    batch_size: int = 64,
    test_crop: float | None = None,
    skip_corrupt: bool = False,
    classes: str | None = None,
    capacity_factor: float | Literal["dropless"] | None = None,
    num_selected_experts: int | None = None,
    batch_priority: bool | None = None,
    images_per_group: int | Literal["batch"] | None = None,
    dry_run: bool = False,
) -> None:
    """Evaluate a model on a split of a dataset.

    Prints accuracy, loss, a table of the classes and routing statistics.

    Args:
        model: Run folder or .keras file.
        dataset: TFDS name, digits or image_folder; default: the run's.
        split: TFDS split; default: the run's test split, or test.
        data_dir: Folder of the dataset or images; default: the run's.
        batch_size: Images per step.
        test_crop: Share of the side kept; default: the model's.
        skip_corrupt: Skip corrupt images, with a warning.
        classes: JSON list of names; default: the run's.
        capacity_factor: Experts'; default: the model's.
        num_selected_experts: K; default: the model's.
        batch_priority: Serve confident tokens first; default: the model's.
        images_per_group: Images routed together; default: the model's.
        dry_run: Print settings, cost, memory and steps only.

    Example:
        keras-vmoe evaluate runs/digits
        keras-vmoe evaluate runs/digits --capacity_factor 0.5 --batch_priority
        keras-vmoe evaluate model.keras cifar10 --split 'test[:50%]'
    """
    given = dict(locals())
    dials = {name: given[name] for name in DIALS}
    opened, names = open_model(model, classes, **dials)
    wanted = data.Preprocessing.of(opened.preprocessing, test_crop=test_crop)
    found = of_run(model, "evaluate", dataset, split, data_dir)
    dataset, split, data_dir = found
    reads: dict[str, Any]
    reads = {"split": split, "data_dir": data_dir, "batch_size": batch_size}
    reads["skip_corrupt"] = skip_corrupt
    count, notes = None, []
    try:
        check_classes(model, opened, names, dataset, data_dir)
        count = schema.num_images(dataset, split, data_dir)
    except (OSError, ValueError) as error:
        if not dry_run:
            raise
        notes = [f"note: an evaluation would be refused. {error}"]
    if dry_run:
        settings: dict[str, Any]
        settings = {"model": model, "dataset": dataset, "classes": classes}
        settings |= {**reads, **dials, "backend": keras.backend.backend()}
        settings["preprocessing"] = dataclasses.asdict(wanted)
        text = _description.describe(opened, settings, count, batch_size)
        print(text, *notes, sep="\n")
        return
    images = data.load(
        dataset,
        image_size=opened.input_shape[1:3],
        training=False,
        num_classes=opened.output_shape[-1],
        preprocessing=wanted,
        **reads,
    )
    splits = [] if skip_corrupt else [split]
    with _corruption.named_corruption(dataset, splits, data_dir):
        measured = evaluation.measure(opened, images, sys.stdout.isatty())
    folder = f" in {data_dir}" if data_dir else ""
    print(f"data: {dataset}, {split}{folder}")
    print(evaluation.report(measured, names))
