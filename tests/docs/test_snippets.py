"""Python in README and docs runs as it stands, page by page."""

import ast
import builtins
import importlib
import importlib.util
import inspect
import json
import re
import shutil

import pytest

import keras_vmoe
from tests import processes
from tests.docs.pages import PAGES
from tests.docs.pages import ROOT
from tests.docs.pages import blocks

pytestmark = pytest.mark.backends("torch")
RUN = [x for x in PAGES if any(not y.needs for y in blocks(x))]
TRAIN = """
from keras_vmoe import training
training.train(training.TrainConfig(run_dir="runs/digits", epochs=1))
"""
IMAGE = """
import keras, sklearn.datasets
image = sklearn.datasets.load_digits().images[7][..., None]
keras.utils.save_img("seven.png", image * 15.9, scale=False)
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Where a reader of "Get started" would be: a run, and an image."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "start.py").write_text(TRAIN + IMAGE)
    done = processes.run("start.py", cwd=folder, timeout=300)
    assert not done.returncode, done.stderr
    # That of `make quickstart`.
    shutil.copytree(folder / "runs/digits", folder / "runs/digits_jax")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_page(page, start, tmp_path):
    """Blocks of a page run one after the other; lines are those of the page."""
    folder = shutil.copytree(start, tmp_path / "reader")
    lines = []
    for block in blocks(page):
        if not block.needs:
            lines += [""] * (block.line - 1 - len(lines))
            lines += block.text.splitlines()
    script = folder / f"{page.stem}.md"  # Its name and lines in tracebacks.
    script.write_text("\n".join(lines))
    done = processes.run(script.name, cwd=folder, timeout=300)
    assert not done.returncode, f"{page}\n{done.stderr[-3000:]}"


def notebook_code():
    """`(path, code)` of the notebooks' cells, but for the lines of magics."""
    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            lines = "".join(cell["source"]).splitlines()
            if cell["cell_type"] == "code":
                kept = [x for x in lines if x.lstrip()[:1] != "%"]
                yield path, "\n".join(kept)


def test_modules_that_readers_import_have_a_page():
    """Of README, docs and notebooks."""
    nav = (ROOT / "mkdocs.yml").read_text()
    modules = re.findall(r" reference/([a-z.]+)\.md$", nav, re.M)
    documented = {f"keras_vmoe.{x}" for x in modules}
    sources = [(page, x.text) for page in PAGES for x in blocks(page)]
    used = {}
    for path, text in [*sources, *notebook_code()]:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                for name in (f"{node.module}.{x.name}" for x in node.names):
                    if name.startswith("keras_vmoe."):
                        is_module = importlib.util.find_spec(name)
                        used[name if is_module else node.module] = path.name
    ours = {x: path for x, path in used.items() if x != "keras_vmoe"}
    assert len(ours) > 8
    assert not {x: ours[x] for x in ours.keys() - documented}


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_are_imported_and_calls_fit(page):
    """A block imports what it uses; variables may be those of a block above.

    Of blocks that need what a test does not have, too.
    """
    known = set(dir(builtins))
    for block in blocks(page):
        nodes, imported = list(ast.walk(ast.parse(block.text))), set()
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
        missing = used - known - imported
        assert not missing, f"{page}:{block.line}: {sorted(missing)}"
