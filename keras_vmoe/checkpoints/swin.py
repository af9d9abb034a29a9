"""Weights of Swin-MoE (microsoft/Swin-Transformer), one file for each GPU.

The experts of a run on W GPUs are in `NAME.pth.rank0` to `.rank<W - 1>`, all
that the GPUs share in `NAME.pth.master`; a dense model, or one that was
gathered, is in `NAME.pth.rank0` or `NAME.pth.global` alone. Files are pickles
of PyTorch, opened with `weights_only`: nothing in them is run.
"""

import pathlib
import pickle
import re

import numpy as np

from keras_vmoe._checks import counted
from keras_vmoe._extras import require
from keras_vmoe._preprocessing import Preprocessing
from keras_vmoe.checkpoints.assignment import assign
from keras_vmoe.checkpoints.assignment import check_model
from keras_vmoe.checkpoints.assignment import fit_head
from keras_vmoe.checkpoints.assignment import known_to
from keras_vmoe.checkpoints.files import CheckpointError
from keras_vmoe.models.swin import SwinMoE

PART = r"\.(rank\d+|master|global)"  # Ends of the names of files.
CONV, DENSE, SAME = (2, 3, 1, 0), (1, 0), None
# Names of the authors' arrays, ours, and which axes a matrix has here. Where a
# stage and a block are named, ours count through all stages.
BLOCK = r"layers\.(\d)\.blocks\.(\d+)\."
NAMES = (
    (r"patch_embed\.proj\.", "stem/", CONV),
    (r"patch_embed\.norm\.", "stem_norm/", SAME),
    (rf"{BLOCK}norm1\.", "block_{}_attention_norm/", SAME),
    (rf"{BLOCK}norm2\.", "block_{}_mlp_norm/", SAME),
    (rf"{BLOCK}attn\.qkv\.", "block_{}_attention/query_key_value/", DENSE),
    (rf"{BLOCK}attn\.proj\.", "block_{}_attention/output/", DENSE),
    (rf"{BLOCK}attn\.cpb_mlp\.0\.", "block_{}_attention/bias_hidden/", DENSE),
    (rf"{BLOCK}attn\.cpb_mlp\.2\.", "block_{}_attention/bias_output/", DENSE),
    (rf"{BLOCK}mlp\.fc1\.", "block_{}_mlp/hidden/", DENSE),
    (rf"{BLOCK}mlp\.fc2\.", "block_{}_mlp/output/", DENSE),
    (rf"{BLOCK}mlp\._moe_layer\.gates\.0\.wg\.", "block_{}_moe/gate/", DENSE),
    (r"layers\.(\d)\.downsample\.reduction\.", "downsample_{}/", DENSE),
    (r"layers\.(\d)\.downsample\.norm\.", "downsample_{}_norm/", SAME),
    (r"norm\.", "norm/", SAME),
    (r"head\.", "head/", DENSE),
)
EXPERTS = rf"{BLOCK}mlp\._moe_layer\.experts\.batched_fc([12])_(w|bias)"
TABLE = r"layers\.0\.blocks\.0\.attn\.relative_coords_table"
# What the authors' program makes anew, and Tutel's count of experts.
UNUSED = r".*(relative_coords_table|relative_position_index|attn_mask|" \
    r"_num_global_experts)"  # fmt: skip


class SwinArrays(dict):
    """Arrays by our names, and what their model is beside them.

    Attributes:
        window_size: Side of the windows in the first stage; None if no file
            says so.
        preprocessing: Dict of what is known of a `Preprocessing`.
    """

    family = "swin"

    def __init__(self, arrays, window_size):
        super().__init__(arrays)
        self.window_size = window_size
        imagenet = vars(Preprocessing.imagenet())
        self.preprocessing = {k: imagenet[k] for k in ("mean", "std")}


