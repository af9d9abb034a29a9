"""One MoE layer against a dense MLP, other methods and other libraries.

    KERAS_BACKEND=jax python benchmarks/moe_layer.py --save

All candidates of a setting run in one process, in turn; ratios are those of the
same round. The dense MLP has K times the experts' hidden size: what a token of
the MoE layer passes through. Seven tables:

- methods: every router of ours and the other libraries against the dense MLP,
  at 8 experts, 2 per token, capacity factor 1.0. Expert choice and soft routing
  have capacity factor 2.0, which is the same work.
- experts: the same work spread over more experts, against 8 of them.
- selected: 1, 2 and 4 experts per token, each against its own dense MLP.
- capacity: other capacity factors, against 1.0.
- overhead: layers of 8 and 64 experts against their experts alone, which find
  their buffers ready. What a layer takes beyond that is routing; what its
  experts take, with few tokens for each, is reading weights and writing their
  gradients, which an optimizer has to touch besides.
- statistics: a training step with the routing statistics, against one without.
- memory: peak memory of a training step beside inputs, weights and gradients
  (8 experts have four times the weights of the dense MLP), against the dense
  MLP: of JAX the compiler's figure for temporary buffers, else the growth of
  the process while it runs the step for the first time, less the gradients.

Training is the gradient of a squared error and of the auxiliary losses with
respect to the inputs and all weights, with noise, without an optimizer.
"""

import argparse
import gc
import pathlib

import interleaved
import keras
import memory
import numpy as np
import others
import steps

from keras_vmoe import layers
from keras_vmoe.routing import capacity as capacity_of

RESULTS = pathlib.Path(__file__).parent / "results" / "moe_layer.csv"

# Images, tokens per image, D, F.
SHAPES = {
    "ViT-S/16 x8": (8, 197, 384, 1536),
    "ViT-S/16 x32": (32, 197, 384, 1536),
    "ViT-B/16 x8": (8, 197, 768, 3072),
    "ViT-B/16 x32": (32, 197, 768, 3072),
    "ConvNeXt-T stage 3 x8": (8, 196, 384, 1536),
    "ConvNeXt-T stage 4 x8": (8, 49, 768, 3072),
    "Swin-S stage 3 x8": (8, 144, 384, 1536),
}
# For accelerators: --shapes "ViT-B/16 x128" "ViT-L/16 x128"
# --dtype mixed_bfloat16 --peak-tflops ...
LARGE_SHAPES = {
    "ViT-B/16 x128": (128, 197, 768, 3072),
    "ViT-L/16 x128": (128, 197, 1024, 4096),
}
DEFAULT_SHAPES = list(SHAPES)
SHAPES |= LARGE_SHAPES
SMALL = "ViT-S/16 x8"


