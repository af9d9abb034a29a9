"""One exported folder for all tests that only read it."""

import pytest

from keras_vmoe.export import agreement
from keras_vmoe.export import asking
from tests.export import small
from tests.export.c_api import ServedModel


@pytest.fixture(scope="session")
def model():
    return small.MODELS["bpr"]()


@pytest.fixture(scope="session")
def folder(model, tmp_path_factory):
    return small.served_folder(model, tmp_path_factory.mktemp("served"))


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
