"""A training so small that a test can run it."""

import csv
import dataclasses

from keras_vmoe import data
from keras_vmoe import models
from keras_vmoe import training
from keras_vmoe.training.recipes import GROUP_OF

SMALL = training.TrainConfig(
    epochs=2,
    data=training.DataConfig(
        train_split="train[:128]",
        validation_split="validation[:64]",
        test_split="test[:64]",
        augmentation=data.Augmentation(crop_padding=1),
        batch_size=32,
    ),
    model=training.ModelConfig(
        image_size=8,
        patch_size=4,
        hidden_dim=16,
        num_layers=1,
        num_heads=2,
        mlp_dim=32,
    ),
    moe=models.MoEConfig(layers="every_1", num_experts=4),
    optimizer=training.OptimizerConfig(warmup=0.5),
)


def changed(config, **changes):
    """A configuration with other settings, whatever group they are in."""
    if isinstance(changes.get("optimizer"), str):
        name = changes["optimizer"]
        changes["optimizer"] = dataclasses.replace(config.optimizer, name=name)
    groups = {}
    for name in GROUP_OF.keys() & changes.keys():
        groups.setdefault(GROUP_OF[name], {})[name] = changes.pop(name)
    for name, settings in groups.items():
        group = changes.get(name, getattr(config, name))
        changes[name] = dataclasses.replace(group, **settings)
    return dataclasses.replace(config, **changes)


def config_of(run_dir, cache, **changes):
    """Settings of a run of three epochs."""
    changes = {"epochs": 3, **changes}
    return changed(SMALL, run_dir=str(run_dir), data_dir=cache, **changes)


def history(run_dir):
    with open(run_dir / "history.csv", newline="") as file:
        return list(csv.DictReader(file))