def main():
    """Measures, prints tables and, with `--save`, updates the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument(
        "--shapes", nargs="+", choices=list(SHAPES), default=DEFAULT_SHAPES
    )
    parser.add_argument(
        "--peak-tflops",
        type=float,
        help="Peak of the hardware's matrix products in the dtype; adds the "
        "share that each candidate reaches.",
    )
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    keras.config.set_dtype_policy(args.dtype)
    if args.memory_of:
        print(memory.growth(candidate(args.memory_of), inputs_of(SMALL)))
        return
    rows = []
    for table in args.tables:
        rows += TABLES[table](args)
    if args.save:
        columns = {**interleaved.versions(), "dtype": args.dtype}
        rows = [{**columns, **row} for row in rows]
        keys = ("backend", "dtype", "table", "shape")
        interleaved.write(RESULTS, rows, keys)


def methods(args):
    """All methods against the dense MLP, at several shapes."""
    rows = []
    for shape in args.shapes:
        rows += compare("methods", shape, candidates(shape), "dense", args)
    return rows


def experts(args):
    """The same work with more experts."""
    found = {
        f"E={number}": lambda number=number: top_k(SHAPES[SMALL], number)
        for number in (8, 16, 32, 64, 128)
    }
    return compare("experts", SMALL, found, "E=8", args)


def selected(args):
    """More experts per token, each number against its own dense MLP."""
    rows = []
    for number in (1, 2, 4):
        found = {
            "dense": lambda number=number: dense(SHAPES[SMALL], number),
            f"K={number}": lambda number=number: top_k(
                SHAPES[SMALL], selected=number
            ),
        }
        rows += compare("selected", SMALL, found, "dense", args)
    return rows


def capacity(args):
    """Other capacity factors."""
    found = {
        f"factor {factor}": lambda factor=factor: top_k(
            SHAPES[SMALL], capacity_factor=factor
        )
        for factor in (0.25, 0.5, 1.0, 1.5, 2.0)
    }
    return compare("capacity", SMALL, found, "factor 1.0", args)


def overhead(args):
    """Layers against their experts alone."""
    rows = []
    for shape in args.shapes:
        images, tokens, features, hidden = SHAPES[shape]
        size = min(images, 8) * tokens  # Of a group.
        for number in (8, 64):
            shape_of = (images // 8, number, capacity_of(size, number, 2, 1.0))
            inputs = {
                f"experts alone, E={number}": random(*shape_of, features),
                f"top-k, E={number}": inputs_of(shape),
            }
            alone, layer = inputs
            found = {
                alone: lambda number=number, hidden=hidden: layers.MLPExperts(
                    number, hidden, activation="gelu_tanh"
                ),
                layer: lambda number=number, shape=shape: top_k(
                    SHAPES[shape], number
                ),
            }
            rows += compare("overhead", shape, found, alone, args, inputs)
    return rows


def statistics(args):
    """What the routing statistics of a training step cost."""

    def without():
        layer = top_k(SHAPES[SMALL])
        layer.router.statistics.update = lambda *arguments: None
        return layer

    found = {"without": without, "with": lambda: top_k(SHAPES[SMALL])}
    return compare("statistics", SMALL, found, "without", args)


def peak_memory(args):
    """Peak memory of a training step."""
    found = {
        name: memory.of_candidate(
            name, candidate, inputs_of(SMALL), __file__, args
        )
        for name in candidates(SMALL)
    }
    rows = []
    for name, size in found.items():
        ratio = round(size / found["dense"], 3)
        row = {"table": "memory", "shape": SMALL, "pass": "training"}
        row |= {"candidate": name, "median": round(size / 2**20, 1)}
        row |= {"unit": "MiB", "ratio": ratio}
        rows.append({**row, "ratio_q25": ratio, "ratio_q75": ratio})
    interleaved.print_table(rows)
    return rows


def compare(table, shape, makers, baseline, args, inputs=None):
    """Times forward passes and training steps of one setting.

    All take the tokens of the shape, or each its own of the dict `inputs`.
    """
    images, tokens, features, _ = SHAPES[shape]
    # Fewer rounds where one takes half a minute.
    work = images * tokens * features**2
    rounds = max(3, min(args.rounds, int(args.rounds * 6e8 / work)))
    inputs = inputs or dict.fromkeys(makers, inputs_of(shape))
    made = {name: make() for name, make in makers.items()}
    for name, layer in made.items():
        layer.build(inputs[name].shape)
    rows = []
    for kind in ("forward", "training"):
        make = getattr(steps, kind)
        functions = {name: make(made[name], inputs[name]) for name in made}
        seconds = interleaved.measure(functions, rounds, warmup=2)
        columns = {"table": table, "shape": shape, "pass": kind}
        rows += interleaved.rows(seconds, baseline, **columns)
        if args.peak_tflops and table == "methods":
            print_shares(rows[-len(made) :], shape, kind, args.peak_tflops)
    interleaved.print_table(rows)
    del made, functions
    gc.collect()
    return rows


def print_shares(rows, shape, kind, peak):
    """Prints the share of the hardware's peak, by the dense MLP's products."""
    images, tokens, features, hidden = SHAPES[shape]
    flops = 2 * images * tokens * features * 2 * hidden * 2  # K = 2
    flops *= 3 if kind == "training" else 1
    for row in rows:
        share = flops / (1e-3 * row["median"]) / (1e12 * peak)
        print(f"{row['candidate']}, {kind}: {share:.1%} of the peak")


def inputs_of(shape):
    """Random tokens `(B, N, D)`."""
    return random(*SHAPES[shape][:3])


def random(*shape):
    """A tensor of normal numbers."""
    inputs = np.random.default_rng(0).normal(size=shape).astype("float32")
    return keras.ops.convert_to_tensor(inputs)


def candidates(shape):
    """What the methods table compares, by name."""
    size = SHAPES[shape]
    images, _, features, hidden = size
    # The others take minutes at the larger batch, and no other ratio.
    found = {} if images > 8 else others.others(8, hidden, 2, 1.0, features)
    return {
        "dense": lambda: dense(size),
        "top-k": lambda: top_k(size),
        "top-k, BPR": lambda: top_k(size, batch_priority=True),
        "expert choice": lambda: moe(
            size, layers.ExpertChoiceRouter(8, capacity_factor=2.0)
        ),
        "soft": lambda: moe(size, layers.SoftRouter(8, capacity_factor=2.0)),
        "dropless": lambda: top_k(size, capacity_factor="dropless"),
        "einsum": lambda: others.EinsumMoE(8, hidden, 2, 1.0),
        **found,
    }


def candidate(name):
    """One of them, at the shape whose memory is measured."""
    return candidates(SMALL)[name]()


def dense(size, selected=2):
    """A dense MLP of the MoE layer's FLOPs."""
    return layers.MLP(selected * size[3], activation="gelu_tanh")


def top_k(size, num_experts=8, selected=2, capacity_factor=1.0, **router):
    """A MoE layer with top-K routing."""
    router = layers.TopKRouter(
        num_experts, selected, capacity_factor=capacity_factor, **router
    )
    return moe(size, router)


def moe(size, router):
    """A MoE layer around a router."""
    return layers.MoEMLP(
        router.num_experts, size[3], router, activation="gelu_tanh"
    )


TABLES = {
    "methods": methods,
    "experts": experts,
    "selected": selected,
    "capacity": capacity,
    "overhead": overhead,
    "statistics": statistics,
    "memory": peak_memory,
}

if __name__ == "__main__":
    main()
