"""`inspect`: a report on the experts."""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_vmoe import data
from keras_vmoe import evaluation
from keras_vmoe import inspection
from keras_vmoe._extras import require
from keras_vmoe.cli.opening import check_classes
from keras_vmoe.cli.opening import load_images
from keras_vmoe.cli.opening import of_run
from keras_vmoe.cli.opening import open_model
from keras_vmoe.cli.opening import run_dir_of
from keras_vmoe.data._corruption import named_corruption
from keras_vmoe.evaluation.ablation import ablation_table
from keras_vmoe.inspection.report import check_folder

EXAMPLES, MOST_EXAMPLES = 8, 24  # Of a dataset, and of files.


def inspect(
    model: str,
    dataset: str | None = None,
    *,
    output: str = "report",
    images: Sequence[str] = (),
    split: str | None = None,
    data_dir: str | None = None,
    layers: Sequence[str] = (),
    max_images: int | None = None,
    examples: int | None = None,
    classes: str | None = None,
    batch_size: int = 64,
    ablations: bool = False,
) -> None:
    """Write a report on how the experts treat images.

    One page with pictures, and tables of all numbers: the experts' patches,
    classes, places, load and drops.

    Args:
        model: Run folder or .keras file.
        dataset: TFDS name, digits or image_folder; default: the run's.
        output: Folder of the report.
        images: Image files to inspect instead of a dataset.
        split: TFDS split; default: the run's test split, or test.
        data_dir: Folder of the dataset or images; default: the run's.
        layers: Names of MoE layers; default: all.
        max_images: Maximum number of images; default: all.
        examples: Images to map; default: 8, or up to 24 files.
        classes: JSON list of names; default: the run's.
        batch_size: Images per step.
        ablations: Measure without each expert, with random routers, and by K.

    Example:
        keras-vmoe inspect runs/digits --output report
        keras-vmoe inspect model.keras --images a.jpg b.jpg
    """
    require("matplotlib", "plots")
    require("jinja2", "plots")
    if images and (ablations or dataset is not None):
        raise ValueError(
            "Files are inspected instead of a dataset, and without labels."
            f" Received: --images with {dataset or '--ablations'}. Omit one "
            "of them."
        )
    check_folder(pathlib.Path(output))  # Before images are read, not after.
    opened, names = open_model(model, classes)
    options: dict[str, Any] = {
        "layers": list(layers) or None,
        "max_images": max_images,
        "verbose": sys.stdout.isatty(),
    }
    shown: dict[str, Any] = {"class_names": names}
    if images:
        title = f"{model} on files"
        splits, batches = [], _read(images, opened, batch_size)
        shown["image_names"] = [pathlib.Path(x).name for x in images]
        most = min(len(images), MOST_EXAMPLES)
    else:
        given = of_run(model, "inspect", dataset, split, data_dir)
        dataset, split, data_dir = given
        title = f"{model} on {dataset}, {split}"
        check_classes(model, opened, names, dataset, data_dir)
        splits = [split]
        batches = load_images(opened, dataset, split, data_dir, batch_size)
        most = EXAMPLES
    shown["num_examples"] = most if examples is None else examples
    with named_corruption(dataset, splits, data_dir):
        found = inspection.inspect(opened, batches, **options, **shown)
    history = run_dir_of(model) / "history.csv"
    written: dict[str, Any] = {"title": title}
    written["history"] = history if history.exists() else None
    page = found.save(output, **written)
    _print_sentences(found)
    if ablations:
        print(f"report: {page}; the ablations follow")
        with named_corruption(dataset, splits, data_dir):
            rows = evaluation.ablate(opened, batches, **options)
        print(ablation_table(rows))
        page = found.save(output, ablations=rows, **written)
    print(f"report: {page}")


def _read(paths, model, batch_size):
    """Batches of image files."""
    pixels = data.read_images(
        list(paths),
        model.input_shape[1:3],
        preprocessing=model.preprocessing,
    )
    return np.array_split(pixels, -(-len(pixels) // batch_size))


def _print_sentences(found):
    for name, lines in found.sentences().items():
        print(f"{name}:")
        print(*(f"  {line}" for line in lines), sep="\n")
