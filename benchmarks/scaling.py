"""What a device holds and sends in a training step: arithmetic and HLO.

    KERAS_BACKEND=jax python benchmarks/scaling.py --save

For V-MoE B/16, L/16, H/14 and one of 15 billion parameters, over 8 to 512
devices: memory of a device, and bytes that it sends in a step of Adam, counted
from the model. `--compile NAME DEVICES SHARDS` compiles such a step (it runs
nothing and makes no weights) for as many virtual devices and prints what XLA
says beside the arithmetic; with `--save` both tables are kept.
"""

import argparse
import csv
import json
import math
import os
import pathlib
import re
import subprocess
import sys

RESULTS = pathlib.Path(__file__).parent / "results"
EXPERTS, CLASSES, IMAGES = 32, 21843, 8  # Images of a device, one group.
# hidden_dim, num_layers, num_heads, mlp_dim, patch_size
MODELS = {
    "B/16": (768, 12, 12, 3072, 16),
    "L/16": (1024, 24, 16, 4096, 16),
    "H/14": (1280, 32, 16, 5120, 14),
    # Sizes of our own choice that give the paper's 14.7 billion.
    "15B": (1408, 48, 16, 6400, 14),
}
DEVICES = (8, 32, 64, 128, 256, 512)
# Model, blocks, devices, shards, whether dense kernels are spread as well.
COMPILED = (
    ("B/16", 12, 8, 8, False),
    ("B/16", 12, 64, 32, False),
    ("B/16", 2, 256, 32, False),
    ("B/16", 2, 512, 32, False),
    ("H/14", 2, 64, 32, False),
    ("15B", 2, 128, 32, False),
    ("15B", 2, 128, 32, True),
    ("L/16", 24, 64, 32, False),
)
BYTES = 4  # float32.
# Peak TFLOP/s in bfloat16, and GB/s that one device sends: inside of a slice
# (Google's pages of the TPUs' system architecture), over NVLink in one
# direction inside of 8 GPUs, over 400 Gbit/s InfiniBand beyond (NVIDIA's
# datasheets).
MACHINES = {
    "TPU v4": (275, 300, 300),
    "TPU v5e": (197, 200, 200),
    "H100": (989, 450, 50),
}
USED = 0.4  # Share of the peak that a good training step reaches.


