"""The papers' claims on CIFAR-10, small: capacity, BPR, size, few-shot.

    KERAS_BACKEND=tensorflow python benchmarks/claims.py --data_dir DIR
    KERAS_BACKEND=tensorflow python benchmarks/claims.py --report

V-MoEs of 8 experts (K=2) in two of four MLPs and their dense twins, of several
widths, trained by the recipe `cifar10_small`, with and without Batch
Prioritized Routing (BPR). Each trained model is measured at once, on the test
split at every position of the routing dial, and by few-shot evaluation of its
features, whose examples are images that it was trained on: they say how well
few labels separate the classes it knows, not how it transfers. Nothing is
chosen by the test split. Every run is a process of its own, and its
rows are kept when it ends: what is killed or stopped goes on where it was.
Accuracy against the dense twin at equal and at wider size is in
benchmarks/cifar10.py.
"""

import argparse
import dataclasses
import pathlib
import subprocess
import sys

import interleaved
import keras
import numpy as np

from keras_vmoe import data
from keras_vmoe import evaluation
from keras_vmoe import models
from keras_vmoe import training
from keras_vmoe.training import building

RESULTS = pathlib.Path(__file__).parent / "results" / "claims.csv"
RECIPE = training.recipes.load("cifar10_small")
EPOCHS = 4
SEEDS = (0, 1, 2)
CAPACITIES = (2.0, 1.5, 1.05, 0.75, 0.5, 0.35, 0.25, 0.1)
MOE = {"layers": "last_2", "num_experts": 8, "capacity_factor": 1.05}
VARIANTS = {
    "dense": None,
    "MoE": {**MOE, "num_selected_experts": 2},
    "MoE, BPR": {**MOE, "num_selected_experts": 2, "batch_priority": True},
}
# In the order of their use: those of width 32 answer three of the questions.
RUNS = [
    (variant, width, seed)
    for names, widths in (
        (("dense", "MoE", "MoE, BPR"), (32,)),
        (("dense",), (48,)),
        (("dense", "MoE"), (16, 64)),
    )
    for seed in SEEDS
    for width in widths
    for variant in names
]
SHOTS = (1, 5, 10, 25)
COLUMNS = ("backend", "model", "width", "seed", "table", "capacity", "routing",
           "shots", "accuracy", "loss", "dropped_share", "macs", "params",
           "train_accuracy", "epochs", "versions", "hardware")  # fmt: skip


