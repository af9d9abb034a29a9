"""`fewshot`, `probe`, `robustness`, `sweep` and `compare`."""

import csv
import io
import pathlib
import sys
from collections.abc import Sequence
from typing import Any
from typing import Literal

import numpy as np

from keras_vmoe import _files
from keras_vmoe import evaluation
from keras_vmoe._extras import require
from keras_vmoe.cli.opening import check_classes
from keras_vmoe.cli.opening import load_images
from keras_vmoe.cli.opening import numbers
from keras_vmoe.cli.opening import open_model
from keras_vmoe.cli.opening import setting_of_run
from keras_vmoe.data import _corruption
from keras_vmoe.data import schema
from keras_vmoe.evaluation import comparison
from keras_vmoe.evaluation import imagenet_sets
from keras_vmoe.evaluation import sweeping
from keras_vmoe.evaluation.fewshot import SETS
from keras_vmoe.evaluation.fewshot import check_rule
from keras_vmoe.evaluation.fewshot import check_settings
from keras_vmoe.evaluation.fewshot import l2_regs_for
from keras_vmoe.evaluation.probing import check_probe
from keras_vmoe.models.presets import find_preset

SHOTS = (1, 5, 10, 25)


def fewshot(
    model: str,
    datasets: list[str],
    *,
    shots: Sequence[int] = (),
    seeds: int = 3,
    penalty: float | Literal["held_out", "test"] = "held_out",
    train_split: str | None = None,
    test_split: str | None = None,
    data_dir: str | None = None,
    batch_size: int = 64,
    csv: str | None = None,
) -> None:
    """Evaluate features by a few labeled images of each class.

    A linear classifier in closed form, as in V-MoE. The paper's datasets use
    its splits: birds, caltech101, cars196, cifar100,
    colorectal_histology, dtd, imagenet, pets, uc_merced.

    Args:
        model: Run folder or .keras file.
        datasets: TFDS names, digits, or those above.
        shots: Examples per class; default: 1 5 10 25.
        seeds: Draws of examples.
        penalty: One for all datasets: chosen from 2^-10 to 2^19 on training
            images that were not drawn, or on the test images (as in the
            reference), or fixed (big_vision: 1024).
        train_split: To draw from, in all datasets; default: the paper's.
        test_split: To test on, in all datasets; default: the paper's.
        data_dir: Folder of the datasets.
        batch_size: Images per step.
        csv: File to write every accuracy to.

    Example:
        keras-vmoe fewshot runs/digits digits --shots 1 5
        keras-vmoe fewshot model.keras birds pets --data_dir datasets
    """
    check_rule(penalty)
    check_settings(tuple(shots) or SHOTS, l2_regs_for(penalty), range(seeds))
    check_writable(csv)
    opened, _ = open_model(model)
    shots = tuple(shots) or SHOTS
    splits = (train_split, test_split)
    _check_splits(datasets, splits, data_dir)
    results = {}
    for name in datasets:
        train, test = _features(opened, name, splits, data_dir, batch_size)
        results[name] = evaluation.few_shot(
            train, test, shots, l2_regs_for(penalty), range(seeds)
        )
    try:
        chosen = evaluation.choose_l2(list(results.values()), penalty)
    except ValueError:  # Keep the measurements.
        write_csv(csv, _accuracies(results))
        raise
    width = max(map(len, ("dataset", *results)))
    print(
        f"{'dataset':<{width}}"
        + "".join(f"{f'{shot}-shot':>18}" for shot in shots)
    )
    for name, found in results.items():
        accuracy = found.accuracy_at(chosen)
        spread = accuracy.std(axis=0, ddof=1) if seeds > 1 else None
        cells = [f"{x:.4f}" for x in accuracy.mean(axis=0)]
        if spread is not None:
            pairs = zip(cells, spread, strict=True)
            cells = [f"{x} ± {s:.4f}" for x, s in pairs]
        print(f"{name:<{width}}" + "".join(f"{x:>18}" for x in cells))
    print(f"{'penalty':<{width}}" + "".join(f"{x:>18g}" for x in chosen))
    words: dict[Any, str] = {
        "held_out": "chosen on training images that were not drawn",
        "test": "chosen on the test images, on which it is also scored",
    }
    print(f"accuracy of {seeds} draws, mean and standard deviation; penalty "
          f"{words.get(penalty, 'fixed')}")  # fmt: skip
    write_csv(csv, _accuracies(results, chosen))


