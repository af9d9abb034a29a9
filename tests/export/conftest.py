"""One exported folder for all tests that only read it."""

import numpy as np
import pytest

from keras_vmoe import export
from keras_vmoe.export import agreement
from keras_vmoe.export import asking
from tests.export import small
from tests.export.c_api import ServedModel

SIGNATURES = {
    "fast": small.FAST,
    "accurate": {"num_selected_experts": np.int64(3)},
    "crowded": {"images_per_group": 8, "capacity_factor": 0.5},
    "fast_jpeg": {"input": "encoded", **small.FAST},
}


@pytest.fixture(scope="session")
def model():
    return small.MODELS["bpr"]()


@pytest.fixture(scope="session")
def folder(model, tmp_path_factory):
    return export.saved_model(
        model,
        tmp_path_factory.mktemp("served"),
        version=3,
        signatures=SIGNATURES,
        class_names=small.CLASSES,
        card={"test_accuracy": 0.5, "preset": None},
    )


@pytest.fixture(scope="session")
def served(folder):
    return ServedModel(folder)


@pytest.fixture
def asked_here(monkeypatch):
    """Lets exports answer in this process, which has their runtime already.

    That a process without Keras gives the same answers is shown by `folder`.
    """
    monkeypatch.setattr(
        agreement, "_run_asking", lambda *paths: asking.main(*map(str, paths))
    )
