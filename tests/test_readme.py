"""Code in README and docs runs as it stands."""

import ast
import builtins
import importlib
import inspect
import pathlib
import re
import runpy

import pytest

import keras_vmoe
from tests.harness import first_everywhere

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.S)


RUN = [block for block in blocks(PAGES[0]) if "model.fit(" in block]


def test_there_are_two_examples():
    assert len(RUN) == 2


@pytest.mark.slow
@pytest.mark.parametrize("block", first_everywhere(RUN), ids=["layer", "model"])
def test_example(block, tmp_path):
    """Both train; the first shows that any last batch (30 = 3 * 8 + 6) fits."""
    script = tmp_path / "example.py"
    script.write_text(block)
    model = runpy.run_path(str(script))["model"]
    assert all(loss > 0 for loss in model.history.history["loss"])


def test_augmentations_of_others():
    """A batch of them differs from all that is stored, and from another."""
    page = ROOT / "docs" / "data.md"
    (block,) = [x for x in blocks(page) if "keras_cv.layers.RandAug" in x]
    names = {}
    exec(block, names)
    images, labels = names["train"].element_spec
    assert images.shape == (64, 32, 32, 3) and labels.shape == (64, 10)
    first, second = (x for x, _ in names["train"].take(2).as_numpy_iterator())
    assert 0.01 < abs(first - second).mean() and abs(first).max() <= 1


def package_object(node):
    """What of this package is called here, or None."""
    names = []
    while isinstance(node, ast.Attribute):
        names, node = [node.attr, *names], node.value
    if not isinstance(node, ast.Name) or not hasattr(keras_vmoe, node.id):
        return None
    found = importlib.import_module(f"keras_vmoe.{node.id}")
    for name in names:
        found = getattr(found, name)
    return found


def check_call(call):
    """Raises if a call of this package is not one that its signature takes."""
    function = package_object(call.func)
    if callable(function) and all(k.arg for k in call.keywords):
        given = dict.fromkeys(k.arg for k in call.keywords)
        inspect.signature(function).bind(*call.args, **given)


@pytest.mark.backends("torch")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_are_imported_and_calls_fit(page):
    """A block imports what it uses; variables may be those of a block above."""
    known = set(dir(builtins))
    for block in blocks(page):
        nodes, imported = list(ast.walk(ast.parse(block))), set()
        for node in nodes:
            match node:
                case ast.Import(names) | ast.ImportFrom(names=names):
                    imported |= {(x.asname or x.name) for x in names}
                case ast.Name(name, ast.Store()) | ast.arg(name):
                    known.add(name)
                case ast.ClassDef(name) | ast.FunctionDef(name):
                    known.add(name)
                case ast.Call():
                    check_call(node)
        used = {x.id for x in nodes if isinstance(x, ast.Name)}
        is_excerpt = "self.router" in block  # Of a method.
        assert is_excerpt or used <= known | imported, used - known - imported
