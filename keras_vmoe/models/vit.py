"""ViTMoE: the vision transformer with sparse MoE layers of V-MoE."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import Literal
from typing import Unpack

import keras
from keras import ops

from keras_vmoe._checks import check_choice
from keras_vmoe._checks import check_flags
from keras_vmoe._checks import check_rates
from keras_vmoe._checks import check_sizes
from keras_vmoe._typing import Tensor
from keras_vmoe.layers import _blocks
from keras_vmoe.layers import ensemble
from keras_vmoe.layers import patches
from keras_vmoe.layers import pooling as poolings
from keras_vmoe.layers import positions
from keras_vmoe.layers.attention import SelfAttention
from keras_vmoe.layers.ensemble import mean_probability
from keras_vmoe.layers.normalization import LayerNormalization
from keras_vmoe.layers.stochastic import SeededDropout
from keras_vmoe.models import base
from keras_vmoe.models.moe import MoEConfig
from keras_vmoe.models.placement import moe_blocks

NUM_SELECTED_EXPERTS = 2  # K of V-MoE.
POOLINGS = ("token", "gap", "map")
POSITION_EMBEDDINGS = ("learned", "sincos2d")


@keras.saving.register_keras_serializable("keras_vmoe")
class ViTMoE(base.MoEModel):
    """Vision transformer whose MLPs may be mixtures of experts.

    A functional model. Its layers are named `embedding`, `class_token`,
    `positions`, `registers`, `block_<i>_attention`, `block_<i>_mlp` or
    `block_<i>_moe`, `norm`, `pooling`, `pre_logits`, `head`. A block's
    output, residual branches included, is that of `block_<i>_mlp_add`.

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
        num_registers: Learned tokens after the class token, which is pooled;
            None leaves them out.
        qk_norm: Whether to normalize queries and keys in the attention, as in
            ViT-22B and Soft MoE; see `layers.attention.SelfAttention`.
        ensemble_size: Members of an efficient ensemble (E3). Images are copied
            for each before the first block with experts, and each member has
            its own share of the experts. Each is trained on its own, with
            softmax cross-entropy or another loss on logits; the model returns
            the log of their mean probability. None means no ensemble.
        drop_path_rate: Stochastic depth: probability of dropping a residual
            branch of an image in the last block. It rises linearly from 0 in
            the first block.
        layer_scale_init_value: Initial value of DeiT III's layer scale; None
            leaves it out.
        activation: Activation of the MLPs and experts; see `layers.MLP`.
        channels: Channels of the images.
        preprocessing: `data.Preprocessing` of the images, or a dict of its
            attributes. None means the default, to [-1, 1]. `.keras` files store
            it, and loaders of pretrained weights set it.
        dtype: Dtype policy of the layers, such as `"mixed_bfloat16"`. None
            means the global one.
        remat: Whether to recompute the blocks for their gradients instead of
            keeping their activations: training takes less memory and more time.
            On JAX's CPU it saves nothing.
        name: Name of the model.

    Call arguments:
        images: `(B, H, W, channels)` float tensor, by convention in
            `[-1, 1]`.
        training: Whether to route with noise and add auxiliary losses.

    Returns:
        `(B, num_classes)` float32 logits; for an ensemble in training
        `(B, ensemble_size, num_classes)`.

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
        [Dosovitskiy et al., 2021](https://arxiv.org/abs/2010.11929);
        [Allingham et al., 2021](https://arxiv.org/abs/2110.03360) for
        ensembles.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        patch_size: int,
        hidden_dim: int,
        num_layers: int,
        num_heads: int,
        mlp_dim: int,
        num_classes: int | None,
        pooling: Literal["token", "gap", "map"] = "token",
        representation_size: int | None = None,
        position_embedding: Literal["learned", "sincos2d"] = "learned",
        moe: Mapping[str, Any] | MoEConfig | None = None,
        dropout: float = 0.0,
        num_registers: int | None = None,
        qk_norm: bool = False,
        ensemble_size: int | None = None,
        **options: Unpack[base.Options],
    ) -> None:
        settings = base.complete(
            ViTMoE,
            {
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
                "num_registers": num_registers,
                "qk_norm": qk_norm,
                "ensemble_size": ensemble_size,
            },
            options,
            activation="gelu_tanh",
            name="vit_moe",
        )
        _check(settings)
        images = base.image_input(settings)
        x = patches.PatchEmbedding(
            settings.hidden_dim,
            settings.patch_size,
            dtype=settings.dtype,
            name="embedding",
        )(images)
        grid = patches.patch_grid(images.shape[1:3], settings.patch_size)
        x = _positions(x, settings, grid)
        x = _encoder(x, settings)
        x = _pooling(settings)(x)
        super().__init__(images, _head(x, settings), vars(settings))

    def compute_loss(
        self,
        x: Any = None,
        y: Tensor = None,
        y_pred: Tensor = None,
        sample_weight: Tensor = None,
        training: bool = True,
    ) -> Tensor:
        if y is not None and _has_members(y_pred):
            # Each member on its own: the mean over them is the batch's.
            size, classes = y_pred.shape[1:]
            y_pred = ops.reshape(y_pred, (-1, classes))
            y = ops.repeat(y, size, axis=0)
            if sample_weight is not None:
                sample_weight = ops.repeat(sample_weight, size, axis=0)
        return super().compute_loss(x, y, y_pred, sample_weight, training)

    def compute_metrics(
        self, x: Any, y: Tensor, y_pred: Tensor, sample_weight: Tensor = None
    ) -> dict[str, Any]:
        if _has_members(y_pred):
            y_pred = mean_probability(y_pred)
        return super().compute_metrics(x, y, y_pred, sample_weight)


def _has_members(y_pred):
    """Whether these are the logits of an ensemble in training."""
    return len(getattr(y_pred, "shape", ())) == 3


def _check(settings):
    """Raises for a value that is out of range."""
    check_choice("pooling", settings.pooling, POOLINGS)
    check_choice(
        "position_embedding", settings.position_embedding, POSITION_EMBEDDINGS
    )
    base.image_pair(settings.image_size)
    names = ("patch_size", "hidden_dim", "num_layers", "num_heads", "mlp_dim")
    check_sizes(**{name: getattr(settings, name) for name in names})
    check_sizes(representation_size=settings.representation_size or 1)
    check_sizes(num_registers=settings.num_registers or 1)
    if settings.num_registers and settings.pooling != "token":
        raise ValueError(
            "Registers need a class token, which is pooled in their place. "
            f"Received: num_registers={settings.num_registers} with pooling="
            f"{settings.pooling!r}. Set pooling='token'."
        )
    check_rates(dropout=settings.dropout)
    check_flags(qk_norm=settings.qk_norm)
    check_sizes(2, ensemble_size=settings.ensemble_size or 2)
    if settings.ensemble_size is not None and settings.moe is None:
        raise ValueError(
            "The members of an ensemble differ in their experts. Received: "
            f"ensemble_size={settings.ensemble_size} with moe=None. Set `moe`."
        )


def _positions(x, settings, grid):
    """The class token, if one is pooled, the positions, and registers."""
    policy = settings.dtype
    if settings.pooling == "token":
        x = patches.ClassToken(dtype=policy, name="class_token")(x)
    kind = positions.SinCos2DPositions
    if settings.position_embedding == "learned":
        kind = positions.LearnedPositions
    x = kind(grid, dtype=policy, name="positions")(x)
    if settings.dropout:
        x = SeededDropout(settings.dropout, dtype=policy, name="dropout")(x)
    if settings.num_registers:
        count = settings.num_registers
        x = patches.RegisterTokens(count, dtype=policy, name="registers")(x)
    return x


def _encoder(x, settings):
    """The encoder blocks and the norm after them."""
    moe, num_layers = settings.moe, settings.num_layers
    sparse = () if moe is None else moe_blocks(moe.layers, num_layers)
    blocks = base.blocks(
        settings,
        [(settings.hidden_dim, settings.mlp_dim)] * num_layers,
        sparse,
        NUM_SELECTED_EXPERTS,
        settings.ensemble_size,
        dropout=settings.dropout,
    )
    for i, (mlp, branches) in enumerate(blocks):
        if settings.ensemble_size is not None and i == sparse[0]:
            x = ensemble.RepeatImages(
                settings.ensemble_size, dtype=settings.dtype, name="repeat"
            )(x)
        attention = SelfAttention(
            settings.num_heads,
            settings.qk_norm,
            dtype=settings.dtype,
            name=f"block_{i}_attention",
        )
        x = _blocks.encoder_block(
            x, attention, mlp, f"block_{i}", settings.dropout, **branches
        )
    return LayerNormalization(dtype=settings.dtype, name="norm")(x)


def _pooling(settings):
    """The layer from tokens `(B, N, D)` to features `(B, D)`."""
    options = {"dtype": settings.dtype, "name": "pooling"}
    if settings.pooling == "token":
        return poolings.TokenPooling(**options)
    if settings.pooling == "gap":
        return keras.layers.GlobalAveragePooling1D(**options)
    return poolings.AttentionPooling(
        settings.num_heads, settings.mlp_dim, settings.activation, **options
    )


def _head(x, settings):
    """From the features of an image to its logits."""
    if settings.representation_size is not None:
        x = keras.layers.Dense(
            settings.representation_size,
            activation="tanh",
            kernel_initializer="lecun_normal",
            dtype=settings.dtype,
            name="pre_logits",
        )(x)
    size = settings.ensemble_size
    if size is None:
        return base.classifier(x, settings, "zeros")
    x = ensemble.JoinMembers(size, dtype=settings.dtype, name="members")(x)
    if settings.num_classes is None:
        return keras.layers.Flatten(dtype=settings.dtype, name="features")(x)
    x = base.classifier(x, settings, "zeros")
    return ensemble.MeanProbability(dtype="float32", name="mean")(x)
