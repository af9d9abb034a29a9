"""What a device holds and sends in a training step: arithmetic and HLO.

    KERAS_BACKEND=jax python benchmarks/scaling.py --save

For V-MoE B/16, L/16, H/14 and one of 15 billion parameters, over 8 to 512
devices: memory of a device, and bytes that it sends in a step of Adam, counted
from the model. `--compiled` also compiles some of these steps (it runs nothing
and makes no weights) for as many virtual devices and puts what XLA says beside
the arithmetic; with `--save` the tables are kept.
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
from typing import NamedTuple

import interleaved

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


class Machine(NamedTuple):
    """Devices of a kind and their links.

    Attributes:
        peak: TFLOP/s of a device in bfloat16.
        near: GB/s that a device sends to others of its island.
        island: Devices that are linked like that.
        far: GB/s that a device sends to other islands; None where this is no
            plan for several.
    """

    peak: float
    near: float
    island: int
    far: float | None = None


# Google's pages of the TPUs' system architecture: a slice has up to 4096 chips
# of v4, 256 of v5e. NVIDIA's datasheets: NVLink in one direction inside of 8
# GPUs, an adapter of 400 Gbit/s InfiniBand for each GPU beyond.
MACHINES = {
    "TPU v4": Machine(275, 300, 4096),
    "TPU v5e": Machine(197, 200, 256),
    "H100": Machine(989, 450, 8, 50),
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
        rows = [{**rounded(row), **interleaved.versions("jax")} for row in rows]
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
    from keras_vmoe.models.costs import without_weights

    hidden_dim, _, heads, mlp_dim, patch = MODELS[name]
    with without_weights():
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
    from keras_vmoe import models

    model = make_model(name, blocks)
    cost = models.cost(model)
    dense, experts = parameter_bytes(model)
    layers, buffer = len(model.moe_layers), buffer_bytes(name)
    held = experts / shards + dense / (devices if shard_dense else 1)
    # Spread kernels are gathered forward and backward, their gradients summed
    # in parts: three passes instead of the two of a whole sum.
    sums = {
        "dense": dense * (1.5 if shard_dense else 1),
        "experts": experts / shards,
    }
    exchanged = 4 * layers * buffer
    compute = 3 * 2 * cost.macs * IMAGES / 1e12
    row = {
        "model": name,
        "blocks": blocks,
        "devices": devices,
        "expert shards": shards,
        "dense kernels spread": shard_dense,
        "parameters (M)": round((dense + experts) / BYTES / 1e6, 1),
        "weights and slots (GB)": 3 * held / 1e9,
        "gradients (GB)": held / 1e9,
        "activations (GB)": cost.activation_bytes * IMAGES / 1e9,
        # What goes to the experts of each layer, and what comes back.
        "buffers (GB)": 2 * layers * buffer / 1e9,
        "all-to-all (GB)": exchanged * (shards - 1) / shards / 1e9,
        "gradient sums (GB)": (
            ring(sums["dense"], devices)
            + ring(sums["experts"], devices // shards)
        )
        / 1e9,
        "compute (TFLOP)": compute,
    }
    for kind, machine in MACHINES.items():
        near, far = sent(machine, devices, shards, exchanged, sums)
        if machine.far is not None:
            row |= {f"{kind}: near (GB)": near, f"{kind}: far (GB)": far}
        row[f"{kind}: sending / computing"] = ratio(machine, near, far, compute)
    return row


def parameter_bytes(model):
    """Bytes of a model's dense weights, and of its experts'."""
    from keras_vmoe import distribution

    is_expert = re.compile(distribution.expert_parallel.EXPERTS).search
    sizes = {False: 0, True: 0}
    for x in model.trainable_variables:
        sizes[bool(is_expert(x.path))] += math.prod(x.shape) * BYTES
    return sizes[False], sizes[True]


def buffer_bytes(name):
    """Bytes of the buffers that a device fills for one MoE layer."""
    from keras_vmoe import routing

    dim, patch = MODELS[name][0], MODELS[name][4]
    tokens = IMAGES * ((224 // patch) ** 2 + 1)
    places = routing.capacity(tokens, EXPERTS, 2, 1.05)
    return EXPERTS * places * dim * BYTES


def ring(size, devices):
    """Bytes that each of some devices sends to sum what all of them have."""
    return 2 * size * (devices - 1) / devices


def sent(machine, devices, shards, exchanged, sums):
    """GB that a device sends in its island, and to others.

    Tokens go to every shard alike. Dense gradients are summed inside of the
    islands, each device then sums its part of them with the other islands' (so
    do NCCL's rings). Replicas of an expert are as far apart as there are
    shards: in other islands, if there is more than one.
    """
    inside = min(devices, machine.island)
    near_shards, islands = min(shards, inside), -(-devices // inside)
    experts = ring(sums["experts"], devices // shards)
    near = exchanged * (near_shards - 1) / shards
    near += ring(sums["dense"], inside) + (experts if islands == 1 else 0)
    far = exchanged * (shards - near_shards) / shards
    far += ring(sums["dense"] / inside, islands)
    far += experts if islands > 1 else 0
    return near / 1e9, far / 1e9


def ratio(machine, near, far, compute):
    """Time to send all, one after the other, by time to compute."""
    if far and machine.far is None:
        return None
    seconds = near / machine.near + (far / machine.far if far else 0)
    return seconds / (compute / (USED * machine.peak))


def rounded(row):
    """A row for people; what is None does not exist."""
    row = {key: "" if value is None else value for key, value in row.items()}
    return {
        key: round(value, 3) if isinstance(value, float) else value
        for key, value in row.items()
    }


def compiled(name, blocks, devices, shards, shard_dense):
    """What XLA made of a training step, beside the arithmetic."""
    import keras

    from keras_vmoe import distribution

    parallel = distribution.ExpertParallel(shards, shard_dense=shard_dense)
    keras.distribution.set_distribution(parallel)
    program = compiled_step(make_model(name, blocks), parallel)
    found, memory = collectives(program.as_text()), program.memory_analysis()
    row = counted(name, blocks, devices, shards, shard_dense)
    total = lambda kind: sum(found.get(kind, [])) / 1e9  # noqa: E731
    return {
        **{key: row[key] for key in list(row)[:6]},
        "all-to-alls": len(found.get("all-to-all", [])),
        "their buffers (GB)": total("all-to-all"),
        "by arithmetic": row["all-to-all (GB)"] * shards / (shards - 1),
        "all-gathers": len(found.get("all-gather", [])),
        "collective-permutes": len(found.get("collective-permute", [])),
        "summed (GB)": total("all-reduce") + total("reduce-scatter"),
        "gradients (GB)": row["gradients (GB)"],
        "weights and slots (GB)": row["weights and slots (GB)"],
        "arguments (GB)": memory.argument_size_in_bytes / 1e9,
        "activations (GB)": row["activations (GB)"],
        "XLA's temporaries (GB)": memory.temp_size_in_bytes / 1e9,
    }


def compiled_step(model, parallel):
    """The training step of a model whose weights are never made."""
    import jax

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
    images = (IMAGES * parallel.num_devices, 224, 224, 3)
    images, labels = (
        spec(shape, dtype, parallel.get_data_layout(shape))
        for shape, dtype in ((images, "float32"), (images[:1], "int32"))
    )
    keep = [jax.tree.map(lambda x: x.sharding, trainable)] * 3
    step = jax.jit(
        step_of(model),
        donate_argnums=(0, 1, 2, 3),
        out_shardings=(*keep, jax.tree.map(lambda x: x.sharding, others)),
    )
    state = (trainable, trainable, trainable, others)
    return step.lower(*state, images, labels).compile()


def step_of(model):
    """A step of Adam, without its bias correction."""
    import jax
    import keras

    crossentropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def loss(trainable, others, images, labels):
        logits, others, losses = model.stateless_call(
            trainable, others, images, training=True, return_losses=True
        )
        return crossentropy(labels, logits) + sum(losses), others

    def step(trainable, first, second, others, images, labels):
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

    return step


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
