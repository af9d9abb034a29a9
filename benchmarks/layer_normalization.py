"""A training step of a ViT-S/16 with our LayerNormalization and with Keras's.

On JAX alone: the other backends use Keras's. See docs/layer_normalization.md.

    KERAS_BACKEND=jax python benchmarks/layer_normalization.py --save
"""

import argparse
import pathlib
import re
import time

import interleaved
import keras
import numpy as np
import steps

from keras_vmoe.layers.normalization import LayerNormalization
from keras_vmoe.models import ViTMoE

RESULTS = pathlib.Path(__file__).parent / "results" / "layer_normalization.csv"
NORMS = {
    "keras": keras.layers.LayerNormalization.call,
    "ours": LayerNormalization.call,
}
MODELS = {
    "dense": None,
    "8 experts, every_2": {"layers": "every_2", "num_experts": 8},
}


def main():
    """Compares the norms in a dense and a sparse model."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--num_layers", type=int, default=12)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    if keras.backend.backend() != "jax":
        parser.error("the norm differs on JAX only; set KERAS_BACKEND=jax")
    table = []
    for name, moe in MODELS.items():
        candidates, columns = {}, {}
        for norm, call in NORMS.items():
            LayerNormalization.call = call
            candidates[norm], columns[norm] = compiled_step(moe, arguments)
        times = interleaved.measure(candidates, arguments.rounds, warmup=1)
        rows = interleaved.rows(
            times,
            "keras",
            table=f"{arguments.num_layers} blocks of ViT-S/16",
            shape=name,
            **{"pass": "training"},
        )
        rows = [{**row, **columns[row["candidate"]]} for row in rows]
        interleaved.print_table(rows)
        print(columns)
        table += [{**row, **interleaved.versions()} for row in rows]
    if arguments.save:
        interleaved.write(RESULTS, table)


def compiled_step(moe, arguments):
    """A compiled gradient, to be called, and what its compilation was."""
    keras.utils.set_random_seed(0)
    model = ViTMoE(
        image_size=224,
        patch_size=16,
        hidden_dim=384,
        num_layers=arguments.num_layers,
        num_heads=6,
        mlp_dim=1536,
        num_classes=1000,
        moe=moe,
    )
    shape = (arguments.batch_size, 224, 224, 3)
    images = np.random.default_rng(0).uniform(-1, 1, shape).astype("float32")
    step, values = steps.jax_training(model, images)
    start = time.perf_counter()
    compiled = step.lower(*values).compile()
    seconds = time.perf_counter() - start
    found = re.findall(
        r"^%?fused_computation\S* \((.*)\) ->", compiled.as_text(), re.M
    )
    return lambda: compiled(*values), {
        "compile_s": round(seconds, 1),
        "largest_fusion": max(operands.count(": ") for operands in found),
    }


if __name__ == "__main__":
    main()
