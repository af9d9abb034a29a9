"""Checkpoints of ViTs in any known format, recognized by content."""

import os
import pathlib
import zipfile
from collections.abc import Callable
from collections.abc import Sequence

import numpy as np

from keras_vmoe.checkpoints._keras import KERAS_FILES
from keras_vmoe.checkpoints._keras import load_keras
from keras_vmoe.checkpoints._npz import read_npz
from keras_vmoe.checkpoints._orbax import holds_orbax
from keras_vmoe.checkpoints._orbax import read_orbax
from keras_vmoe.checkpoints._torch import read_safetensors
from keras_vmoe.checkpoints.files import CheckpointError
from keras_vmoe.checkpoints.keras_applications import load_convnext
from keras_vmoe.checkpoints.sharded import read_vmoe
from keras_vmoe.checkpoints.swin import is_swin
from keras_vmoe.checkpoints.swin import load_swin
from keras_vmoe.checkpoints.swin import read_swin
from keras_vmoe.checkpoints.vmoe import load_vmoe
from keras_vmoe.models.base import MoEModel


def load(
    model: MoEModel,
    path: str | os.PathLike[str],
    progress: Callable[[int, int], object] | None = None,
    grid: int | Sequence[int] | None = None,
) -> MoEModel:
    """Assigns a pretrained checkpoint of any known format to a model.

    Args:
        model: A `ViTMoE` of the same architecture, which
            `checkpoints.vmoe_config` finds; for ConvNeXt weights the dense
            `ConvNeXtMoE`, for Swin-MoE weights the `SwinMoE` of
            `checkpoints.swin_config`. `models.upcycle` turns a dense model into
            an MoE model.
        path: As in `read`, or a `.weights.h5` or `.keras` file of a model of
            this architecture and any image size. All but `.weights.h5` give
            the preprocessing of the images, which the model takes over.
        progress: As in `read`.
        grid: As in `load_vmoe`; Keras files know their own, except
            `.weights.h5` of version 0.1.0.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: As `load_vmoe`.
        FileNotFoundError, CheckpointError, ImportError: As `read`.

    Example:

    >>> load(model, "ViT-B_16.npz")  # doctest: +SKIP
    """
    if os.fspath(path).endswith(KERAS_FILES):
        return load_keras(model, path, grid)
    arrays = read(path, progress)
    family = getattr(arrays, "family", "vit")
    if family == "vit":
        return load_vmoe(model, arrays, grid)
    return {"convnext": load_convnext, "swin": load_swin}[family](model, arrays)


def read(
    path: str | os.PathLike[str],
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, np.ndarray]:
    """Reads a checkpoint of a ViT, V-MoE, ConvNeXt or Swin in any known format.

    Args:
        path: Prefix of a sharded checkpoint of V-MoE (`PREFIX.index`), folder
            of an Orbax checkpoint of the same program (one step, or the
            training state in it), `.npz` file of a ViT (augreg), or safetensors
            file of timm's `vit_*`, `deit3_*` and DINOv2, of Transformers'
            DINOv2, or of a ConvNeXt of timm, torchvision or its authors. For a
            Swin-MoE `NAME.pth`, the common start of its file names
            (`NAME.pth.rank0`, ..., `NAME.pth.master`).
        progress: Optional function of `(bytes so far, total bytes)`, called
            while a sharded checkpoint is read.

    Returns:
        Dict from V-MoE's names (ours for a ConvNeXt or Swin) to numpy arrays.
        Of a training state only the parameters are returned.

    Raises:
        FileNotFoundError: If the path does not exist.
        CheckpointError: If a file is truncated, corrupt or of another format.
        ImportError: If a library that the format needs is missing.

    Example:

    >>> arrays = read("checkpoints/vmoe_b16")  # doctest: +SKIP

    Reference:
        https://github.com/google-research/vmoe, `vmoe/checkpoints`;
        [Steiner et al., 2021](https://arxiv.org/abs/2106.10270) for `.npz`.
    """
    reader = reader_of(path)
    return reader(pathlib.Path(path)) if reader else read_vmoe(path, progress)


def reader_of(path):
    """The reader of a local folder or file; None for sharded checkpoints."""
    if "://" in os.fspath(path):
        return None
    path = pathlib.Path(path)
    if is_swin(path):
        return read_swin
    if path.is_dir():
        _check_folder(path)
        return read_orbax
    if path.is_file():
        _check_no_pickle(path)
        if path.suffix.lower() == ".safetensors":
            return read_safetensors
    is_zip = path.suffix != ".keras" and zipfile.is_zipfile(path)
    if path.suffix == ".npz" or is_zip:
        return read_npz
    if path.is_file() and path.suffix != ".index":
        raise _unknown(path)
    return None


def _check_folder(folder):
    """Raises unless the folder is an Orbax checkpoint."""
    prefixes = sorted(str(x.with_suffix("")) for x in folder.glob("*.index"))
    if prefixes:
        raise CheckpointError(
            "A sharded checkpoint is named by its prefix. "
            f"Received: the folder {folder}, which holds {prefixes}. Name one "
            "of them."
        )
    if not holds_orbax(folder):
        raise _unknown(folder)


def _check_no_pickle(path):
    """Raises for a PyTorch file, which could run any code."""
    with open(path, "rb") as file:
        start = file.read(2)
    is_pickle = start[:1] == b"\x80" and start[1:] <= b"\5"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            is_pickle = any(x.endswith("data.pkl") for x in archive.namelist())
    if is_pickle:
        raise CheckpointError(
            "A checkpoint must not be a pickle, which can run any code when it "
            f"is opened. Received: {path}, which was not. Take the "
            "safetensors file of the same weights, or write one: "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), "
            "'model.safetensors')."
        )


def _unknown(path):
    return CheckpointError(
        "A checkpoint must be the prefix of a sharded V-MoE checkpoint, an "
        "Orbax folder, a .npz file of a ViT, or a .safetensors file. "
        f"Received: {path}, which is none of these. Run folders, .keras and "
        ".weights.h5 files need no conversion: the commands, `models.load` and "
        "`checkpoints.load` read them."
    )