def _accuracies(results, chosen=None):
    """One row for each data set, draw, number of shots and penalty."""
    return [
        {
            "dataset": name,
            "seed": seed,
            "shots": shot,
            "penalty": l2,
            "chosen": "" if chosen is None else l2 == chosen[j],
            "accuracy": found.accuracy[i, j, k],
            "held_out_accuracy": found.held_out_accuracy[i, j, k],
        }
        for name, found in results.items()
        for i, seed in enumerate(found.seeds)
        for j, shot in enumerate(found.shots)
        for k, l2 in enumerate(found.l2_regs)
    ]


def probe(
    model: str,
    datasets: list[str],
    *,
    solver: Literal["lbfgs", "sgd"] = "lbfgs",
    sweep: Sequence[float] = (),
    held_out: float = 0.1,
    epochs: int = 100,
    seed: int = 0,
    train_split: str | None = None,
    test_split: str | None = None,
    data_dir: str | None = None,
    batch_size: int = 64,
    csv: str | None = None,
) -> None:
    """Train a new head on frozen features.

    The papers name no settings of their linear probes; these are ours.

    Args:
        model: Run folder or .keras file.
        datasets: TFDS names, or digits.
        solver: Logistic regression, or momentum for many images.
        sweep: Penalties or learning rates to choose from.
        held_out: Share of the training images to choose by.
        epochs: Passes, or iterations at most.
        seed: Of the held-out images and the order.
        train_split: Split to train on; default: train.
        test_split: Split to test on; default: test.
        data_dir: Folder of the datasets.
        batch_size: Images per step of the features.
        csv: File to write the accuracies to.

    Example:
        keras-vmoe probe runs/digits digits
        keras-vmoe probe model.keras cifar10 --solver sgd --sweep 0.01 0.1
    """
    check_writable(csv)
    check_probe(solver, sweep or None, held_out, epochs)
    if solver == "lbfgs":
        require("scipy", "data")
    opened, _ = open_model(model)
    splits = (train_split, test_split)
    _check_splits(datasets, splits, data_dir)
    what = "penalty" if solver == "lbfgs" else "learning rate"
    rows = []
    for name in datasets:
        train, test = _features(opened, name, splits, data_dir, batch_size)
        found = evaluation.linear_probe(
            train, test, solver, sweep or None, held_out, epochs, seed=seed
        )
        print(
            f"{name}: {found.accuracy:.4f} of {len(test[1])} test images, "
            f"{what} {found.chosen:g}"
        )
        for value, accuracy in found.held_out_accuracy.items():
            print(f"  {what} {value:g}: {accuracy:.4f} on held-out images")
            row = {"dataset": name, "solver": solver, what: value}
            row["held_out_accuracy"] = accuracy
            best = value == found.chosen
            rows.append({**row, "accuracy": found.accuracy if best else ""})
    write_csv(csv, rows)


def robustness(
    model: str,
    *,
    data_dir: str | None = None,
    classes: str | None = None,
    preset: str | None = None,
    batch_size: int = 64,
    csv: str | None = None,
) -> None:
    """Evaluate on ImageNet, ReaL, V2, A, R, Sketch and C.

    Measures the sets that TFDS has prepared and names the others. ImageNet-A
    and -R are scored among their 200 classes, as published, and among all 1000.

    Args:
        model: Run folder or .keras file.
        data_dir: Folder of the datasets; default: TFDS's own.
        classes: JSON list of WordNet ids, for a model with more classes.
        preset: Preset whose row of the paper to print; default: the run's.
        batch_size: Images per step.
        csv: File to write the accuracies to.

    Example:
        keras-vmoe robustness runs/in1k --data_dir datasets
    """
    check_writable(csv)
    opened, names = open_model(model, classes)
    if names == numbers(len(names)):
        names = None
    if preset is None:
        preset = setting_of_run(model, "model.preset") or opened.name
    else:
        find_preset(preset)  # Raises, with the nearest names.
    rows = []

    def keep(name, score):
        rows.append({"set": name, **vars(score)})
        write_csv(csv, rows, announced=False)

    found = evaluation.robustness(
        opened, data_dir, batch_size, names, sys.stdout.isatty(), keep
    )
    print(imagenet_sets.robustness_table(found, preset))
    write_csv(csv, rows)


