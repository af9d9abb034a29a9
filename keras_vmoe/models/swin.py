"""SwinMoE: the Swin transformer with sparse MoE layers."""

import itertools
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import Unpack

import keras

from keras_vmoe._checks import check_positive
from keras_vmoe._checks import check_sizes
from keras_vmoe._checks import is_integer
from keras_vmoe.layers import _blocks
from keras_vmoe.layers.normalization import LayerNormalization
from keras_vmoe.layers.patches import patch_conv
from keras_vmoe.layers.patches import patch_grid
from keras_vmoe.layers.weights import small_normal
from keras_vmoe.layers.windows import MergePatches
from keras_vmoe.layers.windows import WindowAttention
from keras_vmoe.models import base
from keras_vmoe.models.moe import MoEConfig
from keras_vmoe.models.placement import stage_blocks

NUM_SELECTED_EXPERTS = 1  # K of Swin-MoE.
EPSILON = 1e-5  # Of its norms.


@keras.saving.register_keras_serializable("keras_vmoe")
class SwinMoE(base.MoEModel):
    """Swin transformer whose MLPs may be mixtures of experts.

    A functional model. Its layers are named `stem`, `stem_norm`,
    `downsample_<stage>_patches`, `downsample_<stage>_norm`,
    `downsample_<stage>`, `block_<i>_attention`, `block_<i>_mlp` or
    `block_<i>_moe`, `norm`, `pooling`, `head`; blocks are counted from 0
    through all stages. A block's output is that of
    `block_<i>_mlp_add`. Experts work on the positions of the feature map.
    Logits are float32 under every dtype policy.

    Every second block of a stage shifts its windows by half their side.
    As in the authors' MoE models, blocks are pre-norm with dot-product
    attention, the position bias is a small MLP of an offset's logarithm, and
    the second layer of MLPs and experts has no bias.

    Args:
        depths: Blocks of each stage.
        dims: Features of each stage, as many as `depths`.
        num_heads: Attention heads of each stage; must divide its features.
        num_classes: Classes; None leaves the head out, and the model returns
            features `(B, D)`.
        window_size: Side of a window, in positions of the feature map. If a
            map's side is not longer, its windows have that side.
        image_size: Side of the images in pixels, or `(height, width)`. Maps
            that do not divide into whole windows are padded with zeros.
        patch_size: Side of the stem's patches.
        mlp_ratio: F / D of the dense MLPs.
        pretrained_window_sizes: Side of the windows of each stage that the
            position biases were trained with, if different.
        moe: None for the dense twin, or a dict of `models.MoEConfig`'s
            attributes, such as `layers` (`"every_2"`, `"stage"`, `"last_2"` or
            block indices; see `models.placement`), `num_experts`, `dropout`
            (of the experts). K is 1 unless set.
        drop_path_rate: Stochastic depth: probability of dropping a residual
            branch of an image in the last block. It rises linearly from 0 in
            the first block.
        layer_scale_init_value: Initial value of a layer scale; None leaves it
            out, as the authors do.
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
        images: `(B, H, W, channels)` float tensor.
        training: Whether to route with noise and add auxiliary losses.

    Returns:
        `(B, num_classes)` float32 logits.

    Raises:
        ValueError: If sizes do not fit each other, or if a name is unknown.

    Example:

    >>> model = SwinMoE(
    ...     depths=[2, 2], dims=[16, 32], num_heads=[2, 4], num_classes=10,
    ...     window_size=4, image_size=32, patch_size=2,
    ...     moe=dict(layers="last_2", num_experts=4))
    >>> model(keras.ops.ones((3, 32, 32, 3))).shape
    (3, 10)
    >>> [layer.name for layer in model.moe_layers]
    ['block_1_moe', 'block_3_moe']

    Reference:
        [Liu et al., 2021](https://arxiv.org/abs/2103.14030), section 3;
        [Hwang et al., 2022](https://arxiv.org/abs/2206.03382) (Tutel), section
        5.3, for Swin-MoE. Losses and capacity are V-MoE's: Tutel's load loss
        compares softmax scores with raw noisy logits, and its capacity is
        `K * int(factor * ceil(S / E))`.
    """

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        num_heads: Sequence[int],
        num_classes: int | None,
        window_size: int = 7,
        image_size: int | Sequence[int] = 224,
        patch_size: int = 4,
        mlp_ratio: float = 4,
        pretrained_window_sizes: Sequence[int] | None = None,
        moe: Mapping[str, Any] | MoEConfig | None = None,
        **options: Unpack[base.Options],
    ) -> None:
        settings = base.complete(
            SwinMoE,
            {
                "depths": depths,
                "dims": dims,
                "num_heads": num_heads,
                "num_classes": num_classes,
                "window_size": window_size,
                "image_size": image_size,
                "patch_size": patch_size,
                "mlp_ratio": mlp_ratio,
                "pretrained_window_sizes": pretrained_window_sizes,
                "moe": moe,
            },
            options,
            activation="gelu",
            name="swin_moe",
        )
        stages = _stages(settings)
        images = base.image_input(settings)
        x = patch_conv(
            stages[0]["features"],
            settings.patch_size,
            kernel_initializer=small_normal(),
            dtype=settings.dtype,
            name="stem",
        )(images)
        x = _norm("stem_norm", settings)(x)
        x = _norm("norm", settings)(_encoder(x, stages, settings))
        x = keras.layers.GlobalAveragePooling2D(
            data_format="channels_last", dtype=settings.dtype, name="pooling"
        )(x)
        x = base.classifier(x, settings, small_normal())
        super().__init__(images, x, vars(settings))

    def for_images(self, image_size: Any) -> dict[str, Any]:
        """Returns the arguments that change for images of another size.

        Windows may change their side; the position bias of an offset stays.
        """
        first = itertools.accumulate(self.depths[:-1], initial=0)
        layers = [self.get_layer(f"block_{i}_attention") for i in first]
        windows = self.pretrained_window_sizes or tuple(
            layer.windows.side for layer in layers
        )
        return {"image_size": image_size, "pretrained_window_sizes": windows}


