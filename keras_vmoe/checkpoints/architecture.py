"""The architecture of a checkpoint, from the shapes of its arrays."""

import itertools
import math
import os
import re
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_vmoe._checks import counted
from keras_vmoe.checkpoints.assignment import GATE
from keras_vmoe.checkpoints.assignment import POSITIONS
from keras_vmoe.checkpoints.assignment import num_class_positions
from keras_vmoe.checkpoints.files import CheckpointError
from keras_vmoe.checkpoints.keras_applications import load_convnext
from keras_vmoe.checkpoints.reading import read
from keras_vmoe.checkpoints.reading import reader_of
from keras_vmoe.checkpoints.sharded_index import read_index
from keras_vmoe.checkpoints.swin import SwinArrays
from keras_vmoe.checkpoints.swin import load_swin
from keras_vmoe.checkpoints.vmoe import load_vmoe
from keras_vmoe.models.base import image_pair
from keras_vmoe.models.convnext import ConvNeXtMoE
from keras_vmoe.models.swin import SwinMoE
from keras_vmoe.models.vit import ViTMoE

BLOCK = r"Encoder/encoderblock_(\d+)"
STEM = "stem/kernel"  # Of a ConvNeXt.


def vmoe_config(
    arrays: str | os.PathLike[str] | Mapping[str, Any],
    image_size: int | Sequence[int] | None = None,
) -> dict[str, Any]:
    """Infers the arguments of `ViTMoE` from the shapes of a checkpoint.

    Settings without weights are not known: the number of selected experts
    (V-MoE: 2, the default), the capacity factor, batch priority, and whether
    tokens or experts choose. Set those in the result.

    Args:
        arrays: Path of a checkpoint, as in `checkpoints.read` (only the index
            of a sharded one is read), or a dict from the reference's names to
            arrays.
        image_size: Side of the images in pixels, or `(height, width)`. None
            means that of the position embedding, or 224 without one.

    Returns:
        Dict of `ViTMoE`'s arguments.

    Raises:
        ValueError: If the arrays are not those of a V-MoE, or contradictory.
        FileNotFoundError, CheckpointError, ImportError: As `read`.

    Example:

    >>> config = vmoe_config("checkpoints/vmoe_b16")  # doctest: +SKIP
    >>> model = ViTMoE(**config)  # doctest: +SKIP
    """
    if image_size is not None:
        image_pair(image_size)
    if isinstance(arrays, (str, os.PathLike)):
        sharded = reader_of(arrays) is None
        entries = read_index(arrays).entries if sharded else read(arrays)
        shapes = {name: entry.shape for name, entry in entries.items()}
    elif isinstance(arrays, Mapping):
        entries = arrays
        shapes = {name: np.shape(array) for name, array in arrays.items()}
    else:
        raise TypeError(
            "`arrays` must be the path of a checkpoint or a dict from names "
            f"to arrays. Received: arrays={arrays!r}."
        )
    more = getattr(entries, "arguments", {})
    of_class = getattr(entries, "of_class", True)
    try:
        return {**_config(shapes, image_size, of_class), **more}
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(
            "The arrays must be those of a V-MoE or ViT of the reference "
            f"program. Received: {len(shapes)} arrays"
            f"{_of_convnext(shapes)}, of which {error} is missing or has "
            f"another rank; the first are {list(shapes)[:3]}."
        ) from error


def _of_convnext(shapes):
    if "stem_norm/scale" in shapes and "block_0_attention_norm/scale" in shapes:
        return " of a Swin (`swin_config`)"
    return " of a ConvNeXt (`convnext_config`)" if STEM in shapes else ""