def sweep(
    model: str,
    dataset: str,
    *,
    capacity_factor: Sequence[float | Literal["dropless"]] = (),
    num_selected_experts: Sequence[int] = (),
    batch_priority: Sequence[bool] = (),
    images_per_group: Sequence[int | Literal["batch"]] = (),
    split: str = "test",
    data_dir: str | None = None,
    batch_size: int = 64,
    csv: str | None = None,
    plot: str | None = None,
) -> None:
    """Measure a trained model over its routing dial.

    All combinations of the values, with the same weights: accuracy,
    multiply-adds, dropped choices and speed.

    Args:
        model: Run folder or .keras file.
        dataset: TFDS name, digits or image_folder.
        capacity_factor: Experts'.
        num_selected_experts: K.
        batch_priority: Serve confident tokens first: false true.
        images_per_group: Images routed together.
        split: TFDS split.
        data_dir: Folder of the dataset or images.
        batch_size: Images per step.
        csv: File to write the table to.
        plot: PNG file of accuracy against compute.

    Example:
        keras-vmoe sweep runs/digits digits --capacity_factor 0.25 0.5 1
    """
    settings = {
        "num_selected_experts": num_selected_experts,
        "batch_priority": batch_priority,
        "images_per_group": images_per_group,
        "capacity_factor": capacity_factor,
    }
    settings = {name: values for name, values in settings.items() if values}
    if not settings:
        raise ValueError(
            "There must be values to combine. Received: none. For example: "
            "--capacity_factor 0.25 0.5 1 --batch_priority false true"
        )
    check_writable(csv)
    check_writable(plot)
    if plot:
        require("matplotlib", "plots")  # Before it is measured, not after.
    opened, names = open_model(model)
    check_classes(model, opened, names, dataset, data_dir)
    images = load_images(opened, dataset, split, data_dir, batch_size)
    with _corruption.named_corruption(dataset, [split], data_dir):
        rows = evaluation.sweep_routing(
            opened, images, sys.stdout.isatty(), **settings
        )
    print(f"data: {dataset}, {split}")
    print(sweeping.sweep_table(rows))
    write_csv(csv, rows)
    _write_figure(plot, lambda: sweeping.sweep_figure(rows))


def compare(
    runs: list[str],
    *,
    seed: int = 0,
    csv: str | None = None,
    plot: str | None = None,
) -> None:
    """Compare finished runs, and seeds of runs, on their test images.

    Prints cost, accuracy, its difference from the first with a 95% confidence
    interval (paired bootstrap), and the settings that differ.

    Args:
        runs: Run folders, or folders of seeds (train --seeds).
        seed: Of the bootstrap.
        csv: File to write the table to.
        plot: PNG file of the accuracy over the epochs.

    Example:
        keras-vmoe compare runs/dense runs/moe --plot curves.png
    """
    check_writable(csv)
    check_writable(plot)
    if plot:
        require("matplotlib", "plots")
    found = evaluation.compare(runs, seed)
    print(comparison.comparison_table(found))
    write_csv(csv, found.rows)
    _write_figure(plot, lambda: comparison.curves_figure(found))


def _splits_of(name, splits):
    """`(dataset, split)` to train on and to test on."""
    default = ((name, "train"), (name, "test"))
    pairs = zip(SETS.get(name, default), splits, strict=True)
    return [(dataset, given or split) for (dataset, split), given in pairs]


def _check_splits(datasets, splits, data_dir):
    """Raises for a dataset or split that is not there, before any is read."""
    for name in datasets:
        for dataset, split in _splits_of(name, splits):
            schema.num_images(dataset, split, data_dir)


def _features(model, name, splits, data_dir, batch_size):
    """Features and labels of the two splits of a dataset."""
    found = []
    for dataset, split in _splits_of(name, splits):
        images = load_images(model, dataset, split, data_dir, batch_size)
        with _corruption.named_corruption(dataset, [split], data_dir):
            found.append(
                evaluation.extract_features(model, images, sys.stdout.isatty())
            )
    return found


def check_writable(path):
    """Raises early for a file that could not be written later."""
    if path is None:
        return
    path = pathlib.Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(
            "A table or plot must be a file in a folder that exists. Received: "
            f"{str(path)!r}. Make the folder, or name another file."
        )


def write_csv(path, rows, announced=True):
    """Writes dicts as CSV, if there is a path."""
    if path is None:
        return
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        plain = {k: x.item() if isinstance(x, np.generic) else x
                 for k, x in row.items()}  # fmt: skip
        writer.writerow(plain)
    _files.write_text(pathlib.Path(path), text.getvalue())
    if announced:
        print(f"table: {path}")


def _write_figure(path, make):
    """Writes a figure as PNG, if there is a path."""
    if path is None:
        return
    with _files.replacing(pathlib.Path(path)) as partial:
        make().savefig(partial, format="png", dpi=120)
    print(f"plot: {path}")
