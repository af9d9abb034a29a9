"""ViTMoE: the vision transformer with sparse MoE layers of V-MoE."""

from typing import Unpack

import keras

from keras_vmoe import layers
from keras_vmoe._checks import check_choice
from keras_vmoe._checks import check_rates
from keras_vmoe._checks import check_sizes
from keras_vmoe.layers.patches import patch_grid
from keras_vmoe.models.base import MoEModel
from keras_vmoe.models.base import Options
from keras_vmoe.models.base import complete
from keras_vmoe.models.base import image_pair
from keras_vmoe.models.moe import MoEConfig
from keras_vmoe.models.placement import moe_blocks

NUM_SELECTED_EXPERTS = 2  # K of V-MoE.
POOLINGS = ("token", "gap", "map")
POSITION_EMBEDDINGS = ("learned", "sincos2d")


@keras.saving.register_keras_serializable("keras_vmoe")
class ViTMoE(MoEModel):
    """Vision transformer whose MLPs may be mixtures of experts.

    A functional model. Its layers are named `embedding`, `class_token`,
    `positions`, `block_<i>_attention`, `block_<i>_mlp` or `block_<i>_moe`,
    `norm`, `pooling`, `pre_logits`, `head`. What leaves a block, residual
    branches included, is the output of `block_<i>_mlp_add`.

    Defaults are V-MoE's: pre-norm blocks, LayerNorm epsilon 1e-6, gelu in its
    tanh approximation, learned positions added after the class token is
    prepended, a head initialized to 0. Logits are float32 under every dtype
    policy.

    Args:
        image_size: Side of the images in pixels, or `(height, width)`.
        patch_size: Side of a patch in pixels.
        hidden_dim: D, features of a token.
        num_layers: Encoder blocks.
        num_heads: Attention heads; must divide `hidden_dim`.
        mlp_dim: F, hidden features of the MLPs and of the experts.
        num_classes: Classes; None leaves the head out, and the model returns
            features `(B, D)`.
        pooling: `"token"` (class token), `"gap"` (mean of the tokens) or
            `"map"` (attention pooling).
        representation_size: Features of an extra tanh layer before the head;
            None leaves it out.
        position_embedding: `"learned"` or `"sincos2d"`.
        moe: None for the dense twin, or a dict of `models.MoEConfig`'s
            attributes, such as `layers`, `num_experts`, `router`,
            `num_selected_experts`, `capacity_factor`, `images_per_group`.
        dropout: Dropout rate after the position embeddings and attention, and
            inside the MLPs and experts, in `[0, 1)`.
        drop_path_rate: Stochastic depth: probability of dropping a residual
            branch of an image in the last block. It rises linearly from 0 in
            the first block.
        layer_scale_init_value: Initial value of DeiT III's layer scale; None
            leaves it out.
        activation: Activation of the MLPs and experts; see `layers.MLP`.
        channels: Channels of the images.
        dtype: Dtype policy of the layers, such as `"mixed_bfloat16"`. None
            means the global one.
        name: Name of the model.

    Call arguments:
        images: `(B, H, W, channels)` float tensor, by convention in
            `[-1, 1]`.
        training: Whether to route with noise and add auxiliary losses.

    Returns:
        `(B, num_classes)` float32 logits.

    Raises:
        ValueError: If sizes do not divide each other, or if a name is unknown.

    Example:

    >>> model = ViTMoE(
    ...     image_size=16, patch_size=4, hidden_dim=32, num_layers=4,
    ...     num_heads=4, mlp_dim=64, num_classes=10,
    ...     moe=dict(layers="last_2", num_experts=4))
    >>> model(keras.ops.ones((3, 16, 16, 3))).shape
    (3, 10)
    >>> model.get_layer("block_3_moe").num_experts
    4

    Reference:
        [Riquelme et al., 2021](https://arxiv.org/abs/2106.05974), section 2;
        [Dosovitskiy et al., 2021](https://arxiv.org/abs/2010.11929).
    """

    def __init__(
        self,
        image_size,
        patch_size,
        hidden_dim,
        num_layers,
        num_heads,
        mlp_dim,
        num_classes,
        pooling="token",
        representation_size=None,
        position_embedding="learned",
        moe=None,
        dropout=0.0,
        **options: Unpack[Options],
    ):
        options = complete(
            ViTMoE, options, activation="gelu_tanh", name="vit_moe"
        )
        moe = None if moe is None else MoEConfig.from_dict(moe)
        check_choice("pooling", pooling, POOLINGS)
        check_choice(
            "position_embedding", position_embedding, POSITION_EMBEDDINGS
        )
        check_sizes(
            patch_size=patch_size,
            hidden_dim=hidden_dim,
            num_layers=num_layers,
            num_heads=num_heads,
            mlp_dim=mlp_dim,
            num_classes=1 if num_classes is None else num_classes,
            representation_size=representation_size or 1,
        )
        check_rates(dropout=dropout)
        policy = options.dtype
        shape = (*image_pair(image_size), options.channels)
        images = keras.Input(shape, name="images")
        x = layers.PatchEmbedding(
            hidden_dim, patch_size, dtype=policy, name="embedding"
        )(images)
        grid = patch_grid(shape[:2], patch_size)
        x = _positions(x, pooling, position_embedding, grid, dropout, policy)
        mlps = _mlps(num_layers, hidden_dim, mlp_dim, moe, dropout, options)
        x = _encoder(x, list(mlps), num_heads, dropout, options)
        x = _pooling(pooling, num_heads, mlp_dim, options)(x)
        x = _head(x, representation_size, num_classes, policy)
        arguments = {
            "image_size": image_size,
            "patch_size": patch_size,
            "hidden_dim": hidden_dim,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "mlp_dim": mlp_dim,
            "num_classes": num_classes,
            "pooling": pooling,
            "representation_size": representation_size,
            "position_embedding": position_embedding,
            "moe": moe,
            "dropout": dropout,
        }
        super().__init__(images, x, {**arguments, **vars(options)})


