"""Small runs that the tests of a file share, and the settings of others."""

import itertools
import pathlib
import shutil

import pytest

from keras_vmoe import training
from tests.training.small import SMALL
from tests.training.small import changed
from tests.training.small import config_of


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One folder of prepared digits for all tests of this file."""
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture
def config(tmp_path, cache):
    return changed(SMALL, run_dir=str(tmp_path / "run"), data_dir=cache)


@pytest.fixture(scope="module")
def result(tmp_path_factory, cache):
    run_dir = str(tmp_path_factory.mktemp("runs") / "run")
    return training.train(changed(SMALL, run_dir=run_dir, data_dir=cache))


@pytest.fixture(scope="module")
def stages(tmp_path_factory, cache):
    """What a kill would leave of a run, whenever a file gets its name.

    Two files at the start, then three an epoch: history, weights, state; then
    the model, the curves, predictions and the result. Number n is what is there
    before the n-th of them; the last is the whole run.
    """
    root, numbers = tmp_path_factory.mktemp("stages"), itertools.count(1)
    replace, folders = pathlib.Path.replace, [None]

    def copying(path, target):
        folders.append(root / str(next(numbers)))
        shutil.copytree(root / "whole", folders[-1])
        return replace(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pathlib.Path, "replace", copying)
        whole = training.train(config_of(root / "whole", cache))
    assert len(folders) == 1 + 2 + 3 * 3 + 4
    return [*folders, whole]


@pytest.fixture(scope="module")
def whole(stages):
    """The result of that run, which nobody disturbed."""
    return stages[-1]


@pytest.fixture
def left(stages, tmp_path, cache):
    """Settings of the run whose folder holds what the n-th kill left."""

    def copied(number, **changes):
        shutil.copytree(stages[number], tmp_path / "left")
        return config_of(tmp_path / "left", cache, **changes)

    return copied
