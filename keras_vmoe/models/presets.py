"""The models of both papers, as one table of numbers with their sources."""

import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import Any

from keras_vmoe.models.base import MoEModel
from keras_vmoe.models.convnext import ConvNeXtMoE
from keras_vmoe.models.preset_sizes import CONVNEXT_SIZES
from keras_vmoe.models.preset_sizes import SOFT_MOE_SIZES
from keras_vmoe.models.preset_sizes import SWEET_SPOT_MODELS
from keras_vmoe.models.preset_sizes import SWIN_EXPERTS
from keras_vmoe.models.preset_sizes import SWIN_SIZES
from keras_vmoe.models.preset_sizes import SWIN_WINDOWS
from keras_vmoe.models.preset_sizes import V_MOE_SIZES
from keras_vmoe.models.preset_sizes import VIT_SIZES
from keras_vmoe.models.swin import SwinMoE
from keras_vmoe.models.vit import ViTMoE

V_MOE = "Riquelme et al., 2021, arXiv:2106.05974, table of model sizes"
VIT = "Touvron et al., 2022 (DeiT III), arXiv:2204.07118, table 1"
CONVNEXT = "Liu et al., 2022, arXiv:2201.03545, table 1 and section 3.3"
SWEET_SPOT = "Videau et al., 2024, arXiv:2411.18322"
SWIN_MOE = "Hwang et al., 2022 (Tutel), arXiv:2206.03382, section 5.3"
SOFT_MOE = "Puigcerver et al., 2023, arXiv:2308.00951, table of model sizes"

IMAGENET_21K = 21_843  # Classes of the released V-MoE models.
JFT = 18_291  # Classes of the models that the V-MoE paper counts.
JFT_4B = 29_593  # Of its largest model, and of Soft MoE's.
IMAGENET_1K = 1_000
SWIN_CLASSES = 21_841  # Of the released Swin-MoE models.


@dataclasses.dataclass(frozen=True)
class Preset:
    """A row of the table.

    Attributes:
        name: As users write it.
        model: The class.
        arguments: Its arguments, without `num_classes` and `moe`.
        source: Where the sizes are printed.
        paper_params: Millions of parameters, as printed; None if they are not.
        paper_gflops: Giga multiply-adds per image, as printed.
        paper_active: Millions of active parameters, as printed.
        paper_images: Images per second, as printed (training, on its hardware).
        paper_accuracy: ImageNet-1k accuracy in percent, as printed; with a
            star after pretraining on ImageNet-21k; V-MoE's after JFT.
        paper_classes: Classes of the model that the paper counts.
        num_classes: Default number of classes.
        moe: Its `moe` argument.
        note: Where the printed figures contradict the sizes, or each other.
    """

    name: str
    model: type
    arguments: dict
    source: str
    paper_params: str | None = None
    paper_gflops: str | None = None
    paper_active: str | None = None
    paper_images: str | None = None
    paper_accuracy: str | None = None
    paper_classes: int = IMAGENET_1K
    num_classes: int = IMAGENET_1K
    moe: dict | None = None
    note: str | None = None

    @property
    def placement(self):
        """Where the experts are, in words."""
        layers = self.moe["layers"]
        if isinstance(layers, str):
            return layers
        together = layers == list(range(layers[0], layers[-1] + 1))
        return f"{'the last ' if together else ''}{len(layers)} blocks"

    @property
    def description(self):
        """A one-line description."""
        if self.moe is None:
            return f"{self.model.__name__} without MoE: {self.source}"
        return (
            f"{self.model.__name__}, {self.moe['num_experts']} experts in "
            f"{self.placement}: {self.source}"
        )


def _v_moe():
    for name, (*sizes, dense, last, every) in V_MOE_SIZES.items():
        # The paper counts an extra layer; the released models have none.
        extra = {"representation_size": sizes[0]}
        twin = Preset(
            name, ViTMoE, _vit(sizes, **extra), V_MOE, dense,
            num_classes=IMAGENET_21K, paper_classes=JFT,
        )  # fmt: skip
        placement, params = last
        yield twin
        yield _sparse(twin, 8, placement)
        yield _sparse(twin, 8, "every_2")
        yield _sparse(twin, 32, placement, None, params)
        yield _sparse(twin, 32, "every_2", None, every)


