"""Whole models of the Sweet Spot paper against their dense twins.

    KERAS_BACKEND=jax python benchmarks/models.py --save

Every pair runs in one process, in turn: a forward pass, and the gradient of a
squared error and of the auxiliary losses by all weights and the images, without
an optimizer. `ratio` is the sparse model's time by the dense one's of the same
round; `share` is its inverse, the images per second of the sparse model by
those of the dense one. Beside it stand the inverse ratio of their multiply-adds
(`macs_share`), which is what routing that costs nothing would reach, and the
paper's ratio of images per second (`paper_share`; table 1, training on its
hardware), where it has one. Targets: at least the paper's ratio, and at least
0.97 of that of the multiply-adds.

Peak memory is that of a training step beside weights, inputs and gradients, as
in moe_layer.py.
"""

import argparse
import gc
import pathlib

import interleaved
import keras
import memory
import numpy as np
import steps

from keras_vmoe import models

RESULTS = pathlib.Path(__file__).parent / "results" / "models.csv"
# The dense twin, and the paper's images per second of both (table 1).
PAIRS = {
    "vit_s16_e8_last2": ("vit_s16", 892, 1083),
    "vit_s16_e8_every2": ("vit_s16", 724, 1083),
    "vit_b16_e8_last2": ("vit_b16", None, None),
    "vit_b16_e8_every2": ("vit_b16", 227, 329),
    "convnext_t_e4_last2_r2": ("convnext_t", 768, 814),
    "convnext_t_e8_last2": ("convnext_t", None, None),
    "convnext_iso_s_e8_last2": ("convnext_iso_s", 1031, 1100),
    "swin_s_192_e8": ("swin_s_192", None, None),
}


def main():
    """Measures, prints tables and, with `--save`, updates the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=PAIRS, default=PAIRS)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    keras.config.set_dtype_policy(args.dtype)
    if args.memory_of:
        model = make(args.memory_of)
        print(memory.growth(model, images_of(args, model.input_shape[1:])))
        return
    for name in args.models:
        rows = compare(name, args)
        if args.save:  # Each when it is there: a run takes an hour.
            columns = {**interleaved.versions(), "dtype": args.dtype}
            columns["batch_size"] = args.batch_size
            rows = [{**columns, **row} for row in rows]
            keys = ("backend", "dtype", "batch_size", "model")
            interleaved.write(RESULTS, rows, keys)


def compare(name, args):
    """The rows of one pair."""
    twin, ours, dense = PAIRS[name]
    made = {"dense": make(twin), "sparse": make(name)}
    macs = {kind: models.cost(model).macs for kind, model in made.items()}
    images = images_of(args, made["dense"].input_shape[1:])
    rows = []
    for kind in ("forward", "training"):
        step = getattr(steps, kind)
        functions = {key: step(model, images) for key, model in made.items()}
        seconds = interleaved.measure(functions, args.rounds, warmup=1)
        columns = {"table": "models", "model": name, "pass": kind}
        rows += interleaved.rows(seconds, "dense", **columns)
        del functions
    del made
    gc.collect()
    peaks = {
        "dense": memory.of_candidate(twin, make, images, __file__, args),
        "sparse": memory.of_candidate(name, make, images, __file__, args),
    }
    for row in rows:
        per_second = 1e3 * args.batch_size / row["median"]
        row["images_per_s"] = round(per_second, 2)
        row["share"] = round(1 / row["ratio"], 3)
        row["macs_share"] = round(macs["dense"] / macs[row["candidate"]], 3)
        paper = round(ours / dense, 3) if ours else ""
        row["paper_share"] = paper if row["candidate"] == "sparse" else 1.0
        row["peak_mib"] = round(peaks[row["candidate"]] / 2**20, 1)
    interleaved.print_table([{**row, "shape": name} for row in rows])
    for row in rows:
        print({key: row[key] for key in list(row)[-5:]}, flush=True)
    return rows


def make(name):
    """A model of the papers."""
    keras.utils.set_random_seed(0)
    return models.from_preset(name)


def images_of(args, shape):
    """Random images."""
    shape = (args.batch_size, *shape)
    images = np.random.default_rng(0).uniform(-1, 1, shape)
    return keras.ops.convert_to_tensor(images.astype("float32"))


if __name__ == "__main__":
    main()
