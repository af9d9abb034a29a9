"""Memory and time of training a ViT: what saves how much, at what cost.

    KERAS_BACKEND=jax python benchmarks/training_memory.py --save

Each candidate trains by `fit`, with AdamW, in a process of its own; the
processes follow each other `--rounds` times. `peak_gib` is how far the process
grows beyond what it was before the model: weights, slots, gradients and
activations. `ratio` is the time of an update of `--batch_size` images by that
of the plain candidate of the same round.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

import interleaved
import keras
import memory
import numpy as np

from keras_vmoe import models

RESULTS = pathlib.Path(__file__).parent / "results" / "training_memory.csv"
ACCUMULATE = 4
BASELINE = "float32"
CANDIDATES = {
    BASELINE: {},
    "remat": {"remat": True},
    f"accumulate {ACCUMULATE}": {"accumulate": ACCUMULATE},
    "bfloat16": {"dtype": "mixed_bfloat16"},
    "bfloat16, remat": {"dtype": "mixed_bfloat16", "remat": True},
}


class Updates(keras.callbacks.Callback):
    """The seconds of each update."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self.start)


def main():
    """Measures, prints a table and, with `--save`, updates the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="vit_b16_e8_last2")
    parser.add_argument(
        "--candidates", nargs="+", choices=CANDIDATES, default=[*CANDIDATES]
    )
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--candidate", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.candidate:
        print(json.dumps(train(args, **CANDIDATES[args.candidate])))
        return
    if BASELINE not in args.candidates:
        parser.error(
            f"--candidates must hold {BASELINE}, which all are held to"
        )
    seconds = {name: [] for name in args.candidates}
    peaks = {name: [] for name in args.candidates}
    for _ in range(args.rounds):
        for name in args.candidates:
            command = [sys.executable, *sys.argv, "--candidate", name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            found = json.loads(done.stdout.splitlines()[-1])
            seconds[name] += found["seconds"]
            peaks[name].append(found["peak"])
            print(name, found, flush=True)
    rows = interleaved.rows(
        {name: np.array(values) for name, values in seconds.items()},
        BASELINE,
        **{"model": args.model, "batch_size": args.batch_size, "pass": "fit"},
    )
    for row in rows:
        peak = np.median(peaks[row["candidate"]])
        row["peak_gib"] = round(float(peak) / 2**30, 2)
    interleaved.print_table(rows)
    print({row["candidate"]: row["peak_gib"] for row in rows})
    if args.save:
        rows = [{**interleaved.versions(), **row} for row in rows]
        interleaved.write(RESULTS, rows, ("backend", "model", "batch_size"))


def train(args, dtype="float32", remat=False, accumulate=None):
    """Seconds of the updates behind the first, and the growth at the peak."""
    before = memory.status("VmRSS")
    keras.utils.set_random_seed(0)
    model = models.from_preset(args.model, dtype=dtype, remat=remat)
    images = np.random.default_rng(0).uniform(
        -1, 1, (args.batch_size, *model.input_shape[1:])
    )
    model.compile(
        keras.optimizers.AdamW(1e-4, gradient_accumulation_steps=accumulate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    updates = Updates()
    model.fit(
        images.astype("float32"),
        np.arange(args.batch_size),
        batch_size=args.batch_size // (accumulate or 1),
        epochs=1 + args.updates,
        verbose=0,
        callbacks=[updates],
    )
    return {
        "seconds": updates.seconds[1:],
        "peak": memory.status("VmHWM") - before,
    }


if __name__ == "__main__":
    main()
