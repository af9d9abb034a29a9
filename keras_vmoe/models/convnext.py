"""ConvNeXtMoE: ConvNeXt with the sparse MoE layers of the Sweet Spot paper."""

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
from keras_vmoe.layers.weights import small_normal
from keras_vmoe.models import base
from keras_vmoe.models.moe import MoEConfig
from keras_vmoe.models.placement import stage_blocks

NUM_SELECTED_EXPERTS = 1  # K of the Sweet Spot paper's ConvNeXt.


@keras.saving.register_keras_serializable("keras_vmoe")
class ConvNeXtMoE(base.MoEModel):
    """ConvNeXt whose MLPs may be mixtures of experts.

    A functional model. Its layers are named `stem`, `stem_norm`,
    `downsample_<stage>_norm`, `downsample_<stage>`, `block_<i>_conv`,
    `block_<i>_norm`, `block_<i>_mlp` or `block_<i>_moe`, `pooling`, `norm`,
    `head`; blocks are counted from 0 through all stages. A block's output is
    that of `block_<i>_add`. Experts work on the positions of the feature map.
    Logits are float32 under every dtype policy.

    Args:
        depths: Blocks of each stage; for an isotropic model a number or a list
            of one.
        dims: Features of each stage, as many as `depths`.
        num_classes: Classes; None leaves the head out, and the model returns
            features `(B, D)`.
        isotropic: Whether the model has one stage at 1/`patch_size` of the
            resolution, like a ViT, without a norm after the stem.
        image_size: Side of the images in pixels, or `(height, width)`. None
            takes images of any size, whose costs and exports have none.
        patch_size: Side of the stem's patches; None means 4, or 16 if
            isotropic.
        mlp_ratio: F / D of the dense MLPs.
        moe: None for the dense twin, or a dict of `models.MoEConfig`'s
            attributes, such as `layers` (`"every_2"`, `"stage"`, `"last_3"`,
            `"last_2"` or block indices; see `models.placement`),
            `num_experts`, `mlp_ratio` (of the experts). K is 1 unless set.
        drop_path_rate: Stochastic depth: probability of dropping a residual
            branch of an image in the last block. It rises linearly from 0 in
            the first block.
        layer_scale_init_value: Initial value of the layer scale; None leaves
            it out, as the authors do in isotropic models.
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

    >>> model = ConvNeXtMoE(
    ...     depths=[1, 1, 2, 1], dims=[8, 16, 24, 32], num_classes=10,
    ...     image_size=32, moe=dict(layers="last_2", num_experts=4))
    >>> model(keras.ops.ones((3, 32, 32, 3))).shape
    (3, 10)
    >>> [layer.name for layer in model.moe_layers]
    ['block_3_moe', 'block_4_moe']

    Reference:
        [Liu et al., 2022](https://arxiv.org/abs/2201.03545), section 2, 3.3
        for isotropic models;
        [Videau et al., 2024](https://arxiv.org/abs/2411.18322) for the MoE.
        Our MLPs start from Glorot's initializer, theirs from a standard
        deviation of 0.02.
    """

    def __init__(
        self,
        depths: int | Sequence[int],
        dims: int | Sequence[int],
        num_classes: int | None,
        isotropic: bool = False,
        image_size: int | Sequence[int] | None = 224,
        patch_size: int | None = None,
        mlp_ratio: float = 4,
        moe: Mapping[str, Any] | MoEConfig | None = None,
        **options: Unpack[base.Options],
    ) -> None:
        settings = base.complete(
            ConvNeXtMoE,
            {
                "depths": depths,
                "dims": dims,
                "num_classes": num_classes,
                "isotropic": isotropic,
                "image_size": image_size,
                "patch_size": patch_size,
                "mlp_ratio": mlp_ratio,
                "moe": moe,
            },
            options,
            layer_scale_init_value=1e-6,
            activation="gelu",
            name="convnext_moe",
        )
        stages = _stages(settings)
        check_positive(mlp_ratio=mlp_ratio)
        patch_size = settings.patch_size
        if patch_size is None:
            patch_size = 16 if isotropic else 4
        check_sizes(patch_size=patch_size)
        _check_image(image_size, patch_size * 2 ** (len(stages) - 1))

        images = base.image_input(settings)
        x = _convolution(stages[0][1], patch_size, "stem", settings)(images)
        if not isotropic:
            x = LayerNormalization(dtype=settings.dtype, name="stem_norm")(x)
        x = _stack(x, stages, settings)
        x = keras.layers.GlobalAveragePooling2D(
            data_format="channels_last", dtype=settings.dtype, name="pooling"
        )(x)
        x = LayerNormalization(dtype=settings.dtype, name="norm")(x)
        x = base.classifier(x, settings, small_normal())
        super().__init__(images, x, vars(settings))


def _stack(x, stages, settings):
    """All stages, with the downsampling between them."""
    depths, moe = [depth for depth, _ in stages], settings.moe
    dims = [features for depth, features in stages for _ in range(depth)]
    blocks = base.blocks(
        settings,
        [(features, round(settings.mlp_ratio * features)) for features in dims],
        () if moe is None else stage_blocks(moe.layers, depths),
        NUM_SELECTED_EXPERTS,
    )
    starts = [0, *itertools.accumulate(depths)]
    for i, (mlp, branch) in enumerate(blocks):
        if i and i in starts:
            name = f"downsample_{starts.index(i)}"
            x = LayerNormalization(dtype=settings.dtype, name=f"{name}_norm")(x)
            x = _convolution(dims[i], 2, name, settings)(x)
        x = _blocks.convnext_block(x, mlp, f"block_{i}", **branch)
    return x


def _convolution(features, patch_size, name, settings):
    """The stem, or a convolution that halves a feature map."""
    return patch_conv(
        features,
        patch_size,
        kernel_initializer=small_normal(),
        dtype=settings.dtype,
        name=name,
    )


def _stages(settings):
    """`(depth, features)` of each stage, checked."""
    depths, dims = (
        sizes if isinstance(sizes, (list, tuple)) else (sizes,)
        for sizes in (settings.depths, settings.dims)
    )
    good = [is_integer(size) and size > 0 for size in (*depths, *dims)]
    if not all(good) or not depths or len(depths) != len(dims):
        raise ValueError(
            "`depths` and `dims` must be equally many integers of at least 1. "
            f"Received: depths={depths}, dims={dims}. "
            "ConvNeXt-T has depths=(3, 3, 9, 3), dims=(96, 192, 384, 768)."
        )
    if settings.isotropic and len(depths) > 1:
        raise ValueError(
            "An isotropic model has one stage. "
            f"Received: depths={depths}. ConvNeXt-S (iso.) has depths=18."
        )
    return list(zip(depths, dims, strict=True))


def _check_image(image_size, stride):
    """Raises unless the feature map of every stage is whole."""
    if image_size is None:
        return
    if any(side % stride for side in base.image_pair(image_size)):
        raise ValueError(
            f"`image_size` must be divisible by {stride}, the stride of the "
            f"last stage. Received: image_size={image_size}."
        )