def main():
    """Runs what is missing, or prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.report:
        report(interleaved.read(RESULTS))
        return
    if arguments.one:
        variant, width, seed = arguments.one
        keep(run(arguments.data_dir, variant, int(width), int(seed)))
        return
    rows = interleaved.read(RESULTS)
    done = {key(x) for x in rows if x["epochs"] == str(EPOCHS)}
    for one in RUNS:
        if tuple(map(str, one)) not in done:
            print(*one, flush=True)
            command = [sys.executable, *sys.argv, "--one", *map(str, one)]
            subprocess.run(command, check=True)  # noqa: S603
    report(interleaved.read(RESULTS))


def key(row):
    """Which run a row is of."""
    return row["model"], row["width"], row["seed"]


def keep(rows):
    """Adds the rows of a run."""
    rows = [{name: row.get(name, "") for name in COLUMNS} for row in rows]
    interleaved.write(RESULTS, rows, ("backend", "model", "width", "seed"))


def make_model(variant, width):
    """A model of four blocks, with experts in two of them or without."""
    return models.ViTMoE(
        image_size=32,
        patch_size=4,
        hidden_dim=width,
        num_layers=4,
        num_heads=4,
        mlp_dim=2 * width,
        num_classes=10,
        pooling="gap",
        moe=VARIANTS[variant],
    )


def run(data_dir, variant, width, seed):
    """Trains one model and measures all that is asked of it."""
    model, curve = train(lambda: make_model(variant, width), data_dir, seed)
    test = data.load("cifar10", "test", 32, 200, False, data_dir)
    few = data.load("cifar10", "train[:10000]", 32, 200, False, data_dir)
    columns = {
        **interleaved.versions(),
        "model": variant,
        "width": width,
        "seed": seed,
        "epochs": EPOCHS,
        "params": models.cost(model).params,
        "train_accuracy": " ".join(f"{x:.4f}" for x in curve),
    }
    rows = [accuracy_row(model, test, table="trained")]
    if variant != "dense":
        for priority in (False, True):
            for capacity in CAPACITIES:
                dial = models.set_routing(
                    model, capacity_factor=capacity, batch_priority=priority
                )
                routing = "BPR" if priority else "vanilla"
                rows.append(
                    accuracy_row(
                        dial, test, table="dial", capacity=capacity,
                        routing=routing,
                    )
                )  # fmt: skip
    rows += few_shot_rows(model, few, test)
    return [{**columns, **row} for row in rows]


def train(make, data_dir, seed):
    """A new model after its training, and its accuracy by epoch.

    Args:
        make: Function that makes the model, after the seed is set.
        data_dir: Folder of CIFAR-10.
        seed: Integer.
    """
    keras.utils.set_random_seed(seed)
    config = dataclasses.replace(RECIPE, epochs=EPOCHS, seed=seed)
    images = data.load(
        "cifar10", "train", 32, config.data.batch_size, True, data_dir,
        seed=seed, augmentation=config.data.augmentation,
    )  # fmt: skip
    model = make()
    building.compile_model(model, config, config.epochs * len(images))
    history = model.fit(images, epochs=EPOCHS, shuffle=False, verbose=0)
    return model, history.history["accuracy"]


def accuracy_row(model, test, **columns):
    """Accuracy, loss, dropped share and multiply-adds of a model."""
    found = evaluation.measure(model, test)
    dropped = [x["dropped_share"] for x in found.routing.values()]
    return {
        **columns,
        "accuracy": round(found.accuracy, 4),
        "loss": round(found.loss, 4),
        "dropped_share": round(float(np.mean(dropped or [0])), 4),
        "macs": models.cost(model).macs,
    }


def few_shot_rows(model, train, test):
    """Means of three draws; the penalty is chosen on held-out images."""
    sets = [evaluation.extract_features(model, x) for x in (train, test)]
    found = evaluation.few_shot(*sets, SHOTS, seeds=SEEDS)
    chosen = evaluation.choose_l2([found])
    accuracy = found.accuracy_at(chosen).mean(axis=0)
    return [
        {"table": "few-shot", "shots": shot, "accuracy": round(float(x), 4)}
        for shot, x in zip(SHOTS, accuracy, strict=True)
    ]


def report(rows):
    """Prints the tables of all questions, of the runs that are there."""
    runs = dict.fromkeys(map(key, rows))
    missing = [x for x in RUNS if tuple(map(str, x)) not in runs]
    print(f"{len(runs)} of {len(RUNS)} runs; missing: {missing or 'none'}\n")
    print("| model | width | accuracy | multiply-adds | params | seeds |")
    print("|---|---|---|---|---|---|")
    for (model, width), mine in grouped(rows, "trained", "model", "width"):
        macs, params = (float(mine[0][x]) for x in ("macs", "params"))
        print(
            f"| {model} | {width} | {spread(mine)} | {macs / 1e6:.2f} M | "
            f"{params / 1e3:.0f} k | {len(mine)} |"
        )
    print("\n| trained | capacity factor | vanilla | BPR | MMACs |")
    print("|---|---|---|---|---|")
    for (model, capacity), mine in grouped(
        [x for x in rows if x["width"] == "32"], "dial", "model", "capacity"
    ):
        kinds = [
            spread([x for x in mine if x["routing"] == routing])
            for routing in ("vanilla", "BPR")
        ]
        macs = float(mine[0]["macs"]) / 1e6
        print(f"| {model} | {capacity} | {' | '.join(kinds)} | {macs:.2f} |")
    print("\n| features of | width | shots | accuracy |")
    print("|---|---|---|---|")
    for names, mine in grouped(rows, "few-shot", "model", "width", "shots"):
        print(f"| {' | '.join(names)} | {spread(mine)} |")
    print("\n| width | MoE minus dense, seed by seed | mean |")
    print("|---|---|---|")
    for (width,), mine in grouped(rows, "trained", "width"):
        of = {
            name: {x["seed"]: float(x["accuracy"]) for x in mine
                   if x["model"] == name}
            for name in ("dense", "MoE")
        }  # fmt: skip
        both = [of["MoE"][x] - of["dense"][x]
                for x in of["MoE"] if x in of["dense"]]  # fmt: skip
        if both:
            values = ", ".join(f"{x:+.4f}" for x in both)
            print(f"| {width} | {values} | {np.mean(both):+.4f} |")


def grouped(rows, table, *names):
    """Rows of a table by the values of columns, in their order."""
    found = {}
    for row in rows:
        if row["table"] == table:
            found.setdefault(tuple(row[x] for x in names), []).append(row)
    return found.items()


def spread(rows):
    """Mean and standard deviation of the accuracies."""
    values = [float(row["accuracy"]) for row in rows]
    if len(values) < 2:
        return f"{values[0]:.4f}" if values else ""
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"


if __name__ == "__main__":
    main()
