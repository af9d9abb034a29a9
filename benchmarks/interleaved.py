"""Interleaved timing: all candidates in turn, so that noise hits all alike."""

import csv
import importlib.metadata
import os
import pathlib
import platform
import time

import keras
import numpy as np


def wait(result):
    """Waits until a result of the current backend is there."""
    if keras.backend.backend() == "jax":
        import jax

        jax.block_until_ready(result)
    if keras.backend.backend() == "torch":
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return result


def measure(candidates, rounds, warmup=3):
    """Times functions in turn, `rounds` times each.

    The order changes from round to round: what runs behind a large candidate
    finds the caches cold.

    Args:
        candidates: Dict from name to a function without arguments.
        rounds: Measurements of each.
        warmup: Calls of each before the first measurement.

    Returns:
        Dict from name to an array of `rounds` seconds.
    """
    for function in candidates.values():
        for _ in range(warmup):
            wait(function())
    seconds = {name: [] for name in candidates}
    generator = np.random.default_rng(0)
    for _ in range(rounds):
        for name in generator.permutation(list(candidates)):
            start = time.perf_counter()
            wait(candidates[name]())
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def rows(seconds, baseline, **columns):
    """One row per candidate: median, spread and ratio to the baseline.

    The ratio is the median over rounds of the ratio within a round; its spread
    is the interquartile range.
    """
    result = []
    for name, values in seconds.items():
        ratio = values / seconds[baseline]
        low, middle, high = np.percentile(ratio, [25, 50, 75])
        result.append(
            {
                **columns,
                "candidate": name,
                "median": round(1e3 * float(np.median(values)), 2),
                "unit": "ms",
                "ratio": round(float(middle), 3),
                "ratio_q25": round(float(low), 3),
                "ratio_q75": round(float(high), 3),
            }
        )
    return result


def versions(backend=None):
    """What was measured on what, as columns of a row."""
    backend = backend or keras.backend.backend()
    version = importlib.metadata.version(backend)
    return {
        "backend": backend,
        "versions": f"keras {keras.__version__}, {backend} {version}, "
        f"python {platform.python_version()}",
        "hardware": hardware(backend),
    }


def hardware(backend):
    """The accelerator that the backend works on, or the CPU."""
    if backend == "jax":
        import jax

        if jax.default_backend() != "cpu":
            return jax.devices()[0].device_kind
    if backend == "torch":
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name()
    return f"CPU, {os.cpu_count()} cores"


def write(path, new_rows, keys=("backend",)):
    """Writes rows to a CSV file, in the place of those of the same keys."""
    path = pathlib.Path(path)
    path.parent.mkdir(exist_ok=True)
    kept = []
    # As text: that is what is read.
    new = {tuple(str(row[key]) for key in keys) for row in new_rows}
    if path.exists():
        with open(path, newline="") as file:
            kept = [
                row
                for row in csv.DictReader(file)
                if tuple(row[key] for key in keys) not in new
            ]
    partial = path.with_suffix(".partial")
    with open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, list(new_rows[0]))
        writer.writeheader()
        writer.writerows(kept + new_rows)
    partial.replace(path)


def read(path):
    """The rows of a file of results, of this backend; none without a file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [x for x in rows if x["backend"] == keras.backend.backend()]


def print_table(table):
    """Prints rows as a table for reading."""
    name = " ".join(table[0].get(key, "") for key in ("table", "shape"))
    print(f"{name}\n{'pass':<10}{'candidate':<20}{'median':>10}{'ratio':>8}")
    for row in table:
        print(
            f"{row['pass']:<10}{row['candidate']:<20}{row['median']:>10}"
            f"{row['ratio']:>8}  {row['ratio_q25']} to {row['ratio_q75']}",
            flush=True,
        )
