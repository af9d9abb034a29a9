"""The extra `data` is needed when it is used, not before."""

import os
import pathlib
import re
import subprocess
import sys

import keras
import pytest

from keras_vmoe import _extras
from keras_vmoe import data
from keras_vmoe.data import tensorflow_runtime

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_require_returns_the_module():
    assert _extras.require("os.path", "data") is os.path


@pytest.mark.parametrize(
    "module, extra, distribution",
    [
        ("tensorflow_datasets", "data", "tensorflow-datasets"),
        ("sklearn.datasets", "data", "scikit-learn"),
        ("no_such_module", "export", "no_such_module"),
    ],
)
def test_require_names_the_command(monkeypatch, module, extra, distribution):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError) as caught:
        _extras.require(module, extra)
    text = str(caught.value)
    assert text.startswith(f"`keras_vmoe[{extra}]` needs {distribution}")
    assert f"Received: module_name={module!r}" in text
    assert text.endswith(f"pip install 'keras_vmoe[{extra}]'")


@pytest.mark.parametrize(
    "module, distribution",
    [
        ("tensorflow", "tensorflow"),
        ("tensorflow_datasets", "tensorflow-datasets"),
        ("importlib_resources", "importlib_resources"),
        ("sklearn.datasets", "scikit-learn"),
    ],
)
def test_load_without_the_extra(monkeypatch, tmp_path, module, distribution):
    tensorflow_runtime.import_tensorflow.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    words = f"needs {distribution}.*pip install 'keras_vmoe\\[data\\]'"
    with pytest.raises(ImportError, match=words):
        data.load("digits", "train", 8, 4, True, tmp_path)
    assert list(tmp_path.rglob("*.json")) == []


def test_import_brings_in_nothing_optional():
    program = (
        "import sys; import keras_vmoe.data; "
        "print(' '.join(sorted(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    modules = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert "keras_vmoe.data.loading" in modules
    optional = {"tensorflow_datasets", "keras_cv", "official"}
    if keras.backend.backend() != "tensorflow":
        optional.add("tensorflow")
    assert optional.isdisjoint(modules)


@pytest.mark.parametrize(
    "function",
    [
        _extras.require,
        data.info,
        data.load,
        data.preprocess,
        data.read_images,
    ],
)
def test_examples_in_docstrings_run(function):
    blocks = re.findall(r"```python\n(.*?)```", function.__doc__, re.DOTALL)
    assert len(blocks) == 1
    program = re.sub("^ {4}", "", blocks[0], flags=re.MULTILINE)
    exec(program, {})


def test_public_names():
    assert sorted(data.__all__) == [
        "Augmentation",
        "Preprocessing",
        "find_corrupt",
        "info",
        "load",
        "preprocess",
        "read_images",
    ]
    assert all(getattr(data, name).__doc__ for name in data.__all__)
