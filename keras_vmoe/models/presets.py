"""The models of both papers, as one table of numbers with their sources."""

import dataclasses
import difflib
import re

from keras_vmoe.models.base import MoEModel
from keras_vmoe.models.convnext import ConvNeXtMoE
from keras_vmoe.models.vit import ViTMoE

V_MOE = "Riquelme et al., 2021, arXiv:2106.05974, table of model sizes"
VIT = "Touvron et al., 2022 (DeiT III), arXiv:2204.07118, table 1"
CONVNEXT = "Liu et al., 2022, arXiv:2201.03545, table 1 and section 3.3"
SWEET_SPOT = "Videau et al., 2024, arXiv:2411.18322"

IMAGENET_21K = 21_843  # Classes of the released V-MoE models.
JFT = 18_291  # Classes of the models that the V-MoE paper counts.
IMAGENET_1K = 1_000


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
        paper_classes: Classes of the model that the paper counts.
        num_classes: Classes unless set.
        moe: Its `moe` argument.
    """

    name: str
    model: type
    arguments: dict
    source: str
    paper_params: str | None = None
    paper_gflops: str | None = None
    paper_active: str | None = None
    paper_classes: int = IMAGENET_1K
    num_classes: int = IMAGENET_1K
    moe: dict | None = None

    @property
    def description(self):
        """One line for people."""
        if self.moe is None:
            return f"{self.model.__name__} without MoE: {self.source}"
        return (
            f"{self.model.__name__}, {self.moe['num_experts']} experts in "
            f"{self.moe['layers']}: {self.source}"
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
# The same sizes; millions of parameters, giga multiply-adds.
VIT_SIZES = {
    "vit_s16": (384, 12, 6, 1536, 16, "22", "4.6"),
    "vit_b16": (768, 12, 12, 3072, 16, "86.6", "17.5"),
}
# Name: depths, dims, isotropic; millions of parameters, giga multiply-adds.
CONVNEXT_SIZES = {
    "convnext_t": ((3, 3, 9, 3), (96, 192, 384, 768), False, "29", "4.5"),
    "convnext_s": ((3, 3, 27, 3), (96, 192, 384, 768), False, "50", "8.7"),
    "convnext_b": ((3, 3, 27, 3), (128, 256, 512, 1024), False, "89", "15.4"),
    "convnext_iso_s": (18, 384, True, "22", "4.3"),
    "convnext_iso_b": (18, 768, True, "87", "16.9"),
}
# Dense model, experts, placement, mlp_ratio of the experts (None: that of the
# dense MLP); millions of parameters and of active ones, where printed.
SWEET_SPOT_MODELS = (
    ("vit_s16", 8, "last_2"),
    ("vit_s16", 8, "every_2", None, "71.7"),
    ("vit_b16", 8, "last_2"),
    ("vit_b16", 8, "every_2", None, "284.9"),
    ("convnext_t", 4, "last_2", 2, "34.5", "25.6"),
    ("convnext_t", 4, "last_2"),
    ("convnext_t", 8, "last_2", None, "70.0"),
    ("convnext_t", 8, "last_2", 2),
    ("convnext_t", 8, "last_3"),
    ("convnext_t", 8, "stage"),
    ("convnext_t", 8, "every_2"),
    ("convnext_t", 16, "last_2"),
    ("convnext_s", 4, "last_2"),
    ("convnext_s", 8, "last_2"),
    ("convnext_s", 16, "last_2"),
    ("convnext_b", 4, "last_2"),
    ("convnext_b", 8, "last_2", None, "162.0"),
    ("convnext_b", 16, "last_2"),
    ("convnext_iso_s", 8, "last_2", None, "38.9"),
    ("convnext_iso_s", 8, "every_2"),
    ("convnext_iso_b", 8, "last_2"),
    ("convnext_iso_b", 8, "every_2"),
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


def _sweet_spot():
    dense = {}
    for name, (*sizes, params, gflops) in VIT_SIZES.items():
        arguments = _vit(sizes, layer_scale_init_value=1e-4, activation="gelu")
        dense[name] = Preset(name, ViTMoE, arguments, VIT, params, gflops)
    for name, row in CONVNEXT_SIZES.items():
        depths, dims, isotropic, params, gflops = row
        arguments = {
            "depths": depths,
            "dims": dims,
            "isotropic": isotropic,
            "layer_scale_init_value": None if isotropic else 1e-6,
        }
        dense[name] = Preset(
            name, ConvNeXtMoE, arguments, CONVNEXT, params, gflops
        )
    yield from dense.values()
    for name, *row in SWEET_SPOT_MODELS:
        twin = dataclasses.replace(dense[name], source=SWEET_SPOT)
        yield _sparse(twin, *row)


def _vit(sizes, **more):
    names = ("hidden_dim", "num_layers", "num_heads", "mlp_dim", "patch_size")
    return {"image_size": 224, **dict(zip(names, sizes, strict=True)), **more}


def _sparse(
    dense, num_experts, placement, mlp_ratio=None, params=None, active=None
):
    """The row of a dense model with experts."""
    name = f"{dense.name}_e{num_experts}_{placement.replace('_', '')}"
    moe = {"num_experts": num_experts, "layers": placement}
    if mlp_ratio is not None:
        name, moe["mlp_ratio"] = f"{name}_r{mlp_ratio}", mlp_ratio
    return dataclasses.replace(
        dense,
        name=name,
        moe=moe,
        paper_params=params,
        paper_active=active,
        paper_gflops=None,
    )


PRESETS = {preset.name: preset for preset in (*_v_moe(), *_sweet_spot())}


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
        A `ViTMoE` or `ConvNeXtMoE`.

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
