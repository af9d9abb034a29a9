"""MoE against its dense twin on CIFAR-10: accuracy, load, training time.

    KERAS_BACKEND=tensorflow python benchmarks/cifar10.py --data_dir DIR --save

The same recipe, budget and seeds for each model of a family: the dense twin, 8
experts of which a token passes 1 (equal active parameters), and 2. The last
epoch's model is measured once on the test split; nothing is chosen by it.
Every run is a process of its own; models of one seed run one after the other.
Training time is CPU time, which other work on the machine changes little.
"""

import argparse
import csv
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
from keras_vmoe.training import optimizers

RESULTS = pathlib.Path(__file__).parent / "results" / "cifar10.csv"
MOE = {"layers": "last_2", "num_experts": 8, "capacity_factor": 1.05}
VARIANTS = {
    "dense": None,
    "8 experts, K=1": {**MOE, "num_selected_experts": 1},
    "8 experts, K=2": {**MOE, "num_selected_experts": 2},
}
BATCH, RATE, DECAY, WARMUP, CLIP = 64, 2e-3, 0.1, 0.1, 1.0


def make_model(family, variant, num_classes=10):
    """A model of a family."""
    moe = VARIANTS[variant]
    if family == "vit":
        return models.ViTMoE(
            image_size=32, patch_size=4, hidden_dim=32, num_layers=4,
            num_heads=4, mlp_dim=64, num_classes=num_classes, pooling="gap",
            moe=moe,
        )  # fmt: skip
    return models.ConvNeXtMoE(
        depths=(2, 2, 2), dims=(16, 32, 64), num_classes=num_classes,
        image_size=32, patch_size=2, layer_scale=None, moe=moe,
    )  # fmt: skip


def main():
    """Runs all models, prints a table and, with `--save`, keeps it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--families", nargs="+", default=["vit", "convnext"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        family, variant, seed = arguments.one
        print(json.dumps(run(arguments, family, variant, int(seed))))
        return
    for family in arguments.families:
        rows = []
        for seed in arguments.seeds:
            for variant in VARIANTS:
                rows.append(child(family, variant, seed))
                print(rows[-1], flush=True)
                if arguments.save:
                    interleaved.write(RESULTS, rows, ("backend", "family"))
        table(family, rows)
    if arguments.save:
        plot()


def plot():
    """Draws the kept rows: training accuracy by epoch, test accuracy."""
    from matplotlib.figure import Figure

    with open(RESULTS, newline="") as file:
        rows = list(csv.DictReader(file))
    families = sorted({row["family"] for row in rows}, reverse=True)
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, len(families), squeeze=False)[0]
    for panel, family in zip(panels, families, strict=True):
        for color, variant in enumerate(VARIANTS):
            mine = [
                row
                for row in rows
                if (row["family"], row["model"]) == (family, variant)
            ]
            style = {"color": f"C{color}", "alpha": 0.7}
            for i, row in enumerate(mine):
                curve = [float(x) for x in row["train_accuracy"].split()]
                epochs = range(1, len(curve) + 1)
                label = None if i else variant
                panel.plot(epochs, curve, label=label, **style)
                test = float(row["test_accuracy"])
                panel.plot(len(curve) + 0.3, test, "o", **style)
        panel.set(title=family, xlabel="epoch", ylabel="accuracy")
        panel.grid(alpha=0.3)
        panel.legend(title="training; dots: test")
    figure.savefig(RESULTS.with_suffix(".png"), dpi=110)


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
    augmentation = data.Augmentation(crop_padding=4, flip=True)
    train, test = (
        data.load(
            "cifar10", split, 32, BATCH, training, arguments.data_dir,
            seed=seed, augmentation=augmentation,
        )
        for split, training in (
            (f"train[:{arguments.images}]", True), ("test", False)
        )
    )  # fmt: skip
    model = make_model(family, variant)
    steps = arguments.epochs * len(train)
    schedule = optimizers.WarmUp(RATE, steps, round(WARMUP * steps))
    model.compile(
        optimizers.AdamW(schedule, weight_decay=DECAY, global_clipnorm=CLIP),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    start = time.process_time()
    history = model.fit(
        train, epochs=arguments.epochs, shuffle=False, verbose=0
    ).history
    seconds = time.process_time() - start
    routing = inspection.routing_statistics(model)
    accuracy = model.evaluate(test, verbose=0, return_dict=True)["accuracy"]
    cost = models.cost(model)
    loads = [x["load_share"] * len(x["load_share"]) for x in routing.values()]
    dropped = [x["dropped_share"] for x in routing.values()]
    return {
        **interleaved.versions(keras.backend.backend()),
        "family": family,
        "images": arguments.images,
        "epochs": arguments.epochs,
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
    dense = [row["cpu_seconds"] for row in rows if row["model"] == "dense"]
    for variant in VARIANTS:
        mine = [row for row in rows if row["model"] == variant]
        accuracy = [row["test_accuracy"] for row in mine]
        ratio = np.median(
            [row["cpu_seconds"] / x for row, x in zip(mine, dense, strict=True)]
        )
        dropped = np.mean([row["dropped_share"] for row in mine])
        values = ", ".join(f"{x:.4f}" for x in accuracy)
        print(
            f"| {variant} | {values} | {np.mean(accuracy):.4f} | {ratio:.2f} | "
            f"{dropped:.1%} |"
        )


if __name__ == "__main__":
    main()