def is_swin(path):
    """Whether a path names such files: one of them, or what all begin with."""
    path = pathlib.Path(path)
    if re.search(rf"{PART}$", path.name):
        return path.is_file()
    parent = path.parent
    return not path.exists() and any(
        (parent / f"{path.name}.{end}").is_file()
        for end in ("rank0", "master", "global")
    )


def read_swin(path):
    """Reads the files of a Swin-MoE, one for each GPU that it was trained on.

    Args:
        path: `NAME.pth`, with which the names of all files begin, or the path
            of one of them.

    Returns:
        `SwinArrays`, a dict from our names to numpy arrays.

    Raises:
        FileNotFoundError: If there are none.
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
    start = re.sub(rf"{PART}$", "", path.name)
    files = {}
    for file in path.parent.glob("*"):
        match = re.fullmatch(re.escape(start) + PART, file.name)
        if match:
            files[match[1]] = file
    if not files:
        raise FileNotFoundError(
            "The files of a Swin-MoE are NAME.pth.rank0, NAME.pth.rank1 and so "
            f"on, and NAME.pth.master. Received: {path}, of which there is "
            "none."
        )
    shared = next(x for x in ("global", "master", "rank0") if x in files)
    state = _read(files[shared])
    ranks = {
        int(name[4:]): _read(file) if name != shared else state
        for name, file in files.items()
        if name.startswith("rank")
    }
    state = {k: x for k, x in state.items() if not re.fullmatch(EXPERTS, k)}
    numbers = _numbers(state, ranks)
    found, window_size = {}, None
    for name, x in state.items():
        if re.fullmatch(TABLE, name):
            window_size = (x.shape[1] + 1) // 2
        if not re.fullmatch(UNUSED, name):
            found |= _renamed(name, x, numbers, path)
    gates = {k: x for k, x in found.items() if k.endswith("_moe/gate/kernel")}
    for name, gate in gates.items():
        block = name.removesuffix("_moe/gate/kernel")
        found |= _experts(block, gate, ranks, numbers, files)
    return SwinArrays(found, window_size)


def _read(file):
    """The state of one file, as numpy arrays."""
    torch = require("torch", "torch")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (
        *(pickle.UnpicklingError, RuntimeError, EOFError, OSError),
        *(ValueError, KeyError, AttributeError),
    ) as error:
        raise CheckpointError(
            "A file of a Swin-MoE must be whole and hold nothing but arrays: "
            "no program in it is run. Received: "
            f"{file} ({str(error).splitlines()[0][:200]})."
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


def _numbers(state, ranks):
    """The number of each `(stage, block)` through all stages."""
    names = [*state, *(name for x in ranks.values() for name in x)]
    found = (re.match(BLOCK, name) for name in names)
    blocks = sorted({(int(m[1]), int(m[2])) for m in found if m})
    return {block: number for number, block in enumerate(blocks)}


def _renamed(name, x, numbers, path):
    """One of the authors' arrays as a dict of ours."""
    for pattern, ours, axes in NAMES:
        match = re.fullmatch(rf"{pattern}(weight|bias)", name)
        if not match:
            continue
        *where, kind = match.groups()
        if len(where) == 2:
            where = [numbers[tuple(map(int, where))]]
        elif where:  # Theirs is behind a stage, ours before the next.
            where = [int(where[0]) + 1]
        if kind == "weight":
            kind = "scale" if axes is SAME else "kernel"
            fits = axes is not SAME and x.ndim == len(axes)
            x = x.transpose(axes) if fits else x
        return {f"{ours.format(*where)}{kind}": x}
    more = ""
    if "cosine" in name or "sim_matrix" in name:
        more = " Its router is a cosine one, whose projection has a bias here."
    raise CheckpointError(
        "The arrays must be those of a Swin-MoE with a linear router. "
        f"Received: {path}, with {name} {x.shape}.{more}"
    )


