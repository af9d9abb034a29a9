"""Models before and after a run: initial weights, frozen parts, restoring."""

import json
import os
import pathlib
import shlex

import keras
from keras.ops import convert_to_numpy

from keras_vmoe import checkpoints
from keras_vmoe import layers
from keras_vmoe import models
from keras_vmoe._warnings import warn
from keras_vmoe.checkpoints.architecture import made_of
from keras_vmoe.checkpoints.assignment import fit_positions
from keras_vmoe.checkpoints.assignment import grid_of
from keras_vmoe.evaluation.comparison import SEED
from keras_vmoe.training import recipes
from keras_vmoe.training.architecture import from_scratch
from keras_vmoe.training.architecture import resolved
from keras_vmoe.training.building import compile_model
from keras_vmoe.training.building import make_model
from keras_vmoe.training.checkpointing import Checkpoints
from keras_vmoe.training.config import given
from keras_vmoe.training.run_folder import CHECKPOINTS
from keras_vmoe.training.run_folder import CLASSES
from keras_vmoe.training.run_folder import CONFIG
from keras_vmoe.training.run_folder import MODEL

POSITIONS = "positions/embedding"
ANY_STEPS = 2**31  # For the schedule of a model that is not trained further.


def starting_model(config, info):
    """Returns the model of a run before its first step."""
    config = resolved(config)
    init, upcycle = config.model.init, config.model.upcycle
    model = make_model(from_scratch(config), info.num_classes)
    if init is not None:
        moe = given(config.moe) if upcycle else None
        initialize(model, init, info.class_names, moe)
        model.preprocessing = config.data.preprocessing  # Flags may differ.
    freeze(model, config.model.freeze)
    return model


def restore(run_dir: str | os.PathLike[str]) -> keras.Model:
    """Loads the model of a run, finished or stopped.

    Args:
        run_dir: Folder of the run.

    Returns:
        The model of the last complete epoch: from the newest checkpoint if one
        exists, else from `model.keras`. With `optimizer.ema` its weights are
        the averages.

    Raises:
        FileNotFoundError: If the folder holds neither.
        ValueError: If its configuration is not a run's.

    Example:

    >>> model = restore("runs/digits")  # doctest: +SKIP
    """
    run_dir = pathlib.Path(run_dir)
    kept = Checkpoints(run_dir / CHECKPOINTS)
    if not kept.epochs():
        if (run_dir / MODEL).exists():
            return models.load(run_dir / MODEL, compile=False)
        seeds = sorted(run_dir.glob(f"{SEED}*"))
        if seeds:
            raise FileNotFoundError(
                f"A run must be named by its own folder. Received: "
                f"{str(run_dir)!r}, which holds the runs of "
                f"{len(seeds)} seeds. Name one of them, such as {seeds[0]}."
            )
        raise FileNotFoundError(
            f"A run folder must hold {MODEL} or a checkpoint. Received: "
            f"{str(run_dir)!r}, which has neither. To resume a stopped run: "
            f"keras-vmoe train --config {shlex.quote(str(run_dir / CONFIG))}"
        )
    config = from_scratch(recipes.load(run_dir / CONFIG))
    classes = json.loads((run_dir / CLASSES).read_text())
    model = make_model(config, len(classes))
    freeze(model, config.model.freeze)
    compile_model(model, config, ANY_STEPS)
    if kept.restore(model) is None:
        raise ValueError(
            "At least one checkpoint of the run must be intact. Received: "
            f"{str(run_dir)!r}, where all are corrupt. Train it again."
        )
    if config.optimizer.ema:
        model.optimizer.finalize_variable_values(model.trainable_variables)
    return model


def initialize(model, path, class_names=(), moe=None):
    """Loads pretrained weights into a model, for fine-tuning.

    The weights come from a `.keras` file, a run folder, or a checkpoint that
    `checkpoints.read` supports. The head keeps its initial weights if the
    classes differ from `class_names`. Learned positions are resized. If the
    weights do not fit, the model stays unchanged. With `moe`, the argument of
    `models.upcycle`, the file's MLPs or experts are upcycled.
    """
    path = pathlib.Path(path)
    run_dir = path if path.is_dir() else path.parent
    if (path / CONFIG).exists() or (path / MODEL).exists():
        source = restore(path)
    elif path.suffix == ".keras":
        source = models.load(path, compile=False)
    elif moe is None:
        checkpoints.load(model, path)
        return
    else:
        source = made_of(checkpoints.read(path))
    if moe is not None:
        source = models.upcycle(source, moe)
    copy_weights(source, model, _same_classes(run_dir, class_names))


def _same_classes(run_dir, class_names):
    """Whether a run's model has these classes, as far as is known."""
    file = run_dir / CLASSES
    if not class_names or not file.exists():
        return True
    return json.loads(file.read_text()) == list(class_names)


def copy_weights(source, model, with_head=True):
    """Copies the weights of one model to another, by path.

    Positions may differ in shape. So may the head, which then stays unchanged.
    """
    theirs = {w.path: convert_to_numpy(w) for w in source.weights}
    ours = {w.path: w for w in model.weights}
    if isinstance(model, models.ViTMoE) and POSITIONS in theirs:
        theirs[POSITIONS] = fit_positions(
            theirs[POSITIONS], model, grid_of(source)
        )
    shapes = {name: tuple(weight.shape) for name, weight in ours.items()}
    found = {name: array.shape for name, array in theirs.items()}
    differ = {
        name
        for name in found.keys() | shapes.keys()
        if found.get(name) != shapes.get(name)
    }
    wrong = sorted(x for x in differ if not x.startswith("head/"))
    if wrong:
        words = [f"{x} {found.get(x)} for {shapes.get(x)}" for x in wrong]
        raise ValueError(
            "The weights to start from must be those of the same model. "
            f"Received: weights that differ: {'; '.join(words)}. Train a model "
            "of that architecture."
        )
    with_head = with_head and not differ
    if not with_head:
        warn(
            "The head of the file has other classes: the model's head is "
            "newly initialized."
        )
    for name, weight in ours.items():
        if with_head or not name.startswith("head/"):
            weight.assign(theirs[name])


def freeze(model, what):
    """Freezes the `"routers"`, the `"backbone"` (all but the head), or None."""
    for layer in model.layers:
        if what == "backbone" and layer.name != "head":
            layer.trainable = False
        elif what == "routers" and isinstance(layer, layers.MoEMLP):
            layer.router.trainable = False
