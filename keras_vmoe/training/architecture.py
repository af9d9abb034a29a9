"""The architecture of a run: settings that override a preset or a file."""

import dataclasses
import pathlib

from keras_vmoe import checkpoints
from keras_vmoe import models
from keras_vmoe.checkpoints.architecture import FAMILIES
from keras_vmoe.data import Preprocessing
from keras_vmoe.models.base import MoEModel
from keras_vmoe.models.placement import moe_blocks
from keras_vmoe.models.placement import stage_blocks
from keras_vmoe.models.presets import find_preset
from keras_vmoe.training import recipes
from keras_vmoe.training.sizes import SIZES
from keras_vmoe.training.sizes import ConvNeXtConfig
from keras_vmoe.training.sizes import MoESettings
from keras_vmoe.training.sizes import SwinConfig
from keras_vmoe.training.sizes import family_of
from keras_vmoe.training.sizes import given
from keras_vmoe.training.typed import merge

CONFIG, MODEL = "config.yaml", "model.keras"  # In a run folder.
# Settings that the experts' weights depend on, besides the placement.
EXPERTS = (
    "num_experts", "router", "gate", "hidden_dim", "mlp_ratio",
    "shared_hidden_dim",
)  # fmt: skip


def resolved(config):
    """Returns a `TrainConfig` with every size of its model.

    Settings that are not set, preprocessing included, come from the file to
    start from (`init`), else the preset, else the defaults.

    Args:
        config: A `TrainConfig`.

    Returns:
        A `TrainConfig` that this function would return unchanged.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If settings contradict the file.
    """
    settings, start, family = config.model, None, config.family
    below = _preset(settings.preset)
    if settings.init is not None:
        start = _architecture_of(settings.init)
        family, below = _family_of(start), merge(start, below)
    elif settings.preset is None:
        below = {**SIZES[family], "moe": {}}
    found = merge(below, _set_by(config))
    if settings.upcycle and found["moe"] is None:
        found["moe"] = {}
    if found["moe"] is not None:
        found["moe"] = given(models.MoEConfig.from_dict(found["moe"]))
    if family == "convnext" and found["patch_size"] is None:
        found["patch_size"] = _patch_size(found)
    if start is not None:
        others = found.keys() & {x for names in SIZES.values() for x in names}
        _check_same(settings, start, found, others - {"dropout"})
    wanted = (start or {}).get("preprocessing")
    wanted = Preprocessing.of(wanted, **config.data.preprocessing)
    sizes = {name: found[name] for name in SIZES[family]}
    size = settings.image_size or found.get("image_size", config.image_size)
    model = {"image_size": size, **(sizes if family == "vit" else {})}
    moe = found["moe"]
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, **dataclasses.asdict(wanted)),
        model=dataclasses.replace(settings, **model),
        convnext=ConvNeXtConfig(**sizes) if family == "convnext" else None,
        swin=SwinConfig(**sizes) if family == "swin" else None,
        moe=None if moe is None else MoESettings(**moe),
    )


def _family_of(sizes):
    """The family of a model, according to the names of its sizes."""
    if "num_layers" in sizes:
        return "vit"
    return "swin" if "window_size" in sizes else "convnext"


def _patch_size(sizes):
    """The patch size of a ConvNeXt that sets none, as in `ConvNeXtMoE`."""
    return 16 if sizes["isotropic"] else 4


def from_scratch(config):
    """Returns a resolved configuration without the file to start from."""
    settings = dataclasses.replace(config.model, init=None, upcycle=False)
    return dataclasses.replace(config, model=settings)


def check_init(config):
    """Raises if a run must fine-tune a model but names none."""
    if config.model.needs_init and config.model.init is None:
        raise ValueError(
            "A recipe for fine-tuning needs a model to start from. Received: "
            "init=None with needs_init=True. Set init, such as --init "
            "CHECKPOINT, or train from scratch with --needs_init false."
        )


def _check_start(path):
    """Raises unless the weights to start from exist."""
    path = pathlib.Path(path)
    if not path.exists() and not list(path.parent.glob(f"{path.name}.*")):
        raise FileNotFoundError(
            "The weights to start from must exist: a .keras file, a run "
            f"folder, or a checkpoint. Received: init={str(path)!r}."
        )


