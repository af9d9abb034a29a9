"""Weights of Swin-MoE (microsoft/Swin-Transformer), one file for each GPU.

The experts of a run on W GPUs are in `NAME.pth.rank0` to `.rank<W - 1>`, all
that the GPUs share in `NAME.pth.master`; a dense or gathered model is in
`NAME.pth.rank0` or `NAME.pth.global` alone. Files are PyTorch pickles, opened
with `weights_only`: no code in them runs.
"""

import os
import pathlib
import pickle
import re
from collections.abc import Mapping

import numpy as np

from keras_vmoe._checks import counted
from keras_vmoe._extras import require
from keras_vmoe._preprocessing import Preprocessing
from keras_vmoe.checkpoints._torch import CONV
from keras_vmoe.checkpoints._torch import DENSE
from keras_vmoe.checkpoints._torch import NORM
from keras_vmoe.checkpoints._torch import weight_or_bias
from keras_vmoe.checkpoints.assignment import assign
from keras_vmoe.checkpoints.assignment import check_model
from keras_vmoe.checkpoints.assignment import fit_head
from keras_vmoe.checkpoints.assignment import known_to
from keras_vmoe.checkpoints.files import CheckpointError
from keras_vmoe.models.swin import SwinMoE

PART = r"\.(rank\d+|master|global)"  # Ends of file names.
# Like the tables of `_torch`.
BLOCK = r"layers\.(\d)\.blocks\.(\d+)"
NAMES = (
    (r"patch_embed\.proj", "stem", CONV),
    (r"patch_embed\.norm", "stem_norm", NORM),
    (rf"{BLOCK}\.norm1", "block_{}_attention_norm", NORM),
    (rf"{BLOCK}\.norm2", "block_{}_mlp_norm", NORM),
    (rf"{BLOCK}\.attn\.qkv", "block_{}_attention/query_key_value", DENSE),
    (rf"{BLOCK}\.attn\.proj", "block_{}_attention/output", DENSE),
    (rf"{BLOCK}\.attn\.cpb_mlp\.0", "block_{}_attention/bias_hidden", DENSE),
    (rf"{BLOCK}\.attn\.cpb_mlp\.2", "block_{}_attention/bias_output", DENSE),
    (rf"{BLOCK}\.mlp\.fc1", "block_{}_mlp/hidden", DENSE),
    (rf"{BLOCK}\.mlp\.fc2", "block_{}_mlp/output", DENSE),
    (rf"{BLOCK}\.mlp\._moe_layer\.gates\.0\.wg", "block_{}_moe/gate", DENSE),
    (r"layers\.(\d)\.downsample\.reduction", "downsample_{}", DENSE),
    (r"layers\.(\d)\.downsample\.norm", "downsample_{}_norm", NORM),
    (r"norm", "norm", NORM),
    (r"head", "head", DENSE),
)
EXPERTS = "mlp._moe_layer.experts.batched_"
TABLE = r"layers\.(\d)\.blocks\.0\.attn\.relative_coords_table"
ESCAPES = r"\x1b\[[\d;]*m"  # Bold letters in PyTorch's messages.
# Buffers that the authors' program makes anew, and Tutel's count of experts.
UNUSED = (
    "relative_coords_table", "relative_position_index", "attn_mask",
    "_num_global_experts",
)  # fmt: skip


class SwinArrays(dict):
    """Arrays by our names, and facts about their model.

    Attributes:
        window_sizes: Side of the windows by stage, where a file gives it.
        preprocessing: Dict of the known attributes of a `Preprocessing`.
    """

    family = "swin"

    def __init__(
        self, arrays: Mapping[str, np.ndarray], window_sizes: dict[int, int]
    ) -> None:
        super().__init__(arrays)
        self.window_sizes = window_sizes
        imagenet = vars(Preprocessing.imagenet())
        self.preprocessing = {k: imagenet[k] for k in ("mean", "std")}


def is_swin(path):
    """Whether a path is one of such files, or their common start."""
    path = pathlib.Path(path)
    named = re.search(rf"{PART}$", path.name)
    return bool((named or not path.exists()) and _files_of(path))


def _files_of(path):
    """The files of one training, by what their names end with."""
    start = re.sub(rf"{PART}$", "", path.name)
    found = {}
    for file in path.parent.glob("*"):
        match = re.fullmatch(re.escape(start) + PART, file.name)
        if match:
            found[match[1]] = file
    return found