def _largest():
    """V-MoE-15B, whose dense twin has no name, and Soft MoE."""
    sizes = (1408, 48, 16, 6400, 14)
    twin = Preset(
        "vmoe_15b", ViTMoE, _vit(sizes), V_MOE, num_classes=IMAGENET_21K,
        paper_classes=JFT_4B,
    )  # fmt: skip
    row = _sparse(twin, 32, "every_2", None, "14705.07")
    yield dataclasses.replace(row, paper_accuracy="90.35")
    for name, (*sizes, experts, params) in SOFT_MOE_SIZES.items():
        num_layers = sizes[1]
        yield Preset(
            f"{name}_e{experts}",
            ViTMoE,
            _vit(sizes, pooling="gap", qk_norm=True),
            SOFT_MOE,
            params,
            paper_classes=JFT_4B,
            moe={
                "layers": list(range(num_layers // 2, num_layers)),
                "num_experts": experts,
                "router": "soft",
                "num_slots": 1,
            },
        )


def _sweet_spot():
    dense = {}
    for name, (*sizes, params, gflops, images, accuracy) in VIT_SIZES.items():
        arguments = _vit(sizes, layer_scale_init_value=1e-4, activation="gelu")
        dense[name] = Preset(
            name, ViTMoE, arguments, VIT, params, gflops, None, images, accuracy
        )
    for name, row in CONVNEXT_SIZES.items():
        depths, dims, isotropic, params, gflops, images, accuracy, *note = row
        arguments = {
            "depths": depths,
            "dims": dims,
            "isotropic": isotropic,
            "layer_scale_init_value": None if isotropic else 1e-6,
        }
        dense[name] = Preset(
            name, ConvNeXtMoE, arguments, CONVNEXT, params, gflops, None,
            images, accuracy, note=note[0] if note else None,
        )  # fmt: skip
    yield from dense.values()
    for name, *row in SWEET_SPOT_MODELS:
        twin = dataclasses.replace(dense[name], source=SWEET_SPOT)
        yield _sparse(twin, *row)


def _swin():
    for name, (dim, heads, *rows) in SWIN_SIZES.items():
        for image_size, (window_size, pretrained) in SWIN_WINDOWS.items():
            dense = Preset(
                f"{name}_{image_size}",
                SwinMoE,
                {
                    "depths": (2, 2, 18, 2),
                    "dims": tuple(dim * 2**i for i in range(4)),
                    "num_heads": tuple(heads * 2**i for i in range(4)),
                    "window_size": window_size,
                    "pretrained_window_sizes": pretrained,
                    "image_size": image_size,
                },
                SWIN_MOE,
                paper_classes=SWIN_CLASSES,
                num_classes=IMAGENET_1K if pretrained else SWIN_CLASSES,
            )
            active = rows[0][1]
            for experts, params, accuracy, *note in rows:
                row = dense
                if experts is not None:
                    moe = {**SWIN_EXPERTS, "num_experts": experts}
                    row = dataclasses.replace(
                        dense, name=f"{dense.name}_e{experts}", moe=moe
                    )
                if not pretrained:  # The printed figures.
                    row = dataclasses.replace(
                        row, paper_params=params, paper_active=active,
                        paper_accuracy=accuracy, note=note[0] if note else None,
                    )  # fmt: skip
                yield row


def _vit(sizes, **more):
    names = ("hidden_dim", "num_layers", "num_heads", "mlp_dim", "patch_size")
    return {"image_size": 224, **dict(zip(names, sizes, strict=True)), **more}


def _sparse(dense, num_experts, placement, mlp_ratio=None, *printed):
    """The row of a dense model with experts, and its printed figures."""
    name = f"{dense.name}_e{num_experts}_{placement.replace('_', '')}"
    moe = {"num_experts": num_experts, "layers": placement}
    if mlp_ratio is not None:
        name, moe["mlp_ratio"] = f"{name}_r{mlp_ratio}", mlp_ratio
    found = dict.fromkeys((*PRINTED, "note"))
    found |= dict(zip(found, printed, strict=False))
    return dataclasses.replace(dense, name=name, moe=moe, **found)


PRINTED = (
    "paper_params",
    "paper_active",
    "paper_gflops",
    "paper_images",
    "paper_accuracy",
)
PRESETS = {
    preset.name: preset
    for preset in (*_v_moe(), *_largest(), *_sweet_spot(), *_swin())
}


def presets() -> dict[str, str]:
    """Returns the names of all presets.

    Returns:
        Dict from name to a one-line description with its source.

    Example:

    >>> presets()["convnext_t_e8_last2"]
    'ConvNeXtMoE, 8 experts in last_2: Videau et al., 2024, arXiv:2411.18322'
    """
    return {name: preset.description for name, preset in PRESETS.items()}


def from_preset(
    name: str, load_weights: bool = False, **overrides: Any
) -> MoEModel:
    """Makes one of the papers' models.

    Stochastic depth belongs to a training recipe and is 0 here. V-MoE's presets
    are the models that the paper counts, with an extra layer before the head.
    The released models lack it: for their weights, set
    `representation_size=None` or use `checkpoints.vmoe_config`.

    Args:
        name: One of `presets()`.
        load_weights: Must be False: weights are initialized at random. The
            package hosts none; `keras_vmoe.checkpoints` reads those that others
            released.
        **overrides: Other arguments of the model, such as `num_classes`,
            `image_size`, `drop_path_rate` or `dtype`. A dict for `moe` changes
            only the settings that it names; None removes the experts.

    Returns:
        A `ViTMoE`, `ConvNeXtMoE` or `SwinMoE`.

    Raises:
        ValueError: If the preset is unknown (the message lists the nearest
            names), or if weights are requested.
        TypeError: If an argument is unknown.

    Example:

    >>> model = from_preset("convnext_t_e4_last2_r2", image_size=32,
    ...                     num_classes=10, moe=dict(capacity_factor=2.0))
    >>> model.moe_layers[0].router.capacity_factor
    2.0
    """
    preset = find_preset(name)
    if load_weights:
        raise ValueError(
            "No weights of presets are hosted. "
            f"Received: load_weights={load_weights!r}. Load released ones into "
            "the model with `keras_vmoe.checkpoints`."
        )
    arguments = {**preset.arguments, "num_classes": preset.num_classes}
    moe = preset.moe
    if "moe" in overrides:
        changes = overrides["moe"]
        both = isinstance(changes, Mapping) and moe is not None
        moe = {**moe, **changes} if both else changes
    name = re.sub(r"\W", "_", name)
    return preset.model(**{**arguments, "name": name, **overrides, "moe": moe})


def find_preset(name):
    """The row of a preset; see `from_preset`."""
    if not isinstance(name, str) or name not in PRESETS:
        near = difflib.get_close_matches(str(name), PRESETS, n=5, cutoff=0.4)
        families = sorted({x.partition("_")[0] for x in PRESETS})
        words = f"Names start with {', '.join(families)}."
        if near:
            words = f"The nearest names: {', '.join(near)}."
        raise ValueError(
            "The preset must be one of `models.presets()`. "
            f"Received: name={name!r}. {words}"
        )
    return PRESETS[name]
