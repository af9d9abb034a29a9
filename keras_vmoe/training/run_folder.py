"""Run folders: their settings, and whether a run may write to one."""

import contextlib
import dataclasses
import json
import pathlib
import shlex
import shutil

import keras
import numpy as np

from keras_vmoe import _files
from keras_vmoe._extras import require
from keras_vmoe.distribution import _processes
from keras_vmoe.evaluation.comparison import PREDICTIONS
from keras_vmoe.evaluation.comparison import RESULT
from keras_vmoe.evaluation.comparison import flat
from keras_vmoe.models import MoEConfig
from keras_vmoe.training import recipes
from keras_vmoe.training.architecture import CONFIG
from keras_vmoe.training.architecture import MODEL as MODEL
from keras_vmoe.training.architecture import resolved
from keras_vmoe.training.config import given

CLASSES = "classes.json"
CHECKPOINTS = "checkpoints"
# Settings that may differ when a run is resumed.
FREE = (
    "run_dir",
    "tensorboard",
    "data.data_dir",
    "checkpoint.keep_checkpoints",
    "devices.distribution",
    "devices.expert_shards",
    "devices.shard_dense",
)


@contextlib.contextmanager
def open_run(config, class_names):
    """Creates a run folder, or opens that of a stopped run with these settings.

    No other run can start in it until the context exits.
    """
    check_run(config, class_names)
    run_dir, settings = pathlib.Path(config.run_dir), settings_of(config)
    _processes.check_agreement("run folder", run_dir=config.run_dir)
    if not _processes.is_first_process():
        yield run_dir  # All processes check, one writes.
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    with _files.locked(run_dir):
        text = require("yaml", "cli").safe_dump(settings, sort_keys=False)
        # First, because it identifies a stopped run.
        _files.write_text(run_dir / CONFIG, text)
        _files.write_text(run_dir / CLASSES, json.dumps(class_names))
        yield run_dir


def check_free(config):
    """Raises if another process trains in the folder."""
    run_dir = pathlib.Path(config.run_dir)
    if _files.lock_of(run_dir).exists():
        with _files.locked(run_dir):
            pass


def is_finished(config):
    """Whether the folder holds this run, finished.

    Raises:
        FileExistsError: If it holds a finished run with other settings.
    """
    run_dir = pathlib.Path(config.run_dir)
    if not (run_dir / RESULT).exists():
        return False
    there = flat(
        require("yaml", "cli").safe_load((run_dir / CONFIG).read_text())
    )
    here = flat(settings_of(resolved(config)))
    different = [
        f"{name}: {there.get(name)!r} there, {value!r} here"
        for name, value in here.items()
        # Unset values may have been taken from the dataset.
        if value not in (None, there.get(name)) and name not in FREE
    ]
    if different:
        raise FileExistsError(
            "A finished run is kept only if its settings match. Received: "
            f"run_dir={str(run_dir)!r}, where these differ: "
            f"{'; '.join(different)}. Name another folder."
        )
    return True


def check_run(config, class_names):
    """Raises if the folder holds anything but a stopped run like this one."""
    run_dir = pathlib.Path(config.run_dir)
    if run_dir.exists() and not (run_dir.is_dir() and _is_empty(run_dir)):
        _check_same(run_dir, settings_of(config), class_names)


def settings_of(config):
    """Returns a configuration as plain values, with the backend in use."""
    settings = dataclasses.asdict(config)
    settings["backend"] = keras.backend.backend()
    if config.moe is not None:
        moe = MoEConfig.from_dict(given(config.moe)).to_dict()
        settings["moe"] = {x: moe[x] for x in given(config.moe)}
    return json.loads(json.dumps(settings))  # YAML has lists, not tuples.


def write_result(run_dir, test, facts):
    """Marks a run as finished; its checkpoints are no longer needed.

    Args:
        run_dir: Folder.
        test: The `evaluation.Measurement` of its test images.
        facts: Dict of further numbers, such as its cost.
    """
    with _files.replacing(run_dir / PREDICTIONS) as partial:
        np.savez(partial, labels=test.labels, predicted=test.predicted)
    result = {x: getattr(test, x) for x in ("accuracy", "top5", "loss")}
    _files.write_text(run_dir / RESULT, json.dumps({**result, **facts}))
    shutil.rmtree(run_dir / CHECKPOINTS, ignore_errors=True)


def _check_same(run_dir, settings, class_names):
    """Raises unless the folder holds a stopped run with these settings."""
    is_finished = (run_dir / RESULT).exists()
    if is_finished or not (run_dir / CONFIG).exists():
        kind = "a finished run" if is_finished else "other files"
        raise FileExistsError(
            "`run_dir` must be new or empty, or hold a stopped run: no run is "
            f"overwritten. Received: run_dir={str(run_dir)!r}, which holds "
            f"{kind}. Name another folder or remove this one."
        )
    if not any(run_dir.glob(f"{CHECKPOINTS}/*")):
        return  # Stopped before the first checkpoint.
    config = resolved(recipes.load(run_dir / CONFIG))
    there, here = flat(settings_of(config)), flat(settings)
    there["backend"] = config.backend
    # Datasets may move to another folder, but must keep their classes.
    there["classes"] = json.loads((run_dir / CLASSES).read_text())
    here["classes"] = list(class_names)
    different = [
        f"{name}: {there.get(name)!r} there, {here.get(name)!r} here"
        for name in {**there, **here}
        if there.get(name) != here.get(name) and name not in FREE
    ]
    if different:
        raise ValueError(
            "A stopped run must be resumed with the settings it was started "
            f"with. Received: run_dir={str(run_dir)!r}, where these differ: "
            f"{'; '.join(different)}. Name another folder, or use: --config "
            f"{shlex.quote(str(run_dir / CONFIG))}"
        )


def _is_empty(folder):
    """Whether a folder holds nothing but our partially written files."""
    names = (path.name for path in folder.iterdir())
    return all(name.startswith(_files.PARTIAL) for name in names)
