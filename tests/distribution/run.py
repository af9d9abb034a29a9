"""Trains small models on eight virtual devices; prints JSON, case by case.

KERAS_BACKEND=jax python -m tests.distribution.run \\
    "vit 0 data 4" "vit 0 4 --noise"
"""

import argparse
import json
import os
import re
import sys

from tests import devices

DEVICES = 8
os.environ["XLA_FLAGS"] = devices.flags(DEVICES)  # Read when JAX is imported.

import jax  # noqa: E402
import keras  # noqa: E402
import numpy as np  # noqa: E402
from keras.src.backend.jax import trainer  # noqa: E402

from keras_vmoe import distribution  # noqa: E402
from keras_vmoe import layers  # noqa: E402
from keras_vmoe import models  # noqa: E402
from keras_vmoe.routing._groups import group_tokens  # noqa: E402
from tests.layers.test_bank import GatedExperts  # noqa: E402

BATCH, STEPS, EXPERTS = 16, 5, 8

parser = argparse.ArgumentParser()
parser.add_argument("family", choices=["vit", "convnext", "banks", "swin"])
parser.add_argument(
    "shards",
    nargs="+",
    help="0 is one device, data is DataParallel, dense is 4 with shard_dense.",
)
parser.add_argument("--noise", action="store_true")
parser.add_argument("--router", default="top_k")
parser.add_argument("--save", help="Folder of .keras files.")


def make_model(arguments):
    """A tiny model with two MoE layers, in groups of two images."""
    keras.utils.set_random_seed(0)
    moe = {
        "layers": "every_1",
        "num_experts": EXPERTS,
        "router": arguments.router,
    }
    if arguments.router == "top_k":
        moe |= {
            "num_selected_experts": 2,
            "images_per_group": 2,
            "capacity_factor": 1.0,
            "noise_std": None if arguments.noise else 0.0,
        }
    elif arguments.router == "expert_choice":
        moe |= {"images_per_group": 2}
    else:  # A slot for each expert, of as few as four tokens.
        moe |= {"capacity_factor": 2.0}
    if arguments.family == "vit":
        model = models.ViTMoE(
            image_size=8, patch_size=4, hidden_dim=16, num_layers=2,
            num_heads=2, mlp_dim=32, num_classes=4, moe=moe,
        )  # fmt: skip
    elif arguments.family == "banks":
        model = banks()
    elif arguments.family == "swin":
        model = models.SwinMoE(
            depths=(2,), dims=(8,), num_heads=(2,), num_classes=4,
            window_size=2, image_size=8, patch_size=2,
            moe=moe,
        )  # fmt: skip
    else:
        model = models.ConvNeXtMoE(
            depths=(1, 1), dims=(8, 16), num_classes=4, image_size=8,
            patch_size=2, moe=moe,
        )  # fmt: skip
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])
    return model


def banks():
    """A bank of one's own, and one with penalties and constraints."""
    options = {"images_per_group": 2, "num_experts": EXPERTS}
    router = layers.TopKRouter(EXPERTS, 2, noise_std=0.0)
    own = layers.MoEMLP(
        router=router, experts=GatedExperts(name="experts"), **options
    )
    ours = layers.MoEMLP(
        hidden_dim=32,
        kernel_regularizer=keras.regularizers.OrthogonalRegularizer(0.01),
        kernel_constraint=keras.constraints.MaxNorm(1.0),
        router=layers.TopKRouter(EXPERTS, 2, noise_std=0.0),
        **options,
    )
    inputs = keras.Input((8, 8, 3))
    # A layer in front: without it the first dispatch would need no gradient.
    x = keras.layers.Dense(12)(keras.layers.Reshape((16, 12))(inputs))
    x = ours(own(x))
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, keras.layers.Dense(4)(x))


def parallel_of(shards):
    """A distribution by its name on the command line."""
    if shards == "0":
        return None
    if shards == "data":
        return distribution.DataParallel()
    if shards == "dense":
        return distribution.ExpertParallel(4, shard_dense=True)
    return distribution.ExpertParallel(int(shards))


