"""`inspect`: a report of what the experts do."""

import pathlib
import sys

import numpy as np

from keras_vmoe import data
from keras_vmoe import evaluation
from keras_vmoe import inspection
from keras_vmoe._extras import require
from keras_vmoe.cli.evaluating import write_csv
from keras_vmoe.cli.opening import load_images
from keras_vmoe.cli.opening import of_run
from keras_vmoe.cli.opening import open_model
from keras_vmoe.cli.opening import run_dir_of
from keras_vmoe.data import _corruption
from keras_vmoe.evaluation.ablation import ablation_table
from keras_vmoe.inspection.report import ABLATIONS


def inspect(
    model: str,
    dataset: str | None = None,
    *,
    output: str = "report",
    images: list[str] = (),
    split: str | None = None,
    data_dir: str | None = None,
    layers: list[str] = (),
    max_images: int | None = None,
    examples: int = 8,
    classes: str | None = None,
    batch_size: int = 64,
    ablations: bool = False,
):
    """Write a report of what the experts do with images.

    One page with pictures, and tables of all numbers: which expert sees what,
    classes, places, load, what is dropped.

    Args:
        model: Run folder or .keras file.
        dataset: TFDS name, digits or image_folder; default: the run's.
        output: Folder of the report.
        images: Files to look at, in the place of a dataset.
        split: TFDS split; default: what the run was tested on, or test.
        data_dir: Folder of the dataset or images; default: the run's.
        layers: Names of MoE layers; default: all.
        max_images: Images at most; default: all.
        examples: Images whose maps are shown, the first ones.
        classes: JSON list of names; default: the run's.
        batch_size: Images per step.
        ablations: Measure without each expert, with random routers, and by K.

    Example:
        keras-vmoe inspect runs/digits --output report
        keras-vmoe inspect model.keras --images a.jpg b.jpg
    """
    require("matplotlib", "plots")
    require("jinja2", "plots")  # Before the images are read, not after.
    opened, names = open_model(model, classes)
    if images and ablations:
        raise ValueError(
            "Accuracy needs labels. Received: --ablations with --images. Name "
            "a dataset, or leave one of them out."
        )
    options = {"layers": list(layers) or None, "max_images": max_images}
    options |= {"num_examples": examples, "class_names": names}
    options["verbose"] = sys.stdout.isatty()
    if images:
        size = opened.input_shape[1:3]
        pixels = data.read_images(
            list(images), size, preprocessing=opened.preprocessing
        )
        options["num_examples"] = max(examples, len(images))
        batches = np.array_split(pixels, -(-len(pixels) // batch_size))
        found = inspection.inspect(opened, batches, **options)
    else:
        given = of_run(model, "inspect", dataset, split, data_dir)
        dataset, split, data_dir = given
        batches = load_images(opened, dataset, split, data_dir, batch_size)
        with _corruption.named_corruption(dataset, [split], data_dir):
            found = inspection.inspect(opened, batches, **options)
    history = run_dir_of(model) / "history.csv"
    page = found.save(
        pathlib.Path(output), history if history.exists() else None
    )
    for name, lines in found.sentences().items():
        print(f"{name}:")
        print(*(f"  {line}" for line in lines), sep="\n")
    if ablations:
        rows = evaluation.ablate(opened, batches)
        print(ablation_table(rows))
        write_csv(page.with_name(ABLATIONS), rows)
    print(f"report: {page}")
