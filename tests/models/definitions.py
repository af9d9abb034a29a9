"""A slow definition of `ViTMoE` in numpy, from weights by their names."""

import numpy as np

from keras_vmoe.checkpoints.vmoe import vmoe_weights
from keras_vmoe.models import ViTMoE
from tests.layers.definitions import attention_slowly
from tests.layers.definitions import float64
from tests.layers.definitions import gelu_tanh
from tests.layers.definitions import layer_norm
from tests.layers.definitions import mlp_slowly
from tests.layers.definitions import moe_slowly
from tests.layers.definitions import patches_slowly


def tiny(moe=True, **arguments):
    """A model of 4 patches and 4 blocks; 4 experts in blocks 1 and 3.

    Its sizes are those of the golden models, so that JAX compiles the initial
    values of weights of one shape but once.
    """
    if moe is True:
        moe = {}
    if moe is not None:
        moe = {
            "layers": "last_2",
            "num_experts": 4,
            "images_per_group": 2,
            **moe,
        }
    arguments = {
        "image_size": 8,
        "patch_size": 4,
        "hidden_dim": 32,
        "num_layers": 4,
        "num_heads": 4,
        "mlp_dim": 64,
        "num_classes": 10,
        **arguments,
    }
    return ViTMoE(moe=moe, **arguments)


def images_of(batch, seed=0):
    generator = np.random.default_rng(seed)
    return generator.uniform(-1, 1, (batch, 8, 8, 3)).astype("float32")


def vit_slowly(model, images):
    """Logits of a model with a class token and learned positions."""
    weights = {k: float64(w) for k, w in vmoe_weights(model).items()}

    def part(prefix):
        prefix = f"{prefix}/"
        return {
            key.removeprefix(prefix): weight
            for key, weight in weights.items()
            if key.startswith(prefix)
        }

    def mlp_of(prefix):
        kinds = ("Dense_0/kernel", "Dense_0/bias")
        kinds += ("Dense_1/kernel", "Dense_1/bias")
        return [weights[f"{prefix}/{kind}"] for kind in kinds]

    x = patches_slowly(images.astype("float64"), **part("embedding"))
    cls = np.tile(weights["cls"], (len(images), 1, 1))
    x = np.concatenate([cls, x], axis=1)
    x = x + weights["Encoder/posembed_input/pos_embedding"]
    for i in range(model.num_layers):
        block = f"Encoder/encoderblock_{i}"
        y = layer_norm(x, **part(f"{block}/LayerNorm_0"))
        x = x + attention_slowly(y, y, part(f"{block}/SelfAttention"))
        y = layer_norm(x, **part(f"{block}/LayerNorm_1"))
        if f"{block}/Mlp/Dense_0/kernel" in weights:
            x = x + mlp_slowly(y, *mlp_of(f"{block}/Mlp"), gelu_tanh)
        else:
            layer = model.get_layer(f"block_{i}_moe")
            x = x + moe_slowly(
                y,
                weights[f"{block}/Moe/Router/dense/kernel"],
                mlp_of(f"{block}/Moe/Mlp"),
                layer.router.num_selected_experts,
                layer.router.capacity_factor,
                layer.images_per_group,
                layer.router.batch_priority,
                gelu_tanh,
            )
    x = layer_norm(x, **part("Encoder/encoder_norm"))[:, 0]
    if "pre_logits/kernel" in weights:
        x = np.tanh(
            x @ weights["pre_logits/kernel"] + weights["pre_logits/bias"]
        )
    return x @ weights["head/kernel"] + weights["head/bias"]
