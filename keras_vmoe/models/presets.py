"""The models of both papers, as one table of numbers with their sources."""

import dataclasses
import difflib
import re

from keras_vmoe.models.base import MoEModel
from keras_vmoe.models.convnext import ConvNeXtMoE
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
        num_classes: Classes unless set.
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
        """One line for people."""
        if self.moe is None:
            return f"{self.model.__name__} without MoE: {self.source}"
        return (
            f"{self.model.__name__}, {self.moe['num_experts']} experts in "
            f"{self.placement}: {self.source}"
        )


# Name: hidden_dim, num_layers, num_heads, mlp_dim, patch size; millions of
# parameters of the dense model, with 32 experts in `last_<n>` and in `every_2`.
V_MOE_SIZES = {
    "vmoe_s32": (512, 8, 8, 2048, 32, "36.5", ("last_2", "166.7"), "296.9"),
    "vmoe_b32": (768, 12, 12, 3072, 32, "102.1", ("last_2", "395.0"), "980.6"),
    "vmoe_b16": (768, 12, 12, 3072, 16, "100.5", ("last_2", "393.3"), "979.0"),
    "vmoe_l32": (
        1024, 24, 16, 4096, 32, "325.3", ("last_2", "845.8"), "3448.2",
    ),
    "vmoe_l16": (
        1024, 24, 16, 4096, 16, "323.1", ("last_2", "843.6"), "3446.0",
    ),
    "vmoe_h14": (
        1280, 32, 16, 5120, 14, "655.8", ("last_5", "2688.6"), "7160.8",
    ),
}  # fmt: skip
# The same sizes, and experts; millions of parameters.
SOFT_MOE_SIZES = {
    "soft_moe_s16": (384, 12, 6, 1536, 16, 128, "933.7"),
    "soft_moe_s14": (384, 12, 6, 1536, 14, 256, "1841"),
    "soft_moe_b16": (768, 12, 12, 3072, 16, 128, "3708"),
    "soft_moe_l16": (1024, 24, 16, 4096, 16, 128, "13127"),
    "soft_moe_h14": (1280, 32, 16, 5120, 14, 256, "54177"),
}
# The same sizes; millions of parameters, giga multiply-adds, images per second
# and accuracy of the Sweet Spot paper.
VIT_SIZES = {
    "vit_s16": (384, 12, 6, 1536, 16, "22", "4.6", "1083", "79.8"),
    "vit_b16": (768, 12, 12, 3072, 16, "86.6", "17.5", "329", "82.8"),
}
# Name: depths, dims, isotropic; figures as above.
DEPTHS, LARGER_DEPTHS = (3, 3, 9, 3), (3, 3, 27, 3)
DIMS, LARGER_DIMS = (96, 192, 384, 768), (128, 256, 512, 1024)
CONVNEXT_SIZES = {
    "convnext_t": (DEPTHS, DIMS, False, "28.6", "4.5", "814", "82.1"),
    "convnext_s": (LARGER_DEPTHS, DIMS, False, "50", "8.7", "466", "83.1"),
    "convnext_b": (
        LARGER_DEPTHS, LARGER_DIMS, False, "88.6", "15.4", "299", "83.8",
    ),
    "convnext_iso_s": (18, 384, True, "22.3", "4.3", "1100", "79.7"),
    "convnext_iso_b": (
        18, 768, True, "82.4", "16.9", "336", "82.0",
        "the sizes give 87.1; 82.4 is the active count of its MoE",
    ),
}  # fmt: skip
# Name: features and heads of the first stage; experts, millions of parameters
# and accuracy of table 14 of the Sweet Spot paper, after ImageNet-21k at 192
# pixels; a note.
SWIN_SIZES = {
    "swin_s": (
        96, 3, (None, "65.8", "83.5*"), (8, "173.3", "84.5*"),
        (16, "296.1", "84.9*"),
        (32, "296.1", "84.7*", "the sizes give 541.8; table 14 repeats a row"),
    ),
    "swin_b": (
        128, 4, (None, "109.3", "85.1*"), (8, "300.3", "85.3*"),
        (16, "518.7", "85.5*"), (32, "955.3", "85.5*"),
    ),
}  # fmt: skip
# Image size: side of the windows, and those of the pretraining by stage.
SWIN_WINDOWS = {192: (12, None), 224: (14, (12, 12, 12, 6))}
SWIN_EXPERTS = {
    # Every second block of the third stage, and the last of the fourth.
    "layers": [*range(5, 22, 2), 23],
    "num_selected_experts": 1,
    "capacity_factor": 1.25,
    "batch_priority": True,
    "dropout": 0.1,
}
# Dense model, experts, placement, mlp_ratio of the experts (None: that of the
# dense MLP); as printed, where it is: millions of parameters and of active
# ones, giga multiply-adds, images per second, accuracy; a note. (The totals
# leave the gates out.)
_ACTIVE = "the printed active count and GFLOPs of a ViT follow from no K"
SWEET_SPOT_MODELS = (
    ("vit_s16", 4, "last_2", None, "29.1", "25.0", None, None, "79.8", _ACTIVE),
    (
        "vit_s16", 8, "last_2", None, "38.6", "25.0", "5.3", "892", "80.5",
        f"{_ACTIVE}; table 3 swaps the GFLOPs with every_2",
    ),
    (
        "vit_s16", 8, "every_2", None, "71.7", "33.1", "6.9", "724", "80.7",
        f"{_ACTIVE}; table 3 swaps the GFLOPs with last_2",
    ),
    (
        "vit_s16", 16, "last_2", None, "57.5", "25.0", None, None, "80.2",
        _ACTIVE,
    ),
    ("vit_b16", 8, "last_2"),
    (
        "vit_b16", 8, "every_2", None, "284.9", "129.9", "26.3", "227", "82.5",
        _ACTIVE,
    ),
    ("convnext_t", 4, "last_2", 2, "34.5", "25.6", "4.2", "768", "82.1"),
    ("convnext_t", 4, "last_2"),
    (
        "convnext_t", 8, "last_2", None, "70.0", "28.7", "4.5", None, "83.5*",
        "the sizes give 69.93 and 28.60; not explained",
    ),
    ("convnext_t", 8, "last_2", 2, "46.3", "25.6", "4.2", None, "82.1"),
    (
        "convnext_t", 8, "last_3", None, "70.0", "28.6", "4.5", None, "83.5*",
        "the sizes give 78.2, which table 7 prints for stage",
    ),
    ("convnext_t", 8, "last_3", 2, "49.9", "25.0", "4.1", None, "82.1"),
    (
        "convnext_t", 8, "stage", None, "78.2", "28.6", "4.5", None, "83.5*",
        "the sizes give 72.5, those of last_3 78.2",
    ),
    ("convnext_t", 8, "stage", 2, "47.4", "25.5", "4.0", None, "82.1"),
    (
        "convnext_t", 8, "every_2", None, "97.5", "28.6", "4.5", None, "82.9*",
        "the sizes give 132.4",
    ),
    (
        "convnext_t", 8, "every_2", 2, "54.3", "17.0", "3.8", None, "81.8",
        "the sizes give 73.1 and 21.2; no placement gives the printed ones",
    ),
    ("convnext_t", 16, "last_2", None, "117.1", "28.6", "4.5", None, "83.6*"),
    (
        "convnext_t", 16, "last_2", 2, "46.3", "25.5", None, None, "81.7",
        "table 4 repeats the parameters of table 3",
    ),
    ("convnext_t", 32, "last_2", None, "211.6", "28.6", "4.5", None, "83.4*"),
    ("convnext_s", 4, "last_2", 2, "56.1", "47.3", "8.5", "442", "83.1"),
    ("convnext_s", 4, "last_2"),
    (
        "convnext_s", 8, "last_2", None, "91.6", "50.3", "8.7", None, "84.9*",
        "the sizes give 50.2 active",
    ),
    ("convnext_s", 16, "last_2"),
    ("convnext_b", 4, "last_2", 2, "99.1", "83.4", "15.0", "289", "83.5"),
    ("convnext_b", 4, "last_2"),
    ("convnext_b", 8, "last_2", None, "162.0", "88.6", "15.4", None, "85.7*"),
    ("convnext_b", 16, "last_2"),
    (
        "convnext_iso_s", 8, "last_2", None, "38.9", "22.3", "4.3", "1031",
        "80.3",
    ),
    (
        "convnext_iso_s", 8, "every_2", None, "96.7", "22.3", "8.7", None,
        "79.6", "the GFLOPs of table 3 are another model's",
    ),
    (
        "convnext_iso_b", 8, "last_2", 2, "115.4", "82.4", "16.9", "303",
        "81.6", "the GFLOPs are the dense model's; the sizes give 16.0",
    ),
    ("convnext_iso_b", 8, "last_2"),
    ("convnext_iso_b", 8, "every_2"),
)  # fmt: skip


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
                if not pretrained:  # What is printed.
                    row = dataclasses.replace(
                        row, paper_params=params, paper_active=active,
                        paper_accuracy=accuracy, note=note[0] if note else None,
                    )  # fmt: skip
                yield row


