"""Runs side by side: settings, costs, and how certain differences are.

Everything is read from the run folders; no model is loaded.
"""

import csv
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_vmoe._extras import require

SEED = "seed_"  # Prefix of the folders of a run with several seeds.
CLASSES, PREDICTIONS = "classes.json", "predictions.npz"
RESULT = "result.json"
RESAMPLES = 2000
LEVEL = 0.95
# Settings that say nothing about the model or its training.
PLACES = ("run_dir", "seed", "data.data_dir", "tensorboard")


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run, read from its folder.

    Attributes:
        path: Folder.
        settings: Dict from dotted names to settings.
        result: Dict of test accuracy, cost and time per step.
        history: List of dicts, the metrics of each epoch.
        class_names: Names of the classes.
        labels: `(images,)` classes of the test images.
        predicted: `(images,)` predicted classes.
    """

    path: pathlib.Path
    settings: dict[str, Any]
    result: dict[str, Any]
    history: list[dict[str, float]]
    class_names: list[str]
    labels: np.ndarray
    predicted: np.ndarray


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        rows: One dict per run, or folder of seeds: `run`, `seeds`, `params`,
            `active_params`, `macs`, `accuracy`, `accuracy_std` (over the seeds,
            None for one), `difference` from the accuracy of the first row, and
            its 95% confidence interval `difference_low`, `difference_high`,
            `seconds_per_step` (None for runs resumed when only their test was
            left), `dropped_share`, `min_expert_load` and `max_expert_load` of
            the last epoch (None for dense models), and `settings`, those that
            differ.
        settings: Dict from the name of each setting that differs to its values,
            one per row.
        groups: List of lists of `Run`s, one per row.
    """

    rows: list[dict[str, Any]]
    settings: dict[str, list[str]]
    groups: list[list[Run]]


def compare(
    runs: str | pathlib.Path | Sequence[Any], seed: int = 0
) -> Comparison:
    """Compares finished runs of one data set, and seeds of runs.

    The confidence interval comes from the paired bootstrap: test images, the
    same for both sides, and the seeds of each side are resampled with
    replacement.

    Args:
        runs: Paths of run folders, or of folders with the runs of several seeds
            (`keras-vmoe train --seeds`), or lists of run folders. All are
            compared with the first.
        seed: Integer, seed of the bootstrap.

    Returns:
        A `Comparison`.

    Raises:
        FileNotFoundError: If a folder has no finished run.
        ValueError: If the runs were tested on different images.

    Example:

    >>> compare(["runs/dense", "runs/moe"]).rows  # doctest: +SKIP
    """
    if isinstance(runs, (str, pathlib.Path)):
        runs = [runs]
    groups = [_read_group(path) for path in runs]
    if not groups:
        raise ValueError("There must be a run to compare. Received: none.")
    _check_same_images(groups)
    generator = np.random.default_rng(seed)
    first = _hits(groups[0])
    rows = []
    for path, group in zip(runs, groups, strict=True):
        hits = _hits(group)
        low, high = (0.0, 0.0)
        if group is not groups[0]:
            low, high = _interval(first, hits, generator)
        rows.append(
            {
                "run": _name_of(path),
                "seeds": len(group),
                **_means(group),
                "accuracy_std": _std(hits.mean(axis=-1)),
                "difference": float(hits.mean() - first.mean()),
                "difference_low": low,
                "difference_high": high,
            }
        )
    settings = _differing(groups)
    for i, row in enumerate(rows):
        row["settings"] = "; ".join(f"{k}={x[i]}" for k, x in settings.items())
    return Comparison(rows, settings, groups)


def _name_of(path):
    """A path, or the parent folder of the first path of a list."""
    if isinstance(path, (list, tuple)):
        return str(pathlib.Path(path[0]).parent)
    return str(path)


def _read_group(path):
    """The run in a folder, the runs of its seeds, or the runs of a list."""
    if isinstance(path, (list, tuple)):
        return [_read_run(pathlib.Path(x)) for x in path]
    path = pathlib.Path(path)
    seeds = sorted(path.glob(f"{SEED}*"), key=lambda x: (len(x.name), x.name))
    return [_read_run(x) for x in seeds] if seeds else [_read_run(path)]


def _read_run(path):
    needed = ("config.yaml", CLASSES, "history.csv", RESULT, PREDICTIONS)
    missing = [name for name in needed if not (path / name).exists()]
    if missing:
        raise FileNotFoundError(
            "Compared runs must be finished, by this version of "
            f"keras_vmoe. Received: {str(path)!r} without {missing}. "
            + (
                "Name the folder of a run, or of a run's seeds."
                if "config.yaml" in missing
                else "Finish its training: keras-vmoe train --config "
                f"{path / 'config.yaml'}"
            )
        )
    yaml = require("yaml", "cli")
    settings = yaml.safe_load((path / "config.yaml").read_text())
    with open(path / "history.csv", newline="") as file:
        history = [
            {name: float(x) for name, x in row.items() if x}
            for row in csv.DictReader(file)
        ]
    with np.load(path / PREDICTIONS) as arrays:
        labels, predicted = arrays["labels"], arrays["predicted"]
    result = json.loads((path / RESULT).read_text())
    names = json.loads((path / CLASSES).read_text())
    return Run(path, flat(settings), result, history, names, labels, predicted)