def train(arguments, shards):
    """Losses and weights of a few steps, and where they lie."""
    keras.distribution.set_distribution(parallel_of(shards))
    model = make_model(arguments)
    steps = noted_steps()
    images = np.random.default_rng(0).normal(size=(STEPS * BATCH, 8, 8, 3))
    images = images.astype("float32")
    labels = np.arange(len(images)) % 4
    losses = []
    for i in range(0, len(images), BATCH):
        part = slice(i, i + BATCH)
        history = model.fit(
            images[part], labels[part], BATCH, verbose=0, shuffle=False
        )
        losses.append(history.history["loss"][0])
    result = {
        "losses": losses,
        "accuracy": model.evaluate(images, labels, BATCH, verbose=0)[1],
        "prediction": model.predict(images[:BATCH], BATCH, verbose=0).tolist(),
        "weights": [np.array(x).tolist() for x in model.weights],
    }
    if arguments.save:
        models.save(model, f"{arguments.save}/{shards}.keras")
    if shards not in ("0", "data"):
        result["share"] = {
            "weights": share_of(model.variables),
            "slots": share_of(model.optimizer.variables),
            "dense": dense_share(model),
        }
        (step,) = steps
        result["collectives"] = collectives(step.as_text())
        result["buffer_bytes"] = buffer_bytes(model)
    return result


def share_of(variables):
    """Shares of the experts' variables that one device holds."""
    experts = [
        x for x in variables if re.search("experts.(hidden|out)", x.path)
    ]
    assert experts
    return sorted({on_one_device(x) for x in experts})


def dense_share(model):
    """The share of the dense kernels, convolutions apart, on one device."""
    kernels = [
        x
        for x in model.trainable_variables
        if len(x.shape) in (2, 3) and "experts" not in x.path
    ]
    held = sum(on_one_device(x) * np.prod(x.shape) for x in kernels)
    return held / sum(np.prod(x.shape) for x in kernels)


def on_one_device(variable):
    shard = variable.value.addressable_shards[0].data
    return shard.size / np.prod(variable.shape)


def noted_steps():
    """A list that gets the compiled training step of the next model.

    It is the one that `fit` runs.
    """
    found = []

    def jit(function, **options):
        function = jax.jit(function, **options)

        def call(*arguments):
            if not found:
                found.append(function.lower(*arguments).compile())
            return found[0](*arguments)

        trainer.jit = jax.jit
        return call

    trainer.jit = jit
    return found


def collectives(hlo):
    """Per kind of collective the bytes of each, on one device."""
    found = {}
    pattern = r" = (\(?[^=]*?)\s(all-to-all|all-gather|collective-permute)\("
    hlo = re.sub(r"/\*.*?\*/", "", hlo)  # Indices in long tuples.
    for shapes, kind in re.findall(pattern, hlo):
        sizes = re.findall(r"f32\[([\d,]*)\]", shapes)
        if sizes:
            numbers = [
                4 * np.prod([int(n) for n in size.split(",") if n], dtype=int)
                for size in sizes
            ]
            found.setdefault(kind, []).append(int(sum(numbers)))
    return found


def buffer_bytes(model):
    """Bytes of the buffers of each MoE layer, on one device."""
    sizes = []
    for layer in model.layers:
        if not isinstance(layer, layers.MoEMLP):
            continue
        shape = (BATCH, *layer.input.shape[1:])
        buffers = jax.eval_shape(
            lambda images, layer=layer: layer.plan(images).dispatch(
                group_tokens(images, layer.images_per_group).tokens
            ),
            jax.ShapeDtypeStruct(shape, "float32"),
        )
        sizes.append(4 * int(np.prod(buffers.shape)) // DEVICES)
    return sizes


def main():
    for case in sys.argv[1:]:
        arguments = parser.parse_args(case.split())
        results = {x: train(arguments, x) for x in arguments.shards}
        print(json.dumps(results))


main()