def _experts(block, gate, ranks, numbers, files):
    """The experts of a block, from the files of all GPUs."""
    number = int(block.removeprefix("block_"))
    stage, place = next(k for k, x in numbers.items() if x == number)
    start = f"layers.{stage}.blocks.{place}.mlp._moe_layer.experts.batched_"
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
            "All GPUs must have as many experts. Received: "
            f"{files[f'rank{others[0]}'].name} with {shapes[others[0]]} after "
            f"{(local, hidden, features)}, of a training on another number of "
            "GPUs. Keep the files of one training in a folder."
        )
    slices = _slices(hidden, features, local)
    world = num_experts * slices // local
    _check_ranks(ranks, world, num_experts, local, slices, files)

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
            "The experts' second layers must have no bias, as the published "
            f"ones. Received: one in {block}, that is not 0."
        )
    experts = f"{block}_moe/experts/"
    return {
        f"{experts}hidden_kernel": joined("fc1_w").transpose(0, 2, 1),
        f"{experts}hidden_bias": joined("fc1_bias"),
        f"{experts}output_kernel": joined("fc2_w"),
    }


def _slices(hidden, features, local):
    """GPUs that share an expert, of 4 times the features; 1 or more."""
    whole = 4 * features
    return whole // hidden if local == 1 and whole % hidden == 0 else 1


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
            f"of another number of them, such as {files[f'rank{more[0]}'].name}"
            ". "
            "Keep the files of one training in a folder."
        )


def swin_config(arrays, image_size=None):
    """Infers the arguments of the `SwinMoE` of a checkpoint.

    K, the capacity factor and batch priority are in no array: they are those
    of the published models.

    Args:
        arrays: What `read_swin` returns.
        image_size: Side of the images in pixels, or `(height, width)`. None is
            16 windows' sides, of 12 if no file says their side: 192.

    Returns:
        Dict of `SwinMoE`'s arguments.

    Raises:
        CheckpointError: If the arrays are not those of a Swin-MoE.
    """
    shapes = {name: np.shape(x) for name, x in arrays.items()}
    try:
        return _config(shapes, arrays.window_size or 12, image_size)
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(
            "The arrays must be those of a Swin-MoE. Received: "
            f"{counted(len(shapes), 'array')}, of which {error} is missing or "
            f"has another rank; the first are {list(shapes)[:3]}."
        ) from error


def _config(shapes, window_size, image_size):
    attention = r"block_(\d+)_attention/bias_output/kernel"
    found = (re.fullmatch(attention, name) for name in shapes)
    heads = {int(m[1]): shapes[m[0]][1] for m in found if m}
    depths, dims, num_heads = [], [], []
    for block in range(len(heads)):
        width = shapes[f"block_{block}_attention/output/kernel"][0]
        if not dims or dims[-1] != width:
            depths.append(0)
            dims.append(width)
            num_heads.append(heads[block])
        depths[-1] += 1
    gates = {
        i: shapes[f"block_{i}_moe/gate/kernel"]
        for i in range(len(heads))
        if f"block_{i}_moe/gate/kernel" in shapes
    }
    patch_size, _, channels, _ = shapes["stem/kernel"]
    width, hidden = shapes["block_0_mlp/hidden/kernel"]
    moe = None
    if gates:
        moe = {
            "layers": list(gates),
            "num_experts": next(iter(gates.values()))[1],
            "num_selected_experts": 1,
            "capacity_factor": 1.25,
            "batch_priority": True,
            "dropout": 0.1,
        }
    return {
        "depths": tuple(depths),
        "dims": tuple(dims),
        "num_heads": tuple(num_heads),
        "num_classes": shapes.get("head/bias", (None,))[0],
        "window_size": window_size,
        "image_size": image_size or 16 * window_size,
        "patch_size": patch_size,
        "mlp_ratio": hidden // width,
        "moe": moe,
        **({} if channels == 3 else {"channels": channels}),
    }


def load_swin(model, arrays):
    """Assigns the arrays of `read_swin` to a `SwinMoE`, all or none.

    Args:
        model: A `SwinMoE` of the same architecture, of any image size. A model
            of other windows needs the `pretrained_window_sizes` of the
            training: 12, 12, 12 and 6 of the published models.
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
