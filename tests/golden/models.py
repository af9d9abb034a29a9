"""The golden models: figures of the reference program and our twin."""

import json
import pathlib

import numpy as np

from keras_vmoe.models import ViTMoE

FOLDER = pathlib.Path(__file__).parent
NAMES = ("vit_last2_k2", "vit_every2_k1_bpr")


def read(name):
    """Figures, weights by the reference's names, and its configuration."""
    figures = dict(np.load(FOLDER / f"{name}.npz"))
    weights = {
        key.removeprefix("params/"): value
        for key, value in figures.items()
        if key.startswith("params/")
    }
    config = json.loads((FOLDER / f"{name}.json").read_text())
    return figures, weights, config


def build(config, image_size=16, **moe):
    """A `ViTMoE` by a configuration of the reference, without noise."""
    encoder = config["encoder"]
    sparse = encoder["moe"]
    router = sparse["router"]
    patch_size = config["patch_size"][0]
    num_tokens = (image_size // patch_size) ** 2
    num_tokens += config["classifier"] == "token"
    moe = {
        "layers": sparse["layers"],
        "num_experts": sparse["num_experts"],
        "num_selected_experts": router["num_selected_experts"],
        "capacity_factor": router["dispatcher"]["capacity_factor"],
        "batch_priority": router["dispatcher"]["batch_priority"],
        "images_per_group": sparse["group_size"] // num_tokens,
        "noise_std": 0.0,
        **moe,
    }
    return ViTMoE(
        image_size=image_size,
        patch_size=patch_size,
        hidden_dim=config["hidden_size"],
        num_layers=encoder["num_layers"],
        num_heads=encoder["num_heads"],
        mlp_dim=encoder["mlp_dim"],
        num_classes=config["num_classes"],
        pooling=config["classifier"],
        representation_size=config["representation_size"],
        moe=moe,
    )
