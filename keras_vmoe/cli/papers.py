"""`presets` and `convert`: the papers' models and pretrained weights."""

import csv
import json
import pathlib
import sys
from typing import Literal

import keras

from keras_vmoe import checkpoints
from keras_vmoe import models
from keras_vmoe._checks import check_sizes
from keras_vmoe.checkpoints.architecture import made_of
from keras_vmoe.models.presets import find_preset

COSTS = pathlib.Path(models.__file__).with_name("preset_costs.csv")


def presets(
    match: str = "", *, format: Literal["table", "csv", "json"] = "table"
) -> None:
    """List the papers' models, with their sizes and costs.

    Args:
        match: Part of their names.
        format: Output format.

    Example:
        keras-vmoe presets
        keras-vmoe presets convnext_t
        keras-vmoe presets --format csv > presets.csv
    """
    names = [name for name in models.presets() if match.lower() in name]
    if not names:
        models.from_preset(match)  # Raises, with the nearest names.
    # Counted once by `models.cost`; tests/models/test_presets.py compares.
    with open(COSTS, newline="") as file:
        costs = {row["preset"]: row for row in csv.DictReader(file)}
    rows = [_row(find_preset(name), costs[name]) for name in names]
    if format == "json":
        print(json.dumps([_numbers(row) for row in rows], indent=2))
        return
    if format == "csv":
        writer = csv.DictWriter(sys.stdout, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return
    print(LINE.format(*COLUMNS))
    for row in rows:
        values = ["" if x is None else x for x in row.values()]
        print(LINE.format(*values[: len(COLUMNS)]))
    notes = {row["preset"]: row["note"] for row in rows if row["note"]}
    print(
        "Millions of parameters, in total and active per token; giga "
        "multiply-adds per image; next to them the paper's figures, if it has "
        "any, and its ImageNet-1k accuracy (*: pretrained on ImageNet-21k) and "
        "images/s. Counted with the classes of the paper's table; "
        "`from_preset` builds V-MoE with 21843 classes unless `num_classes` is "
        "set."
    )
    for name, note in notes.items():
        print(f"{name}: {note}.")


def _row(preset, cost):
    """One preset, ours and the paper's, by names of columns."""
    return {
        "preset": preset.name,
        "classes": preset.paper_classes,
        "params": f"{int(cost['params']) / 1e6:.1f}",
        "paper_params": preset.paper_params,
        "active": f"{int(cost['active_params']) / 1e6:.1f}",
        "paper_active": preset.paper_active,
        "gmacs": f"{int(cost['macs']) / 1e9:.1f}",
        "paper_gflops": preset.paper_gflops,
        "paper_accuracy": preset.paper_accuracy,
        "paper_images_per_s": preset.paper_images,
        "source": preset.source,
        "note": preset.note,
    }


def _numbers(row):
    """A row whose figures are numbers, but for accuracies with a star."""
    found = {}
    for name, value in row.items():
        try:
            found[name] = float(value)
        except (TypeError, ValueError):
            found[name] = value
    return found


LINE = "{:<27} {:>7} {:>8} {:>8} {:>8} {:>7} {:>7} {:>7} {:>8} {:>8}"
COLUMNS = (
    "preset", "classes", "params", "(paper)", "active", "(paper)", "GMACs",
    "(paper)", "accuracy", "images/s",
)  # fmt: skip


def convert(
    checkpoint: str,
    output: str,
    *,
    image_size: int | None = None,
    num_selected_experts: int | None = None,
) -> None:
    """Convert pretrained weights to a .keras file.

    Args:
        checkpoint: V-MoE prefix (no .index), Orbax folder, .npz, .safetensors.
        output: New .keras file.
        image_size: Side of the images; positions are resized.
        num_selected_experts: K, which checkpoints do not store; default: 2.

    Example:
        keras-vmoe convert checkpoints/vmoe_b16_imagenet21k vmoe_b16.keras
        keras-vmoe convert ViT-B_16.npz vit_b16.keras --image_size 384
    """
    path = pathlib.Path(output)
    if path.suffix != ".keras" or path.exists() or not path.parent.is_dir():
        raise ValueError(
            "The output must be a new file that ends in '.keras', in a folder "
            f"that exists. Received: {output}."
        )
    given = {
        "image_size": image_size,
        "num_selected_experts": num_selected_experts,
    }
    check_sizes(**{x: size for x, size in given.items() if size is not None})
    bar = None

    def progress(done, total):
        nonlocal bar
        bar = bar or keras.utils.Progbar(total, unit_name="byte")
        bar.update(done)

    arrays = checkpoints.read(checkpoint, progress)
    model = made_of(arrays, image_size, num_selected_experts)
    models.save(model, path)
    print(f"model: {output}, {model.count_params():,} parameters")
