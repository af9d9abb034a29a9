"""`presets` and `convert`: the papers' models and pretrained weights."""

import csv
import pathlib

import keras

from keras_vmoe import checkpoints
from keras_vmoe import models
from keras_vmoe._checks import check_sizes
from keras_vmoe.models.presets import find_preset

COSTS = pathlib.Path(models.__file__).with_name("preset_costs.csv")


def presets(match: str = ""):
    """List the papers' models, with their sizes and costs.

    Args:
        match: Part of their names.

    Example:
        keras-vmoe presets
        keras-vmoe presets convnext_t
    """
    names = [name for name in models.presets() if match.lower() in name]
    if not names:
        models.from_preset(match)  # Raises, with the nearest names.
    # Counted once by `models.cost`; tests/models/test_presets.py compares.
    with open(COSTS, newline="") as file:
        costs = {row["preset"]: row for row in csv.DictReader(file)}
    print(_PRESET_LINE.format(*_PRESET_COLUMNS))
    for name in names:
        preset, cost = find_preset(name), costs[name]
        row = (
            name,
            preset.paper_classes,
            f"{int(cost['params']) / 1e6:.1f}",
            preset.paper_params or "",
            f"{int(cost['active_params']) / 1e6:.1f}",
            preset.paper_active or "",
            f"{int(cost['macs']) / 1e9:.1f}",
            preset.paper_gflops or "",
        )
        print(_PRESET_LINE.format(*row))
    print(
        "Millions of parameters, in all and active per token; giga "
        "multiply-adds per image; beside them the paper's figures, if it has "
        "any. Counted with the classes of the paper's table; `from_preset` "
        "makes V-MoE with 21843 classes unless `num_classes` is set."
    )


_PRESET_LINE = "{:<27} {:>7} {:>8} {:>7} {:>8} {:>7} {:>7} {:>6}"
_PRESET_COLUMNS = (
    "preset", "classes", "params", "(paper)", "active", "(paper)", "GMACs",
    "(paper)",
)  # fmt: skip


def convert(
    checkpoint: str,
    output: str,
    *,
    image_size: int | None = None,
    num_selected_experts: int | None = None,
):
    """Convert pretrained weights to a .keras file.

    Args:
        checkpoint: V-MoE prefix (no .index), Orbax folder, .npz.
        output: New .keras file.
        image_size: Side of the images; positions are resized.
        num_selected_experts: K, which no checkpoint holds; default: 2.

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
    config = checkpoints.vmoe_config(arrays, image_size)
    if num_selected_experts is not None:
        if config["moe"] is None:
            raise ValueError(
                "A dense model selects no experts. Received: "
                f"--num_selected_experts {num_selected_experts}. Leave it out."
            )
        config["moe"]["num_selected_experts"] = num_selected_experts
    model = checkpoints.load_vmoe(models.ViTMoE(**config), arrays)
    models.save(model, path)
    print(f"model: {output}, {model.count_params():,} parameters")
