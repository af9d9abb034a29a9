"""The architecture of a checkpoint, from the shapes of its arrays."""

import os
import re
from collections.abc import Mapping

import numpy as np

from keras_vmoe._checks import check_sizes
from keras_vmoe.checkpoints.assignment import POSITIONS
from keras_vmoe.checkpoints.reading import read
from keras_vmoe.checkpoints.reading import reader_of
from keras_vmoe.checkpoints.sharded_index import read_index

BLOCK = r"Encoder/encoderblock_(\d+)"


def vmoe_config(arrays, image_size=None):
    """Infers the arguments of `ViTMoE` from the shapes of a checkpoint.

    Settings without weights are not known: the number of selected experts
    (V-MoE: 2, the default), the capacity factor, batch priority, and whether
    tokens or experts choose. Set those in the result.

    Args:
        arrays: Path of a checkpoint, as of `checkpoints.read` (of a sharded one
            only the index is read), or a dict from the reference's names to
            arrays.
        image_size: Side of the images in pixels. None is that of the position
            embedding, or 224 without one.

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
        check_sizes(image_size=image_size)
    if isinstance(arrays, (str, os.PathLike)):
        sharded = reader_of(arrays) is None
        entries = read_index(arrays).entries if sharded else read(arrays)
        more = getattr(entries, "arguments", {})
        shapes = {name: entry.shape for name, entry in entries.items()}
    elif isinstance(arrays, Mapping):
        more = getattr(arrays, "arguments", {})
        shapes = {name: np.shape(array) for name, array in arrays.items()}
    else:
        raise TypeError(
            "`arrays` must be the path of a checkpoint or a dict from names "
            f"to arrays. Received: arrays={arrays!r}."
        )
    try:
        return {**_config(shapes, image_size), **more}
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(
            "The arrays must be those of a V-MoE or ViT of the reference "
            f"program. Received: {len(shapes)} arrays, of which {error} is "
            f"missing or has another rank; the first are {list(shapes)[:3]}."
        ) from error


def _config(shapes, image_size):
    kernel = shapes["embedding/kernel"]
    if len(kernel) != 4 or kernel[0] != kernel[1] or 0 in kernel:
        raise TypeError("embedding/kernel of square patches")
    patch_size, hidden_dim = kernel[0], kernel[3]
    blocks = {m[1] for m in (re.match(BLOCK, name) for name in shapes) if m}
    num_layers = len(blocks)
    attention = "Encoder/encoderblock_0/SelfAttention"
    moe, mlp_dim = _moe(shapes, num_layers)
    pooling = "map" if "MapHead/probe" in shapes else "gap"
    pooling = "token" if "cls" in shapes else pooling
    return {
        "image_size": image_size or _image_size(shapes, pooling, patch_size),
        "patch_size": patch_size,
        "hidden_dim": hidden_dim,
        "num_layers": num_layers,
        "num_heads": shapes[f"{attention}/query/kernel"][1],
        "mlp_dim": mlp_dim,
        "num_classes": shapes.get("head/bias", (None,))[0],
        "pooling": pooling,
        "num_registers": shapes.get("registers", (1, None))[1],
        "qk_norm": f"{attention}/query_ln/scale" in shapes,
        "representation_size": shapes.get("pre_logits/bias", (None,))[0],
        "position_embedding": "learned" if POSITIONS in shapes else "sincos2d",
        "moe": moe,
    }


def _image_size(shapes, pooling, patch_size):
    if POSITIONS not in shapes:
        return 224
    num_patches = max(0, shapes[POSITIONS][1] - (pooling == "token"))
    side = round(num_patches**0.5)
    if side**2 != num_patches or not side:
        raise ValueError(
            "The patches must form a square, or the image size be given. "
            f"Received: {num_patches} patches. Set `image_size`."
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