def _encoder(x, mlps, num_heads, dropout, options):
    """The encoder blocks and the norm after them."""
    last = max(1, len(mlps) - 1)
    for i, mlp in enumerate(mlps):
        x = layers.encoder_block(
            x,
            mlp,
            num_heads,
            name=f"block_{i}",
            dropout=dropout,
            drop_path_rate=options.drop_path_rate * i / last,
            layer_scale_init_value=options.layer_scale_init_value,
        )
    return keras.layers.LayerNormalization(
        epsilon=1e-6, dtype=options.dtype, name="norm"
    )(x)


def _mlps(num_layers, hidden_dim, mlp_dim, moe, dropout, options):
    """One MLP or MoE layer for each block."""
    sparse = () if moe is None else moe_blocks(moe.layers, num_layers)
    arguments = {
        "activation": options.activation,
        "dropout": dropout,
        "dtype": options.dtype,
    }
    for i in range(num_layers):
        if i in sparse:
            yield moe.make_layer(
                i,
                hidden_dim,
                mlp_dim,
                f"block_{i}_moe",
                num_selected_experts=NUM_SELECTED_EXPERTS,
                **arguments,
            )
        else:
            yield layers.MLP(mlp_dim, name=f"block_{i}_mlp", **arguments)


def _pooling(pooling, num_heads, mlp_dim, options):
    policy = options.dtype
    if pooling == "token":
        return layers.TokenPooling(dtype=policy, name="pooling")
    if pooling == "gap":
        return keras.layers.GlobalAveragePooling1D(dtype=policy, name="pooling")
    return layers.AttentionPooling(
        num_heads, mlp_dim, options.activation, dtype=policy, name="pooling"
    )


def _positions(x, pooling, position_embedding, grid, dropout, policy):
    """The class token, if one is pooled, and the positions."""
    if pooling == "token":
        x = layers.ClassToken(dtype=policy, name="class_token")(x)
    if position_embedding == "learned":
        x = layers.LearnedPositions(dtype=policy, name="positions")(x)
    else:
        x = layers.SinCos2DPositions(grid, dtype=policy, name="positions")(x)
    if dropout:
        x = layers.Dropout(dropout, dtype=policy, name="dropout")(x)
    return x


def _head(x, representation_size, num_classes, policy):
    """From the features of an image to its logits."""
    if representation_size is not None:
        x = keras.layers.Dense(
            representation_size,
            activation="tanh",
            kernel_initializer="lecun_normal",
            dtype=policy,
            name="pre_logits",
        )(x)
    if num_classes is None:
        return x
    return keras.layers.Dense(
        num_classes, kernel_initializer="zeros", dtype="float32", name="head"
    )(x)
