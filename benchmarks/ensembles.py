"""Efficient ensembles of experts (E3) on CIFAR-10: accuracy, NLL, calibration.

    KERAS_BACKEND=tensorflow python benchmarks/ensembles.py --data_dir DIR
    KERAS_BACKEND=tensorflow python benchmarks/ensembles.py --report

A V-MoE of 8 experts (K=1) in two of four MLPs, an ensemble of two members that
share these 8 experts out, and a deep ensemble of two such V-MoEs, trained by
the recipe `cifar10_small`. Of each seed all three are trained in a process of
its own, whose rows are kept when it ends: what is stopped goes on there. The
deep ensemble answers with the mean probability of two trainings.
"""

import argparse
import pathlib
import subprocess
import sys

import claims
import interleaved
import numpy as np

from keras_vmoe import data
from keras_vmoe import models
from keras_vmoe.distribution.prediction import predictions
from keras_vmoe.evaluation.measurement import calibration_error

RESULTS = pathlib.Path(__file__).parent / "results" / "ensembles.csv"
SEEDS = (0, 1, 2)
PARTNER = 100  # Added to a seed for the second model of a deep ensemble.
MOE = {
    "layers": "last_2",
    "num_experts": 8,
    "num_selected_experts": 1,
    "capacity_factor": 1.5,
}
COLUMNS = ("backend", "model", "seed", "accuracy", "nll", "ece", "params",
           "macs", "epochs", "versions", "hardware")  # fmt: skip


def main():
    """Runs the seeds that are missing, or prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        rows = run(arguments.data_dir, arguments.one)
        rows = [{name: row.get(name, "") for name in COLUMNS} for row in rows]
        interleaved.write(RESULTS, rows, ("backend", "seed"))
        return
    if not arguments.report:
        done = {row["seed"] for row in interleaved.read(RESULTS)}
        for seed in SEEDS:
            if str(seed) not in done:
                print("seed", seed, flush=True)
                command = [sys.executable, *sys.argv, "--one", str(seed)]
                subprocess.run(command, check=True)  # noqa: S603
    report(interleaved.read(RESULTS))


def run(data_dir, seed):
    """Trains the three, and measures them on the test split."""
    test = data.load("cifar10", "test", 32, 200, False, data_dir)
    labels = np.concatenate([y for _, y in test])
    first, logits = trained(data_dir, seed, test)
    _, partner = trained(data_dir, seed + PARTNER, test)
    both, mean = trained(data_dir, seed, test, ensemble_size=2)
    deep = np.log((softmax(logits) + softmax(partner)) / 2)
    costs = [models.cost(first), models.cost(both)]
    rows = []
    for name, found, cost, times in (
        ("V-MoE", logits, costs[0], 1),
        ("E3, M=2", mean, costs[1], 1),
        ("two V-MoEs", deep, costs[0], 2),
    ):
        log = np.log(softmax(found))
        rows.append(
            {
                **interleaved.versions(),
                "model": name,
                "seed": seed,
                "epochs": claims.EPOCHS,
                "accuracy": round(float((log.argmax(-1) == labels).mean()), 4),
                "nll": round(
                    float(-log[np.arange(len(log)), labels].mean()), 4
                ),
                "ece": round(calibration_error(found, labels), 4),
                "params": times * cost.params,
                "macs": times * cost.macs,
            }
        )
    return rows


def trained(data_dir, seed, test, **arguments):
    """A model after its training, and its logits of the test images."""

    def make():
        return models.ViTMoE(
            image_size=32,
            patch_size=4,
            hidden_dim=32,
            num_layers=4,
            num_heads=4,
            mlp_dim=64,
            num_classes=10,
            pooling="gap",
            moe=MOE,
            **arguments,
        )

    model, _ = claims.train(make, data_dir, seed)
    logits = [x for x, _, _ in predictions(model, test)]
    return model, np.concatenate(logits).astype("float64")


def softmax(x):
    """Probabilities of logits."""
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def report(rows):
    """Prints means and standard deviations over the seeds."""
    print("| model | accuracy | NLL | ECE | parameters | MMACs | seeds |")
    print("|---|---|---|---|---|---|---|")
    for name in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == name]
        spreads = []
        for column in ("accuracy", "nll", "ece"):
            values = [float(row[column]) for row in mine]
            std = f" ± {np.std(values, ddof=1):.4f}" if len(mine) > 1 else ""
            spreads.append(f"{np.mean(values):.4f}{std}")
        params, macs = (float(mine[0][x]) for x in ("params", "macs"))
        print(
            f"| {name} | {' | '.join(spreads)} | {params / 1e3:.0f} k | "
            f"{macs / 1e6:.2f} | {len(mine)} |"
        )


if __name__ == "__main__":
    main()