def flat(settings, prefix=""):
    """Flattens nested settings to dotted names."""
    found = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def _check_same_images(groups):
    """Raises unless all runs were tested on the same images."""
    first = groups[0][0]
    for run in (run for group in groups for run in group):
        there = [x for one in (first, run) for x in _data_of(one)]
        same = there[:2] == there[2:] and run.class_names == first.class_names
        if not same or not np.array_equal(run.labels, first.labels):
            raise ValueError(
                "Compared runs must have been tested on the same "
                f"images. Received: {first.path} on {there[0]}, {there[1]} "
                f"({len(first.labels)} images) and {run.path} on {there[2]}, "
                f"{there[3]} ({len(run.labels)} images)."
            )


def _data_of(run):
    """The data set of a run (with the path of an image folder), and split."""
    dataset = run.settings.get("data.dataset")
    if dataset == "image_folder":
        dataset = f"{dataset} {run.settings.get('data.data_dir')}"
    return dataset, run.settings.get("data.test_split")


def _hits(group):
    """`(seeds, images)`: whether each image is classified correctly."""
    return np.stack([run.predicted == run.labels for run in group])


def _interval(first, second, generator):
    """Paired-bootstrap interval of the difference of two accuracies."""
    found = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        images = generator.integers(first.shape[1], size=first.shape[1])
        means = []
        for hits in (first, second):
            seeds = generator.integers(len(hits), size=len(hits))
            means.append(hits[seeds].mean(axis=0)[images].mean())
        found[i] = means[1] - means[0]
    tail = (1 - LEVEL) / 2
    return tuple(map(float, np.quantile(found, [tail, 1 - tail])))


def _std(values):
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _means(group):
    """Means over the seeds of results and loads."""
    results = ("params", "active_params", "macs", "accuracy")
    results += ("seconds_per_step",)
    loads = ("dropped_share", "min_expert_load", "max_expert_load")
    found = {name: [x.result[name] for x in group] for name in results}
    found |= {name: [x.history[-1].get(name) for x in group] for name in loads}
    return {
        name: None if None in values else float(np.mean(values))
        for name, values in found.items()
    }


def _differing(groups):
    """Settings that differ between rows, by name."""
    names = dict.fromkeys(
        name for group in groups for run in group for name in run.settings
    )
    found = {}
    for name in names:
        values = [
            list(dict.fromkeys(str(x.settings.get(name)) for x in group))
            for group in groups
        ]
        if name not in PLACES and any(x != values[0] for x in values):
            found[name] = [", ".join(x) for x in values]
    return found


def comparison_table(found):
    """A `Comparison` as text."""
    titles = ("run", "seeds", "params", "active", "MACs", "accuracy")
    titles += ("difference from the first", "ms/step", "dropped", "load")
    table = [titles]
    for row in found.rows:
        spread = row["accuracy_std"]
        difference = "{difference:+.4f} [{difference_low:+.4f}, "
        difference += "{difference_high:+.4f}]"
        dropped, low = row["dropped_share"], row["min_expert_load"]
        seconds = row["seconds_per_step"]
        table.append(
            (
                row["run"],
                str(row["seeds"]),
                amount(row["params"]),
                amount(row["active_params"]),
                amount(row["macs"]),
                f"{row['accuracy']:.4f}"
                + (f" ± {spread:.4f}" if row["seeds"] > 1 else ""),
                "" if row is found.rows[0] else difference.format(**row),
                "" if seconds is None else f"{1e3 * seconds:.0f}",
                "" if dropped is None else f"{dropped:.1%}",
                ""
                if low is None
                else f"{low:.2f} to {row['max_expert_load']:.2f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(x.ljust(n) for x, n in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    if len(table) > 2:
        lines += ["", WARNING.format(min(row["seeds"] for row in found.rows))]
        lines += ["settings that differ:" if found.settings else SAME]
    for name, values in found.settings.items():
        lines.append(f"  {name}: {' | '.join(values)}")
    return "\n".join(lines)


WARNING = (
    "intervals: 95%, test images and seeds resampled; with {} seed(s) on a "
    "side, they include little or none of the training noise"
)
SAME = "only the seed differs"


def amount(number):
    """A large number in few digits: 12.1 k, 3.45 M, 1.2 G."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def curves_figure(found):
    """Validation accuracy over the epochs: mean and range of the seeds."""
    figure = require("matplotlib.figure", "plots").Figure(
        figsize=(7, 4.5), layout="constrained"
    )
    axis = figure.subplots()
    for row, group in zip(found.rows, found.groups, strict=True):
        length = min(len(run.history) for run in group)
        curves = np.array(
            [
                [x.get("val_accuracy", np.nan) for x in run.history[:length]]
                for run in group
            ]
        )
        epochs = np.arange(1, length + 1)
        (line,) = axis.plot(epochs, curves.mean(axis=0), label=row["run"])
        axis.fill_between(
            epochs,
            curves.min(axis=0),
            curves.max(axis=0),
            color=line.get_color(),
            alpha=0.2,
            linewidth=0,
        )
    axis.set_title("mean, and range of the seeds", fontsize=10)
    axis.set_xlabel("epoch")
    axis.set_ylabel("validation accuracy")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    axis.legend()
    return figure