def _config(shapes, image_size, of_class):
    kernel = shapes["embedding/kernel"]
    if len(kernel) != 4 or kernel[0] != kernel[1] or 0 in kernel:
        raise TypeError("embedding/kernel of square patches")
    patch_size, hidden_dim = kernel[0], kernel[3]
    blocks = {m[1] for m in (re.match(BLOCK, name) for name in shapes) if m}
    num_layers = len(blocks)
    if not num_layers:
        raise KeyError("Encoder/encoderblock_0")
    attention = "Encoder/encoderblock_0/SelfAttention"
    moe, mlp_dim = _moe(shapes, num_layers)
    pooling = "map" if "MapHead/probe" in shapes else "gap"
    pooling = "token" if "cls" in shapes else pooling
    return {
        "image_size": image_size
        or _image_size(shapes, pooling, patch_size, of_class),
        "patch_size": patch_size,
        "hidden_dim": hidden_dim,
        "num_layers": num_layers,
        "num_heads": shapes[f"{attention}/query/kernel"][1],
        "mlp_dim": mlp_dim,
        "num_classes": shapes.get("head/bias", (None,))[0],
        "pooling": pooling,
        "num_registers": shapes.get("registers", (1, None))[1],
        "qk_norm": f"{attention}/query_ln/scale" in shapes,
        "ensemble_size": _ensemble_size(shapes),
        "representation_size": shapes.get("pre_logits/bias", (None,))[0],
        "position_embedding": "learned" if POSITIONS in shapes else "sincos2d",
        "moe": moe,
        **({} if kernel[2] == 3 else {"channels": kernel[2]}),
    }


def _ensemble_size(shapes):
    """M of a gate `(D, M, E / M)`; None without an ensemble."""
    gates = [x for name, x in shapes.items() if name.endswith(GATE)]
    return gates[0][1] if gates and len(gates[0]) == 3 else None


def _image_size(shapes, pooling, patch_size, of_class):
    if POSITIONS not in shapes:
        return 224
    num_patches = shapes[POSITIONS][1]
    if pooling == "token":
        num_patches -= num_class_positions(num_patches, None, of_class)
    side = math.isqrt(max(0, num_patches))
    if side**2 != num_patches or not side:
        raise ValueError(
            "The patches must form a square unless the image size is given. "
            f"Received: {num_patches} patches. Set "
            "`image_size=(height, width)`."
        )
    return side * patch_size


def _moe(shapes, num_layers):
    """The `moe` argument and F of the dense MLPs."""
    dense, sparse, kinds = set(), {}, set()
    for i in range(num_layers):
        block = f"Encoder/encoderblock_{i}"
        experts = shapes.get(f"{block}/Moe/Mlp/Dense_0/kernel")
        if experts is None:
            dense.add(shapes[f"{block}/Mlp/Dense_0/kernel"][1])
        else:
            sparse[i] = (experts[0], experts[2])
            mu = shapes.get(f"{block}/Moe/Router/mu")
            kinds.add(None if mu is None else mu[2])
    experts = set(sparse.values())
    if len(dense) > 1 or len(experts) > 1 or len(kinds) > 1:
        raise ValueError(
            "All MLPs and all MoE layers must be alike. Received: hidden "
            f"features {sorted(dense)}, (experts, hidden features) "
            f"{sorted(experts)}, slots {kinds or 'none'}."
        )
    if not sparse:
        return None, dense.pop()
    (num_experts, hidden_dim), (num_slots,) = experts.pop(), kinds
    mlp_dim = dense.pop() if dense else hidden_dim
    moe = {"layers": list(sparse), "num_experts": num_experts}
    if hidden_dim != mlp_dim:
        moe["hidden_dim"] = hidden_dim
    if num_slots is not None:
        moe |= {"router": "soft", "num_slots": num_slots}
    return moe, mlp_dim


