"""Test accuracy of the quickstart's V-MoE on digits, over backends and seeds.

    python benchmarks/digits.py --save

Each run is `keras-vmoe train` with its defaults, in a process of its own. The
test split is looked at once, at the end of a run. Seconds are those of the
whole command, with imports and compilation.
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import interleaved
import numpy as np

RESULTS = pathlib.Path(__file__).parent / "results" / "digits.csv"


def main():
    """Trains, prints a table and, with `--save`, updates the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--backends", nargs="+", default=["jax", "tensorflow", "torch"]
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    for backend in args.backends:
        rows = []
        for seed in args.seeds:
            rows.append(run(backend, seed))
            print(rows[-1], flush=True)
        accuracy = np.array([row["test_accuracy"] for row in rows])
        print(
            f"{backend}: mean {accuracy.mean():.4f}, "
            f"{accuracy.min():.4f} to {accuracy.max():.4f}",
            flush=True,
        )
        if args.save:
            interleaved.write(RESULTS, rows)


def run(backend, seed):
    """Trains once; one row of the results."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "keras_vmoe.cli", "train"]
        command += ["--run_dir", f"{folder}/run", "--seed", str(seed)]
        start = time.perf_counter()
        done = subprocess.run(
            command,
            env={**os.environ, "KERAS_BACKEND": backend},
            check=True,
            capture_output=True,
            text=True,
        )
        seconds = time.perf_counter() - start
    accuracy = re.search(r"^test accuracy: (\S+)$", done.stdout, re.MULTILINE)
    return {
        **interleaved.versions(backend),
        "seed": seed,
        "test_accuracy": float(accuracy[1]),
        "seconds": round(seconds),
    }


if __name__ == "__main__":
    main()
