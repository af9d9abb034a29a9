"""A training so small that a test can run it."""

import csv

from keras_vmoe import data
from keras_vmoe import models
from keras_vmoe import training

SMALL = training.TrainConfig(
    train_split="train[:128]",
    validation_split="validation[:64]",
    test_split="test[:64]",
    augmentation=data.Augmentation(crop_padding=1),
    batch_size=32,
    epochs=2,
    warmup=0.5,
    model=training.ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_dim=16,
        num_layers=2,
        num_heads=2,
        mlp_dim=32,
    ),
    moe=models.MoEConfig(layers="last_1", num_experts=4),
)


def history(run_dir):
    with open(run_dir / "history.csv", newline="") as file:
        return list(csv.DictReader(file))
