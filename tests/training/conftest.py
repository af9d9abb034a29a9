"""One small run, and the settings of others."""

import pytest

from keras_vmoe import training
from tests.training.small import SMALL
from tests.training.small import changed


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