def _encoder(x, stages, settings):
    """All stages, with the downsampling between them."""
    blocks = [
        (i, number, sizes)
        for number, sizes in enumerate(stages)
        for i in range(sizes["depth"])
    ]
    widths = [sizes["features"] for *_, sizes in blocks]
    moe = settings.moe
    mlps = base.blocks(
        settings,
        [(width, round(settings.mlp_ratio * width)) for width in widths],
        () if moe is None else stage_blocks(moe.layers, settings.depths),
        NUM_SELECTED_EXPERTS,
        use_output_bias=False,
    )
    for block, (mlp, branches) in enumerate(mlps):
        i, number, sizes = blocks[block]
        if number and not i:
            x = _merge(x, sizes["features"], number, settings)
        attention = WindowAttention(
            sizes["num_heads"],
            settings.window_size,
            shift=i % 2 == 1,
            pretrained_window_size=sizes["pretrained_window_size"],
            dtype=settings.dtype,
            name=f"block_{block}_attention",
        )
        x = _blocks.encoder_block(
            x, attention, mlp, f"block_{block}", epsilon=EPSILON, **branches
        )
    return x


def _merge(x, features, stage, settings):
    """Halves the height and width of a feature map, with new features."""
    name = f"downsample_{stage}"
    x = MergePatches(dtype=settings.dtype, name=f"{name}_patches")(x)
    x = _norm(f"{name}_norm", settings)(x)
    return keras.layers.Dense(
        features,
        use_bias=False,
        kernel_initializer=small_normal(),
        dtype=settings.dtype,
        name=name,
    )(x)


def _norm(name, settings):
    return LayerNormalization(EPSILON, dtype=settings.dtype, name=name)


def _stages(settings):
    """The sizes of each stage, checked."""
    pretrained = settings.pretrained_window_sizes
    given = {
        "depth": ("depths", settings.depths),
        "features": ("dims", settings.dims),
        "num_heads": ("num_heads", settings.num_heads),
    }
    if pretrained is not None:
        given["pretrained_window_size"] = (
            "pretrained_window_sizes", pretrained
        )  # fmt: skip
    lists = [sizes for _, sizes in given.values()]
    good = all(isinstance(x, (list, tuple)) and x for x in lists)
    good = good and len({len(x) for x in lists}) == 1
    if not good or not all(is_integer(y) and y > 0 for x in lists for y in x):
        names = ", ".join(f"`{name}`" for name, _ in given.values())
        received = ", ".join(f"{name}={x}" for name, x in given.values())
        raise ValueError(
            f"{names} must be equally many integers of at least 1. Received: "
            f"{received}. Swin-S has depths=(2, 2, 18, 2), "
            "dims=(96, 192, 384, 768), num_heads=(3, 6, 12, 24)."
        )
    check_positive(mlp_ratio=settings.mlp_ratio)
    check_sizes(
        patch_size=settings.patch_size, window_size=settings.window_size
    )
    patch_grid(base.image_pair(settings.image_size), settings.patch_size)
    stages = [
        dict(zip(given, sizes, strict=True))
        for sizes in zip(*lists, strict=True)
    ]
    return [{"pretrained_window_size": None, **stage} for stage in stages]