def _vit(sizes, **more):
    names = ("hidden_dim", "num_layers", "num_heads", "mlp_dim", "patch_size")
    return {"image_size": 224, **dict(zip(names, sizes, strict=True)), **more}


def _sparse(dense, num_experts, placement, mlp_ratio=None, *printed):
    """The row of a dense model with experts, and what is printed of it."""
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


def presets():
    """The names of all presets.

    Returns:
        Dict from name to a line that describes it and names its source.

    Example:

    >>> presets()["convnext_t_e8_last2"]
    'ConvNeXtMoE, 8 experts in last_2: Videau et al., 2024, arXiv:2411.18322'
    """
    return {name: preset.description for name, preset in PRESETS.items()}


def from_preset(name, load_weights=False, **overrides) -> MoEModel:
    """Makes a model of the papers.

    Stochastic depth belongs to a recipe and is 0 here. V-MoE's presets are the
    models that the paper counts, with an extra layer before the head; the
    released ones have none: set `representation_size=None` for their weights,
    or take `checkpoints.vmoe_config`.

    Args:
        name: One of `presets()`.
        load_weights: Must be False: weights are initialized at random. The
            package hosts none; those that others released are read by
            `keras_vmoe.checkpoints`.
        **overrides: Other arguments of the model, such as `num_classes`,
            `image_size`, `drop_path_rate` or `dtype`. A dict for `moe` changes
            only the settings that it names; None takes the experts out.

    Returns:
        A `ViTMoE`, `ConvNeXtMoE` or `SwinMoE`.

    Raises:
        ValueError: If the preset is unknown; the message lists the nearest
            names. If weights are asked for.
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
        both = isinstance(changes, dict) and moe is not None
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
