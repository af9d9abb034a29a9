"""ViTMoE: the vision transformer with sparse MoE layers of V-MoE."""

import keras

from keras_vmoe import layers
from keras_vmoe._checks import check_rates
from keras_vmoe._checks import check_sizes
from keras_vmoe.layers.patches import patch_grid
from keras_vmoe.models.base import MoEModel
from keras_vmoe.models.base import check_layer_scale
from keras_vmoe.models.base import check_unknown
from keras_vmoe.models.base import image_pair
from keras_vmoe.models.moe import MoEConfig
from keras_vmoe.models.placement import moe_blocks

NUM_SELECTED_EXPERTS = 2  # K of V-MoE.
CHOICES = {
    "pooling": ("token", "gap", "map"),
    "position_embedding": ("learned", "sincos2d"),
}


@keras.saving.register_keras_serializable("keras_vmoe")
class ViTMoE(MoEModel):
    """Vision transformer whose MLPs may be mixtures of experts.

    A functional model. Its layers are named `embedding`, `class_token`,
    `positions`, `block_<i>_attention`, `block_<i>_mlp` or `block_<i>_moe`,
    `norm`, `pooling`, `pre_logits`, `head`. What leaves a block, residual
    branches included, is the output of `block_<i>_mlp_add`.

    Defaults are V-MoE's: pre-norm blocks, LayerNorm epsilon 1e-6, gelu in its
    tanh approximation, learned positions added behind the class token, a head
    that starts at 0. Logits are float32 under every dtype policy.

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
        dropout: Dropout rate behind the positions, the attention and in the
            MLPs and experts, in `[0, 1)`.
        drop_path: Probability of dropping a residual branch of an image in the
            last block; it rises linearly from 0 in the first, which is all
            there is of a model of one block.
        layer_scale: Starting value of the layer scale of DeiT III; None leaves
            it out.
        activation: Activation of the MLPs and experts; see `layers.MLP`.
        dtype: Dtype policy of the layers, such as `"mixed_bfloat16"`. None
            means the global one.
        name: Name of the model.

    Call arguments:
        images: `(B, H, W, 3)` float tensor, by convention in `[-1, 1]`.
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
        drop_path=0.0,
        layer_scale=None,
        activation="gelu_tanh",
        dtype=None,
        name="vit_moe",
        **kwargs,
    ):
        check_unknown(ViTMoE, kwargs)
        dtype = dtype or keras.config.dtype_policy()
        policy = keras.dtype_policies.get(dtype).name
        moe = None if moe is None else MoEConfig.from_dict(moe)
        _check_choices(pooling=pooling, position_embedding=position_embedding)
        check_sizes(
            patch_size=patch_size,
            hidden_dim=hidden_dim,
            num_layers=num_layers,
            num_heads=num_heads,
            mlp_dim=mlp_dim,
            num_classes=1 if num_classes is None else num_classes,
            representation_size=representation_size or 1,
        )
        check_rates(dropout=dropout, drop_path=drop_path)
        check_layer_scale(layer_scale)
        images = keras.Input((*image_pair(image_size), 3), name="images")
        x = layers.PatchEmbedding(
            hidden_dim, patch_size, dtype=policy, name="embedding"
        )(images)
        grid = patch_grid(images.shape[1:3], patch_size)
        x = _positions(x, pooling, position_embedding, grid, dropout, policy)
        mlps = _mlps(
            num_layers, hidden_dim, mlp_dim, moe, activation, dropout, policy
        )
        x = _encoder(x, mlps, num_heads, dropout, drop_path, layer_scale)
        x = _pooling(pooling, num_heads, mlp_dim, activation, policy)(x)
        x = _head(x, representation_size, num_classes, policy)
        super().__init__(images, x, name=name, **kwargs)

        self.image_size = image_size
        self.patch_size = patch_size
        self.hidden_dim = hidden_dim
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.mlp_dim = mlp_dim
        self.num_classes = num_classes
        self.pooling = pooling
        self.representation_size = representation_size
        self.position_embedding = position_embedding
        self.moe = moe
        self.dropout = dropout
        self.drop_path = drop_path
        self.layer_scale = layer_scale
        self.activation = activation
        self.layers_dtype = policy

    def get_config(self):
        return {
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "hidden_dim": self.hidden_dim,
            "num_layers": self.num_layers,
            "num_heads": self.num_heads,
            "mlp_dim": self.mlp_dim,
            "num_classes": self.num_classes,
            "pooling": self.pooling,
            "representation_size": self.representation_size,
            "position_embedding": self.position_embedding,
            "moe": None if self.moe is None else self.moe.to_dict(),
            "dropout": self.dropout,
            "drop_path": self.drop_path,
            "layer_scale": self.layer_scale,
            "activation": self.activation,
            "dtype": self.layers_dtype,
            "name": self.name,
            "trainable": self.trainable,
        }


def _encoder(x, mlps, num_heads, dropout, drop_path, layer_scale):
    """The encoder blocks and the norm behind them."""
    mlps = list(mlps)
    for i, mlp in enumerate(mlps):
        x = layers.encoder_block(
            x,
            mlp,
            num_heads,
            name=f"block_{i}",
            dropout=dropout,
            drop_path=drop_path * i / max(1, len(mlps) - 1),
            layer_scale=layer_scale,
        )
    policy = mlps[-1].dtype_policy.name
    return keras.layers.LayerNormalization(
        epsilon=1e-6, dtype=policy, name="norm"
    )(x)


def _mlps(num_layers, hidden_dim, mlp_dim, moe, activation, dropout, policy):
    """One MLP or MoE layer for each block."""
    sparse = () if moe is None else moe_blocks(moe.layers, num_layers)
    for i in range(num_layers):
        if i in sparse:
            yield moe.make_layer(
                i,
                hidden_dim,
                mlp_dim,
                f"block_{i}_moe",
                num_selected_experts=NUM_SELECTED_EXPERTS,
                activation=activation,
                dropout=dropout,
                dtype=policy,
            )
        else:
            yield layers.MLP(
                mlp_dim,
                activation=activation,
                dropout=dropout,
                dtype=policy,
                name=f"block_{i}_mlp",
            )


def _pooling(pooling, num_heads, mlp_dim, activation, policy):
    if pooling == "token":
        return layers.TokenPooling(dtype=policy, name="pooling")
    if pooling == "gap":
        return keras.layers.GlobalAveragePooling1D(dtype=policy, name="pooling")
    return layers.AttentionPooling(
        num_heads, mlp_dim, activation, dtype=policy, name="pooling"
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


def _check_choices(**names):
    for name, value in names.items():
        choices = CHOICES[name]
        if value not in choices:
            raise ValueError(
                f"`{name}` must be one of {choices}. "
                f"Received: {name}={value!r}. The default is {choices[0]!r}."
            )
