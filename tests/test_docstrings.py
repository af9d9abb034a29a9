"""The examples in docstrings run, and print what they say."""

import doctest
import importlib
import pathlib
import re

import keras
import numpy as np
import pytest

import keras_vmoe

ROOT = pathlib.Path(keras_vmoe.__file__).parent
MODULES = sorted(
    ".".join(("keras_vmoe", *path.relative_to(ROOT).with_suffix("").parts))
    for path in ROOT.rglob("*.py")
    if path.stem not in ("__init__", "__main__")
)


# Whose examples compute; those of the others know no backend.
ROOMS = (
    "keras_vmoe.distribution.",
    "keras_vmoe.layers.",
    "keras_vmoe.losses",
    "keras_vmoe.routing.",
)


class AnyBackend(doctest.OutputChecker):
    """Shapes are tuples, whatever a backend calls them."""

    def check_output(self, want, got, optionflags):
        got = re.sub(r"torch\.Size\(\[(.*?)\]\)", _as_tuple, got)
        got = re.sub(r"TensorShape\(\[(.*?)\]\)", _as_tuple, got)
        return super().check_output(want, got, optionflags)


def _as_tuple(match):
    sizes = [size for size in match[1].split(", ") if size]
    return f"({sizes[0]},)" if len(sizes) == 1 else f"({', '.join(sizes)})"


def _param(name):
    """Whole models run on the backend that compiles nothing.

    Exports start processes of TensorFlow, and take seconds each.
    """
    # Eager JAX compiles each operation of an example.
    marks = [pytest.mark.backends("tensorflow", "torch")]
    if not name.startswith(ROOMS):
        marks = [pytest.mark.backends("torch")]
    if name.startswith("keras_vmoe.export."):
        marks = [pytest.mark.slow, pytest.mark.backends("tensorflow")]
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", [_param(name) for name in MODULES])
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    module = importlib.import_module(name)
    # What a reader of the page has: the names of the room and of the file.
    room = importlib.import_module(name.rpartition(".")[0])
    names = {"keras": keras, "np": np, **vars(room), **vars(module)}
    runner = doctest.DocTestRunner(
        checker=AnyBackend(), optionflags=doctest.NORMALIZE_WHITESPACE
    )
    lines = []
    for test in doctest.DocTestFinder().find(module, globs=names):
        runner.run(test, out=lines.append)
    assert not runner.failures, "".join(lines)


def test_shapes_of_all_backends_are_tuples():
    checker = AnyBackend()
    for got in ("torch.Size([2, 3])", "TensorShape([2, 3])", "(2, 3)"):
        assert checker.check_output("(2, 3)\n", f"{got}\n", 0)
        assert not checker.check_output("(2, 4)\n", f"{got}\n", 0)
    assert checker.check_output("(2,)\n", "torch.Size([2])\n", 0)
    assert checker.check_output("()\n", "TensorShape([])\n", 0)
