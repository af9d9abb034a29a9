"""What `inspection.inspect` costs beside `model.evaluate`, and its memory.

    KERAS_BACKEND=torch python benchmarks/inspection.py --save

Time: all on the same images, in turn, medians of rounds after one that
compiles. Memory: the peak of a process that inspects so many images, read one
batch at a time, above that of one that inspects two batches.
"""

import argparse
import pathlib
import re
import subprocess
import sys

import interleaved
import keras
import numpy as np

from keras_vmoe import evaluation
from keras_vmoe import inspection
from keras_vmoe import models

RESULTS = pathlib.Path(__file__).parent / "results" / "inspection.csv"
BATCH, IMAGES, COUNTS = 64, 1024, (1_000, 10_000)


class Images:
    """Batches of noise, made one at a time."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        generator = np.random.default_rng(0)
        for start in range(0, self.count, BATCH):
            size = min(BATCH, self.count - start)
            images = generator.normal(size=(size, 32, 32, 3))
            yield images.astype("float32"), generator.integers(10, size=size)


def make_model():
    """A V-MoE of 8 experts in two of six blocks, of 64 patches."""
    return models.ViTMoE(
        image_size=32,
        patch_size=4,
        hidden_dim=192,
        num_layers=6,
        num_heads=3,
        mlp_dim=768,
        num_classes=10,
        moe={"layers": "last_2", "num_experts": 8},
    )


def evaluate(model, batches):
    """Keras's `evaluate`, over the batches one by one."""
    for images, labels in batches:
        model.test_on_batch(images, labels)


def peak_mib():
    """The peak of this process, without that of the one that started it."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 1024


def main():
    """Prints both tables and, with `--save`, keeps them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    model = make_model()
    if arguments.one:
        inspection.inspect(model, Images(arguments.one))
        print(f"MiB {peak_mib():.0f}")
        return
    model.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    batches = list(Images(IMAGES))
    candidates = {
        "evaluate": lambda: evaluate(model, batches),
        "measure": lambda: evaluation.measure(model, batches).loss,
        "inspect": lambda: len(inspection.inspect(model, batches).images),
    }
    seconds = interleaved.measure(candidates, arguments.rounds, warmup=1)
    rows = []
    for name, times in seconds.items():
        ratio = np.array(times) / np.array(seconds["evaluate"])
        q25, median, q75 = np.quantile(ratio, [0.25, 0.5, 0.75]).round(2)
        rows.append(
            {
                **interleaved.versions(),
                "what": name,
                "images": IMAGES,
                "ratio": median,
                "q25": q25,
                "q75": q75,
                "peak_mib": "",
            }
        )
    for count in (2 * BATCH, *COUNTS):
        command = [sys.executable, sys.argv[0], "--one", str(count)]
        done = subprocess.run(  # noqa: S603
            command, check=True, capture_output=True, text=True
        )
        peak = int(done.stdout.split()[-1])
        row = dict.fromkeys(("ratio", "q25", "q75"), "")
        row |= {"what": "memory", "images": count, "peak_mib": peak}
        rows.append({**interleaved.versions(), **row})
    for row in rows:
        print(*(row[x] for x in list(rows[0])[3:]), sep="\t")
    if arguments.save:
        interleaved.write(RESULTS, rows)


if __name__ == "__main__":
    main()
