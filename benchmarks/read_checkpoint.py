"""Reads a large sharded checkpoint: time against the disk's, peak of memory.

    python benchmarks/read_checkpoint.py --save

Writes a synthetic V-MoE checkpoint of 1 GB in the reference program's format,
in four shards whose expert kernels are cut by expert. Then, in turn and each in
a process of its own: plain reading of the files' bytes, and `read_vmoe`. The
files are in the system's cache both times, so that this is the reader's own
speed. Memory is the growth of the process's peak over that after the imports.
Linux only.
"""

import argparse
import csv
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = pathlib.Path(__file__).parent / "results" / "read_checkpoint.csv"
ROUNDS = 5


def main():
    """Measures both, in turn."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    with tempfile.TemporaryDirectory() as folder:
        prefix = pathlib.Path(folder) / "ckpt"
        size = write(prefix, arguments.gigabytes)
        found = {"bytes": [], "read_vmoe": []}
        for _ in range(ROUNDS):
            for method, runs in found.items():
                command = [sys.executable, __file__, "--child", method, prefix]
                output = subprocess.run(  # noqa: S603
                    command, check=True, capture_output=True, text=True
                ).stdout
                runs.append([float(x) for x in output.split()[-2:]])
    pairs = zip(found["bytes"], found["read_vmoe"], strict=True)
    ratios = [ours[0] / plain[0] for plain, ours in pairs]
    memory = [run[1] / size for run in found["read_vmoe"]]
    row = {
        "gigabytes": round(size / 1e9, 3),
        "time_ratio": round(statistics.median(ratios), 2),
        "time_ratio_min": round(min(ratios), 2),
        "time_ratio_max": round(max(ratios), 2),
        "memory_ratio": round(max(memory), 3),
    }
    print(row)
    if arguments.save:
        with open(RESULTS, "w", newline="") as file:
            writer = csv.DictWriter(file, row)
            writer.writeheader()
            writer.writerow(row)


def write(prefix, gigabytes):
    """Writes a checkpoint and returns the bytes of its arrays."""
    sys.path.insert(0, str(ROOT))
    from tests.checkpoints import writer

    experts = (8, 1024, 4096)
    count = max(1, round(gigabytes * 1e9 / 4 / np.prod(experts)))
    generator = np.random.default_rng(0)
    arrays = {
        f"Encoder/encoderblock_{i}/Moe/Mlp/Dense_0/kernel": generator.normal(
            size=experts
        ).astype("float32")
        for i in range(count)
    }
    writer.write(
        prefix, arrays, shards=4, cuts=dict.fromkeys(arrays, (8, 1, 1))
    )
    return writer.nbytes(arrays)


def child(method, prefix):
    """Reads once; prints seconds and bytes of the peak's growth."""
    from keras_vmoe.checkpoints.sharded import read_vmoe

    before = peak()
    start = time.perf_counter()
    if method == "bytes":
        paths = pathlib.Path(prefix).parent.glob("*.data*")
        kept = [path.read_bytes() for path in paths]
    else:
        kept = read_vmoe(prefix)
    seconds = time.perf_counter() - start
    print(seconds, peak() - before)
    del kept


def peak():
    """Largest resident size of this process so far, in bytes."""
    # Not `ru_maxrss`, which starts at the size of the parent.
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


if __name__ == "__main__":
    main()
