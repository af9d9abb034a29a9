"""MoE against its dense twin on CIFAR-10: accuracy, load, training time.

    KERAS_BACKEND=tensorflow python benchmarks/cifar10.py --data_dir DIR --save

The same recipe (`cifar10_small`), budget and seeds for each model of a family:
the dense twin, 8 experts of which a token passes 1 (equal active parameters),
and 2, and a dense twin whose MLPs are widened to the active parameters of the
latter. The last epoch's model is measured once on the test split; nothing is
chosen by it: choices are made with `--validation`, which trains on the first
nine tenths of the training images, measures on the last and never opens the
test split.
Every run is a process of its own; models of one seed run one after the other.
Training time is CPU time, which other work on the machine changes little.
"""

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
import time

import interleaved
import keras
import numpy as np

from keras_vmoe import data
from keras_vmoe import inspection
from keras_vmoe import models
from keras_vmoe import training
from keras_vmoe.training import building

RESULTS = pathlib.Path(__file__).parent / "results" / "cifar10.csv"
MOE = {"layers": "last_2", "num_experts": 8, "capacity_factor": 1.05}
VARIANTS = {
    "dense": None,
    "8 experts, K=1": {**MOE, "num_selected_experts": 1},
    "8 experts, K=2": {**MOE, "num_selected_experts": 2},
    "dense, wider": None,
    "8 experts, K=1, C=1.5": {
        **MOE, "num_selected_experts": 1, "capacity_factor": 1.5
    },
}  # fmt: skip
# Hidden features of the dense twins' MLPs, as the models count them.
WIDTHS = {
    "vit": {"mlp_dim": 64},
    "convnext": {"mlp_ratio": 4},
    "swin": {"mlp_ratio": 2},
}
WIDER = {
    "vit": {"mlp_dim": 98},
    "convnext": {"mlp_ratio": 6},
    "swin": {"mlp_ratio": 3},
}
RECIPE = training.recipes.load("cifar10_small")
KEYS = ("backend", "family", "model", "seed")  # Of a row of the results.
# What is trained on, what is measured and the images of the former, without and
# with `--validation`.
SPLITS = {
    False: ("train", "test", 50_000),
    True: ("train[:90%]", "train[90%:]", 45_000),
}


def make_model(family, variant, num_classes=10):
    """A model of a family."""
    width = (WIDER if variant == "dense, wider" else WIDTHS)[family]
    shared = {"image_size": 32, "num_classes": num_classes, **width}
    if family == "vit":
        return models.ViTMoE(
            patch_size=4, hidden_dim=32, num_layers=4, num_heads=4,
            pooling="gap", moe=VARIANTS[variant], **shared,
        )  # fmt: skip
    if family == "swin":
        return models.SwinMoE(
            depths=(2, 4), dims=(16, 32), num_heads=(2, 4), patch_size=2,
            window_size=4, moe=VARIANTS[variant], **shared,
        )  # fmt: skip
    return models.ConvNeXtMoE(
        depths=(2, 2, 2), dims=(16, 32, 64), patch_size=2,
        layer_scale_init_value=None, moe=VARIANTS[variant], **shared,
    )  # fmt: skip


def main():
    """Runs all models, prints a table and, with `--save`, keeps it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--families", nargs="+", default=["vit", "convnext"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", choices=VARIANTS,
                        default=list(VARIANTS))  # fmt: skip
    parser.add_argument("--epochs", type=int, default=RECIPE.epochs)
    parser.add_argument("--validation", action="store_true")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.validation and arguments.save:
        parser.error("results are those of the test split: leave --save out")
    if arguments.one:
        family, variant, seed = arguments.one
        print(json.dumps(run(arguments, family, variant, int(seed))))
        return
    for family in arguments.families:
        rows = []
        for seed in arguments.seeds:
            for variant in arguments.models:
                rows.append(child(family, variant, seed))
                print(rows[-1], flush=True)
                if arguments.save:
                    interleaved.write(RESULTS, rows, KEYS)
        table(family, rows)


def child(family, variant, seed):
    """One run in a process of its own."""
    command = [sys.executable, *sys.argv, "--one", family, variant, str(seed)]
    done = subprocess.run(  # noqa: S603
        command, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def run(arguments, family, variant, seed):
    """Trains and measures one model; one row of the results."""
    keras.utils.set_random_seed(seed)
    config = dataclasses.replace(RECIPE, epochs=arguments.epochs, seed=seed)
    *splits, num_images = SPLITS[arguments.validation]
    train, measured = (
        data.load(
            "cifar10", split, 32, config.data.batch_size, is_training,
            arguments.data_dir, seed=seed,
            augmentation=config.data.augmentation,
        )
        for split, is_training in zip(splits, (True, False), strict=True)
    )  # fmt: skip
    model = make_model(family, variant)
    building.compile_model(model, config, config.epochs * len(train))
    start = time.process_time()
    history = model.fit(
        train, epochs=config.epochs, shuffle=False, verbose=0
    ).history
    seconds = time.process_time() - start
    routing = inspection.routing_statistics(model)
    accuracy = model.evaluate(measured, verbose=0, return_dict=True)["accuracy"]
    cost = models.cost(model)
    loads = [x["load_share"] * len(x["load_share"]) for x in routing.values()]
    dropped = [x["dropped_share"] for x in routing.values()]
    return {
        **interleaved.versions(keras.backend.backend()),
        "family": family,
        "images": num_images,
        "epochs": config.epochs,
        "model": variant,
        "seed": seed,
        "test_accuracy": round(accuracy, 4),
        "train_accuracy": " ".join(f"{x:.4f}" for x in history["accuracy"]),
        "params": cost.params,
        "active_params": cost.active_params,
        "min_load": round(float(min(map(np.min, loads), default=1)), 3),
        "max_load": round(float(max(map(np.max, loads), default=1)), 3),
        "dropped_share": round(float(np.mean(dropped or [0])), 4),
        "cpu_seconds": round(seconds, 1),
    }


def table(family, rows):
    """Mean and spread of each model, and its time against the dense twin's."""
    print(
        f"\n| {family} | test accuracy | mean | CPU time of dense | dropped |"
    )
    print("|---|---|---|---|---|")
    dense = {x["seed"]: x["cpu_seconds"] for x in rows if x["model"] == "dense"}
    for variant in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == variant]
        accuracy = [row["test_accuracy"] for row in mine]
        ratio = np.median(
            [
                row["cpu_seconds"] / dense.get(row["seed"], np.nan)
                for row in mine
            ]
        )
        dropped = np.mean([row["dropped_share"] for row in mine])
        values = ", ".join(f"{x:.4f}" for x in accuracy)
        print(
            f"| {variant} | {values} | {np.mean(accuracy):.4f} | {ratio:.2f} | "
            f"{dropped:.1%} |"
        )


if __name__ == "__main__":
    main()