def convnext_config(
    arrays: str | os.PathLike[str] | Mapping[str, Any],
    image_size: int | Sequence[int] | None = 224,
) -> dict[str, Any]:
    """Infers the arguments of a checkpoint's dense `ConvNeXtMoE`.

    Args:
        arrays: Path of a safetensors file, or the result of `checkpoints.read`.
        image_size: Side of the images in pixels, `(height, width)`, or None for
            any; the arrays do not tell.

    Returns:
        Dict of `ConvNeXtMoE`'s arguments.

    Raises:
        ValueError: If the arrays are not those of a ConvNeXt.
        FileNotFoundError, CheckpointError, ImportError: As `read`.

    Example:

    >>> config = convnext_config("convnext_tiny.safetensors")  # doctest: +SKIP
    >>> model = ConvNeXtMoE(**config)  # doctest: +SKIP
    """
    if isinstance(arrays, (str, os.PathLike)):
        arrays = read(arrays)
    shapes = {name: np.shape(array) for name, array in arrays.items()}
    pattern = r"block_(\d+)_hidden/kernel"
    found = (re.fullmatch(pattern, name) for name in shapes)
    blocks = {int(match[1]): shapes[match[0]] for match in found if match}
    stem = shapes.get(STEM, ())
    dims = [shape[0] for _, shape in sorted(blocks.items())]
    # A stage has other features than the one before.
    stages = [(dim, len(list(group))) for dim, group in itertools.groupby(dims)]
    num_stages = 1 + sum(
        bool(re.fullmatch(r"downsample_\d+/kernel", name)) for name in shapes
    )
    if len(stem) != 4 or len(stages) != num_stages:
        raise ValueError(
            "The arrays must be those of a ConvNeXt whose stages differ in "
            f"their features. Received: {len(shapes)} arrays, the first "
            f"{list(shapes)[:3]}, {num_stages} stages of features {dims}."
        )
    scaled = f"block_{len(blocks) - 1}_scale" in shapes
    return {
        "depths": tuple(depth for _, depth in stages),
        "dims": tuple(dim for dim, _ in stages),
        "num_classes": shapes.get("head/bias", (None,))[0],
        "image_size": image_size,
        "patch_size": stem[0],
        "isotropic": len(stages) == 1,
        "mlp_ratio": blocks[0][1] // blocks[0][0],
        "layer_scale_init_value": 1e-6 if scaled else None,
        **({} if stem[2] == 3 else {"channels": stem[2]}),
    }


def swin_config(
    arrays: SwinArrays, image_size: int | Sequence[int] | None = None
) -> dict[str, Any]:
    """Infers the arguments of a checkpoint's `SwinMoE`.

    No array gives K, the capacity factor and batch priority: they are those of
    the published models.

    Args:
        arrays: The result of `read`.
        image_size: Side of the images in pixels, or `(height, width)`. None
            means 16 times the windows' side, or 192 if no file gives it.

    Returns:
        Dict of `SwinMoE`'s arguments.

    Raises:
        CheckpointError: If the arrays are not those of a Swin-MoE.
    """
    shapes = {name: np.shape(x) for name, x in arrays.items()}
    try:
        return _swin_config(shapes, arrays.window_sizes, image_size)
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(
            "The arrays must be those of a Swin-MoE. Received: "
            f"{counted(len(shapes), 'array')}, of which {error} is missing or "
            f"has another rank; the first are {list(shapes)[:3]}."
        ) from error


def _swin_config(shapes, window_sizes, image_size):
    window_size = window_sizes.get(0, 12)
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
        **(
            {"pretrained_window_sizes": tuple(window_sizes.values())}
            if image_size and list(window_sizes) == list(range(len(depths)))
            else {}
        ),
    }


def made_of(arrays, image_size=None, num_selected_experts=None):
    """Makes the model of a checkpoint, with its weights.

    Args:
        arrays: The result of `read`.
        image_size: Side of the images in pixels; None means the weights', or
            224.
        num_selected_experts: K; None means V-MoE's 2.
    """
    kind, config_of, assigned = FAMILIES[getattr(arrays, "family", "vit")]
    if kind is ConvNeXtMoE:
        image_size = image_size or 224
    config = {"moe": None, **config_of(arrays, image_size)}
    if num_selected_experts is not None:
        if config["moe"] is None:
            raise ValueError(
                "A dense model selects no experts. Received: "
                f"--num_selected_experts {num_selected_experts}. Leave it out."
            )
        config["moe"]["num_selected_experts"] = num_selected_experts
    return assigned(kind(**config), arrays)


# Model, and the functions that find its arguments and assign its arrays.
FAMILIES = {
    "vit": (ViTMoE, vmoe_config, load_vmoe),
    "convnext": (ConvNeXtMoE, convnext_config, load_convnext),
    "swin": (SwinMoE, swin_config, load_swin),
}
