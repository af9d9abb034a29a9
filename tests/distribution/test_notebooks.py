"""The first cells of the notebooks: what they install, and what they leave."""

import importlib.util
import json
import pathlib

import pytest
from IPython.core.inputtransformer2 import TransformerManager

pytestmark = pytest.mark.backends("jax")

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
JAX = "vmoe_expert_parallel_jax.ipynb"
TENSORFLOW = "convnext_moe_tpu_tensorflow.ipynb"


class Notebook:
    """Notes what `%pip` is told."""

    def __init__(self):
        self.names, self.lines = {}, []
        self.names["get_ipython"] = lambda: self

    def run_line_magic(self, magic, line):
        assert magic == "pip"
        self.lines.append(line.format_map(self.names))

    def run_first_cell(self, name):
        cells = json.loads((EXAMPLES / name).read_text())["cells"]
        source = next(x["source"] for x in cells if x["cell_type"] == "code")
        program = TransformerManager().transform_cell("".join(source))
        exec(program, self.names)
        return self.lines


@pytest.fixture
def machine(monkeypatch):
    """Sets what this machine seems to have."""
    find_spec = importlib.util.find_spec

    def has(*names):
        spec = find_spec("json")
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda x: spec if x in names else None
        )

    return has


@pytest.mark.parametrize(
    ("name", "has", "extras"),
    [
        (JAX, (), "plots,jax,tensorflow"),
        (JAX, ("jax", "tensorflow"), "plots"),
        (JAX, ("tensorflow",), "plots,jax"),
        (TENSORFLOW, (), "plots,tensorflow"),
        (TENSORFLOW, ("tensorflow",), "plots"),
    ],
)
@pytest.mark.parametrize("place", ["examples", ".", ".."])
def test_installs_from_its_clone(
    tmp_path, monkeypatch, machine, name, has, extras, place
):
    """No backend that is there is replaced by another build."""
    clone = tmp_path / "keras_vmoe"
    (clone / "examples").mkdir(parents=True)
    (clone / "setup.py").touch()
    monkeypatch.chdir(clone / place)
    machine(*has)
    (line,) = Notebook().run_first_cell(name)
    assert f'"{clone}[{extras}]"' in line
    assert "scikit-learn" in line


@pytest.mark.parametrize("name", [JAX, TENSORFLOW])
def test_installs_nothing_where_the_package_is(machine, name):
    machine("keras_vmoe")
    assert Notebook().run_first_cell(name) == []


@pytest.mark.parametrize("name", [JAX, TENSORFLOW])
def test_says_that_it_needs_a_clone(tmp_path, monkeypatch, machine, name):
    monkeypatch.chdir(tmp_path)
    machine()
    with pytest.raises(AssertionError, match="on Colab, clone or upload one"):
        Notebook().run_first_cell(name)