def read_swin(path: str | os.PathLike[str]) -> SwinArrays:
    """Reads the files of a Swin-MoE, one for each GPU that it was trained on.

    Args:
        path: `NAME.pth`, the common start of all file names, or the path of
            one file.

    Returns:
        `SwinArrays`, a dict from our names to numpy arrays.

    Raises:
        FileNotFoundError: If no file exists.
        CheckpointError: If a file is missing, corrupt, of another number of
            GPUs or holds more than arrays, or if the arrays are not those of a
            Swin-MoE with a linear router.
        ImportError: If PyTorch is missing.

    Example:

    >>> arrays = read_swin("swin_moe_small_8expert.pth")  # doctest: +SKIP

    Reference:
        https://github.com/microsoft/Swin-Transformer, `utils_moe.py` and
        `models/swin_transformer_moe.py`.
    """
    path = pathlib.Path(path)
    files = _files_of(path)
    if not files:
        raise FileNotFoundError(
            "The files of a Swin-MoE are NAME.pth.rank0, NAME.pth.rank1 and so "
            f"on, and NAME.pth.master. Received: {path}, of which there is "
            "none."
        )
    ranks = {
        int(name[4:]): _read(file)
        for name, file in files.items()
        if name.startswith("rank")
    }
    shared = next((x for x in ("global", "master") if x in files), None)
    state = _read(files[shared]) if shared else ranks[min(ranks)]
    if all(EXPERTS in name for name in state):
        raise CheckpointError(
            "One file must hold the arrays that all GPUs share: gates, "
            f"attention, norms. Received: {counted(len(files), 'file')} of "
            f"{path}, without .master. Copy or download it."
        )
    if not ranks:  # A model that was gathered.
        ranks, files = {0: state}, {"rank0": files[shared]}
    ranks = {  # Not shared arrays, which each may hold.
        rank: {name: x for name, x in arrays.items() if EXPERTS in name}
        for rank, arrays in ranks.items()
    }
    starts = _starts([*state, *(name for x in ranks.values() for name in x)])
    found: dict[str, np.ndarray] = {}
    for name, x in state.items():
        if EXPERTS not in name and not name.endswith(UNUSED):
            found |= _renamed(name, x, starts, path)
    # Hidden features of an MLP by its features: all have the same ratio.
    dense = found.get("block_0_mlp/hidden/kernel", np.empty((1, 4))).shape
    for name, start in _moe_blocks(state, starts).items():
        gate = found[f"{name}_moe/gate/kernel"]
        whole = gate.shape[0] * dense[1] // dense[0]
        found |= _experts(name, start, gate, whole, ranks, files)
    if re.search(rf"{PART}$", path.name) and not path.is_file():
        raise FileNotFoundError(
            f"There is no {path.name}, and no GPU for it. Received: {path}, "
            f"beside {counted(len(files), 'file')}. Name one of "
            f"{sorted(x.name for x in files.values())}."
        )
    tables = ((re.fullmatch(TABLE, name), x) for name, x in state.items())
    window_sizes = {int(m[1]): (x.shape[1] + 1) // 2 for m, x in tables if m}
    return SwinArrays(found, window_sizes)


def _read(file):
    """The state of one file, as numpy arrays."""
    torch = require("torch", "torch")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (
        *(pickle.UnpicklingError, RuntimeError, EOFError, OSError),
        *(ValueError, LookupError, AttributeError),
    ) as error:
        reason = re.sub(ESCAPES, "", str(error)).partition(". ")[0]
        raise CheckpointError(
            "A file of a Swin-MoE must be whole and hold nothing but arrays: "
            "no code in it is run. Received: "
            f"{file} ({reason.splitlines()[0][:200]})."
        ) from error
    state = content.get("model", content) if isinstance(content, dict) else {}
    arrays = {
        name: x.float().numpy() if x.is_floating_point() else x.numpy()
        for name, x in state.items()
        if isinstance(x, torch.Tensor)
    }
    if not arrays:
        raise CheckpointError(
            "A file of a Swin-MoE must hold a `model` with arrays. "
            f"Received: {file}, which holds none."
        )
    return arrays


def _starts(names):
    """The number of the first block of each stage."""
    found = (re.match(BLOCK, name) for name in names)
    blocks = sorted({(int(m[1]), int(m[2])) for m in found if m})
    first = {}
    for number, (stage, _) in enumerate(blocks):
        first.setdefault(stage, number)
    return first


def _moe_blocks(state, starts):
    """Our names of the blocks with experts, and the start of their names."""
    found = (
        re.match(rf"{BLOCK}\.mlp\._moe_layer\.gates", name) for name in state
    )
    return {
        f"block_{starts[int(m[1])] + int(m[2])}": (
            f"layers.{m[1]}.blocks.{m[2]}.{EXPERTS}"
        )
        for m in found
        if m
    }


def _renamed(name, x, starts, path):
    """One of the authors' arrays as a dict of ours."""
    # Theirs ends a stage, ours starts the next.
    theirs = re.sub(
        r"^layers\.(\d)\.downsample",
        lambda m: f"layers.{int(m[1]) + 1}.downsample",
        name,
    )
    for pattern, ours, axes in NAMES:
        match = re.fullmatch(rf"{pattern}\.(weight|bias)", theirs)
        if match:
            return weight_or_bias(match, ours, axes, x, starts)
    more = ""
    if "cosine" in name or "sim_matrix" in name:
        more = " Its router is a cosine one, whose projection has a bias here."
    raise CheckpointError(
        "The arrays must be those of a Swin-MoE with a linear router. "
        f"Received: {path}, with {name} {x.shape}.{more}"
    )


def _experts(block, start, gate, whole, ranks, files):
    """The experts of a block, from the files of all GPUs."""
    features, num_experts = gate.shape
    shapes = {
        rank: arrays[f"{start}fc1_w"].shape
        for rank, arrays in sorted(ranks.items())
        if f"{start}fc1_w" in arrays
    }
    if not shapes:
        raise CheckpointError(
            f"The experts of {block} must be in the files of the GPUs. "
            f"Received: {sorted(x.name for x in files.values())}, without "
            "them. Take the files NAME.pth.rank0 and so on, too."
        )
    local, hidden, _ = next(iter(shapes.values()))
    others = [r for r, x in shapes.items() if x != (local, hidden, features)]
    if others:
        raise CheckpointError(
            "All GPUs must have equally many experts. Received: "
            f"{files[f'rank{others[0]}'].name} with {shapes[others[0]]} after "
            f"{(local, hidden, features)}, of a training on another number of "
            "GPUs. Keep the files of one training in a folder."
        )
    # GPUs that share an expert.
    slices = whole // hidden if local == 1 and whole % hidden == 0 else 1
    world = num_experts * slices // local
    _check_ranks(ranks, world, num_experts, local, slices, files)
    _check_arrays(start, (local, hidden, features), ranks, files)

    def joined(name):
        """`(E, hidden, ...)` of arrays `(local, hidden / slices, ...)`."""
        parts = [ranks[r][f"{start}{name}"] for r in range(world)]
        parts = [
            np.concatenate(parts[i : i + slices], axis=1)
            for i in range(0, world, slices)
        ]
        return np.concatenate(parts)

    bias = f"{start}fc2_bias"
    if any(np.any(ranks[r].get(bias, 0)) for r in range(world)):
        raise CheckpointError(
            "The experts' second layers must have no bias, as in the published "
            f"models. Received: one in {block}, that is not 0."
        )
    experts = f"{block}_moe/experts/"
    return {
        f"{experts}hidden_kernel": joined("fc1_w").transpose(0, 2, 1),
        f"{experts}hidden_bias": joined("fc1_bias"),
        f"{experts}output_kernel": joined("fc2_w"),
    }


def _check_arrays(start, shape, ranks, files):
    """Raises unless each GPU has all arrays of a block's experts."""
    for rank, arrays in ranks.items():
        for name, wanted in (
            ("fc1_w", shape),
            ("fc1_bias", shape[:2]),
            ("fc2_w", shape),
        ):
            found = arrays.get(f"{start}{name}")
            if found is None or found.shape != wanted:
                shown = "without it" if found is None else f"{found.shape}"
                raise CheckpointError(
                    f"Each GPU's file must hold {start}{name} of shape "
                    f"{wanted}. Received: {files[f'rank{rank}'].name}, {shown}."
                    " Copy or download it again."
                )


def _check_ranks(ranks, world, num_experts, local, slices, files):
    """Raises unless there is a file for each GPU."""
    missing = sorted(set(range(world)) - ranks.keys())
    if missing:
        rank = missing[0]
        first = rank // slices * local
        held = f"expert {first}" if local == 1 else (
            f"experts {first} to {first + local - 1}"
        )  # fmt: skip
        part = f", part {rank % slices + 1} of {slices}" if slices > 1 else ""
        raise CheckpointError(
            f"There must be a file for each of {world} GPUs. Received: "
            f"{counted(len(ranks), 'file')}, without .rank{rank}, which holds "
            f"{held} of each layer{part}. Copy or download it."
        )
    more = sorted(ranks.keys() - set(range(world)))
    if more:
        raise CheckpointError(
            f"The {num_experts} experts are on {world} GPUs. Received: files "
            f"such as {files[f'rank{more[0]}'].name} are of more. Keep the "
            "files of one training in a folder."
        )


def load_swin(model, arrays):
    """Assigns the arrays of `read_swin` to a `SwinMoE`, all or none.

    Args:
        model: A `SwinMoE` of the same architecture, of any image size. A model
            with other windows needs the `pretrained_window_sizes` of the
            training: 12, 12, 12 and 6 for the published models.
        arrays: `SwinArrays`.

    Returns:
        The model.
    """
    check_model(model, SwinMoE)
    weights = swin_weights(model)
    preprocessing = known_to(model, arrays.preprocessing)
    assign(model, weights, fit_head(dict(arrays), model), MEND)
    model.preprocessing = preprocessing
    return model


MEND = (
    "Build the model with the architecture of the checkpoint; "
    "`checkpoints.swin_config` finds it."
)


def swin_weights(model):
    """The weights of a `SwinMoE` by the names of `read_swin`."""
    found = {}
    for layer in model.layers:
        for weight in layer.weights:
            name = weight.path.split(f"{layer.name}/", 1)[1]
            name = name.replace("router/gate/", "gate/")
            kind = {"gamma": "scale", "beta": "bias"}.get(name, name)
            found[f"{layer.name}/{kind}"] = weight
    return found