def main():
    """The table of arithmetic; with `--compiled` that of the compiled steps."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(compiled(*COMPILED[arguments.one])))
        return
    tables = {"scaling": [
        counted(name, MODELS[name][1], devices, min(devices, EXPERTS), dense)
        for name in MODELS for devices in DEVICES
        for dense in (False, True)
    ]}  # fmt: skip
    if arguments.compiled:
        tables["scaling_compiled"] = [child(i) for i in range(len(COMPILED))]
    for name, rows in tables.items():
        rows = [rounded(row) for row in rows]
        print(
            "\n| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|"
        )
        for row in rows:
            print("| " + " | ".join(map(str, row.values())) + " |")
        if arguments.save:
            with open(RESULTS / f"{name}.csv", "w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)


def child(index):
    """A compilation in a process with its own number of devices."""
    flag = f"--xla_force_host_platform_device_count={COMPILED[index][2]}"
    done = subprocess.run(  # noqa: S603
        [sys.executable, *sys.argv, "--one", str(index)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "XLA_FLAGS": flag},
    )
    print(done.stdout, flush=True)
    return json.loads(done.stdout.splitlines()[-1])


def make_model(name, blocks):
    """A V-MoE without weights."""
    from keras_vmoe import models

    hidden_dim, _, heads, mlp_dim, patch = MODELS[name]
    with models.without_weights():
        return models.ViTMoE(
            image_size=224, patch_size=patch, hidden_dim=hidden_dim,
            num_layers=blocks, num_heads=heads, mlp_dim=mlp_dim,
            num_classes=CLASSES,
            moe={"layers": "every_2", "num_experts": EXPERTS,
                 "num_selected_experts": 2, "capacity_factor": 1.05,
                 "images_per_group": IMAGES},
        )  # fmt: skip


def counted(name, blocks, devices, shards, shard_dense):
    """Memory and traffic of a device, from the model's sizes alone."""
    from keras_vmoe import distribution
    from keras_vmoe import models
    from keras_vmoe import routing

    model = make_model(name, blocks)
    is_expert = re.compile(distribution.expert_parallel.EXPERTS).search
    sizes = [(x.path, math.prod(x.shape)) for x in model.trainable_variables]
    experts = sum(size for path, size in sizes if is_expert(path))
    dense = sum(size for _, size in sizes) - experts
    layers, dim = len(model.moe_layers), MODELS[name][0]
    tokens = IMAGES * ((224 // MODELS[name][4]) ** 2 + 1)
    places = routing.capacity(tokens, EXPERTS, 2, 1.05)
    buffer = EXPERTS * places * dim * BYTES
    cost = models.cost(model)
    held = experts / shards + dense / (devices if shard_dense else 1)
    replicas = devices // shards
    ring = lambda size, n: 2 * size * BYTES * (n - 1) / n  # noqa: E731
    row = {
        "model": name,
        "blocks": blocks,
        "devices": devices,
        "expert shards": shards,
        "dense kernels spread": shard_dense,
        "parameters (M)": round((dense + experts) / 1e6, 1),
        "weights and slots (GB)": 3 * held * BYTES / 1e9,
        "gradients (GB)": held * BYTES / 1e9,
        "activations (GB)": cost.activation_bytes * IMAGES / 1e9,
        "all-to-all (GB)": 4 * layers * buffer * (shards - 1) / shards / 1e9,
        "gradient sums (GB)": (
            ring(dense, devices) * (1.5 if shard_dense else 1)
            + ring(experts / shards, replicas)
        )
        / 1e9,
        "compute (TFLOP)": 3 * 2 * cost.flops * IMAGES / 1e12,
    }
    sent = row["all-to-all (GB)"] + row["gradient sums (GB)"]
    for machine, (peak, near, far) in MACHINES.items():
        compute = row["compute (TFLOP)"] / (USED * peak)
        link = near if devices <= 8 else far
        row[f"{machine}: sending / computing"] = sent / link / compute
    return row


def rounded(row):
    """A row for people."""
    return {
        key: round(value, 3) if isinstance(value, float) else value
        for key, value in row.items()
    }


def compiled(name, blocks, devices, shards, shard_dense):
    """What XLA made of a training step, beside the arithmetic."""
    import jax
    import keras

    from keras_vmoe import distribution

    parallel = distribution.ExpertParallel(shards, shard_dense=shard_dense)
    keras.distribution.set_distribution(parallel)
    model = make_model(name, blocks)

    def spec(shape, dtype, layout):
        return jax.ShapeDtypeStruct(
            shape, dtype, sharding=layout.backend_layout
        )

    def state(variables):
        return [
            spec(x.shape, x.dtype, parallel.get_variable_layout(x))
            for x in variables
        ]

    trainable = state(model.trainable_variables)
    others = state(model.non_trainable_variables)
    batch = IMAGES * devices
    images = spec(
        (batch, 224, 224, 3), "float32",
        parallel.layout(distribution.expert_parallel.DATA, None, None, None),
    )  # fmt: skip
    labels = spec(
        (batch,), "int32", parallel.layout(distribution.expert_parallel.DATA)
    )
    crossentropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def loss(trainable, others, images, labels):
        logits, others, losses = model.stateless_call(
            trainable, others, images, training=True, return_losses=True
        )
        return crossentropy(labels, logits) + sum(losses), others

    def step(trainable, first, second, others, images, labels):
        """Adam, without its bias correction."""
        gradients, others = jax.grad(loss, has_aux=True)(
            trainable, others, images, labels
        )
        map_ = jax.tree.map
        first = map_(lambda m, g: 0.9 * m + 0.1 * g, first, gradients)
        second = map_(lambda v, g: 0.99 * v + 0.01 * g * g, second, gradients)
        trainable = map_(
            lambda w, m, v: w - 1e-3 * m / (jax.numpy.sqrt(v) + 1e-8),
            trainable, first, second,
        )  # fmt: skip
        return trainable, first, second, others

    keep = [jax.tree.map(lambda x: x.sharding, trainable)] * 3
    done = (
        jax.jit(
            step,
            donate_argnums=(0, 1, 2, 3),
            out_shardings=(*keep, jax.tree.map(lambda x: x.sharding, others)),
        )
        .lower(trainable, trainable, trainable, others, images, labels)
        .compile()
    )
    found = collectives(done.as_text())
    memory = done.memory_analysis()
    row = counted(name, blocks, devices, shards, shard_dense)
    total = lambda kind: sum(found.get(kind, [])) / 1e9  # noqa: E731
    exchanged = row["all-to-all (GB)"] * shards / (shards - 1)
    return {
        **{key: row[key] for key in list(row)[:6]},
        "all-to-alls": len(found.get("all-to-all", [])),
        "their buffers (GB)": total("all-to-all"),
        "by arithmetic": exchanged,
        "all-gathers": len(found.get("all-gather", [])),
        "collective-permutes": len(found.get("collective-permute", [])),
        "summed (GB)": total("all-reduce") + total("reduce-scatter"),
        "gradients (GB)": row["gradients (GB)"],
        "weights and slots (GB)": row["weights and slots (GB)"],
        "arguments (GB)": memory.argument_size_in_bytes / 1e9,
    }


def collectives(hlo):
    """Per kind of collective the bytes of each result, on one device."""
    found = {}
    kinds = "all-to-all|all-gather|collective-permute|all-reduce|reduce-scatter"
    hlo = re.sub(r"/\*.*?\*/", "", hlo)  # Numbers inside of long tuples.
    for shapes, kind in re.findall(rf" = (\(?[^=]*?)\s({kinds})\(", hlo):
        sizes = re.findall(r"f32\[([\d,]*)\]", shapes)
        if sizes:
            numbers = [
                BYTES * math.prod(int(n) for n in size.split(",") if n)
                for size in sizes
            ]
            found.setdefault(kind, []).append(sum(numbers))
    return found


if __name__ == "__main__":
    main()