def _set_by(config):
    """The sizes that a configuration sets."""
    found = given(config.part) if config.part is not None else {}
    found = {x: found[x] for x in SIZES[config.family] if x in found}
    if config.moe is None:
        return {**found, "moe": None}
    moe = given(config.moe)
    return {**found, "moe": moe} if moe else found


def _preset(name):
    """The sizes of a preset."""
    if name is None:
        return {}
    preset = find_preset(name)
    family = family_of(preset.model)
    own = {"vit": {"pooling": "token"}, "convnext": {"patch_size": None},
           "swin": {"patch_size": 4}}  # fmt: skip
    below = {**SIZES[family], **own[family]}
    return {**below, **preset.arguments, "moe": preset.moe}


def _architecture_of(path):
    """The sizes of the model of a `.keras` file, a run or a checkpoint."""
    _check_start(path)
    path = pathlib.Path(path)
    if (path / CONFIG).exists():
        config = resolved(from_scratch(recipes.load(path / CONFIG)))
        size = {"image_size": config.image_size, "moe": None}
        size["preprocessing"] = config.data.preprocessing
        return {**SIZES[config.family], **size, **_set_by(config)}
    if (path / MODEL).exists():
        path = path / MODEL
    if path.suffix != ".keras":
        arrays = checkpoints.read(path)
        family = getattr(arrays, "family", "vit")
        _, config_of, _ = FAMILIES[family]
        known = {**SIZES[family], "moe": None, **config_of(arrays)}
        wanted = getattr(arrays, "preprocessing", {})
        if "channels" in known:  # The mean is for three.
            wanted = {"channels": known["channels"]}
        return {**known, "preprocessing": wanted}
    model = models.load(path, compile=False)
    if not isinstance(model, MoEModel):
        raise ValueError(
            "The file to start from must hold a ViTMoE, a ConvNeXtMoE or a "
            "SwinMoE. "
            f"Received: init={str(path)!r}, a {type(model).__name__}."
        )
    sizes = model.get_config()
    if sizes["patch_size"] is None:
        sizes["patch_size"] = _patch_size(sizes)
    if sizes["moe"] is not None:
        moe = {k: x for k, x in sizes["moe"].items() if x is not None}
        sizes["moe"] = moe
    if sizes["image_size"] == model.input_shape[1:3]:  # A pair.
        sizes["image_size"] = sizes["image_size"][0]
    return sizes


def _check_same(settings, start, found, names):
    """Raises if the settings differ from the file's model."""
    wrong = [
        f"{name}={found.get(name)!r} for {start.get(name)!r}"
        for name in sorted(names)
        if _plain(found.get(name)) != _plain(start.get(name))
    ]
    theirs, ours = _experts(start), _experts(found)
    if settings.upcycle and theirs == ours:
        raise ValueError(
            "Upcycling must make experts. Received: upcycle=True with "
            f"init={settings.init!r}, which has these {ours['num_experts']} "
            "experts. Set more of them, such as --moe.num_experts "
            f"{2 * ours['num_experts']}, or leave `upcycle` out."
        )
    if not settings.upcycle:
        # If either model is dense, one line is enough.
        names = {**theirs, **ours} if theirs and ours else ["num_experts"]
        wrong += [
            f"moe.{name}={ours.get(name)!r} for {theirs.get(name)!r}"
            for name in names
            if ours.get(name) != theirs.get(name)
        ]
    if wrong:
        mend, more = "Leave them out.", "moe.num_experts="
        if ours and all(x.startswith(more) for x in wrong):
            mend = "Leave them out, or let --upcycle make experts of its MLPs."
        raise ValueError(
            "The architecture must match the file to start from. Received: "
            f"init={settings.init!r} with other settings, {', '.join(wrong)}. "
            f"{mend}"
        )


def _experts(sizes):
    """Settings that experts' weights depend on, with placement as blocks."""
    if sizes["moe"] is None:
        return {}
    moe = models.MoEConfig.from_dict(sizes["moe"])
    if "depths" in sizes:
        blocks = stage_blocks(moe.layers, sizes["depths"])
    else:
        blocks = moe_blocks(moe.layers, sizes["num_layers"])
    shape = {name: getattr(moe, name) for name in EXPERTS}
    return {**shape, "layers": blocks}


def _plain(value):
    return list(value) if isinstance(value, (list, tuple)) else value
