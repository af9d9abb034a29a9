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
INSPECT = "inspect_experts.ipynb"


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
def test_installs_the_wheel_beside_it(machine, name, has, extras):
    """No backend that is installed is replaced by another build."""
    machine(*has)
    (line,) = Notebook().run_first_cell(name)
    assert f'--find-links . "keras_vmoe[{extras}]" scikit-learn' in line


@pytest.mark.parametrize("name", [JAX, TENSORFLOW, INSPECT])
def test_installs_nothing_where_the_package_is(machine, name):
    machine("keras_vmoe")
    assert Notebook().run_first_cell(name) == []


@pytest.mark.parametrize("name", [JAX, TENSORFLOW, INSPECT])
def test_is_stored_with_its_outputs(name):
    """`make record-notebooks` runs them, and an error would stop it."""
    cells = json.loads((EXAMPLES / name).read_text())["cells"]
    codes = [x for x in cells if x["cell_type"] == "code"]
    assert [x["execution_count"] for x in codes] == [
        i for i, _ in enumerate(codes, 1)
    ]
    outputs = [x for code in codes for x in code["outputs"]]
    kinds = {kind for x in outputs for kind in x.get("data", {})}
    assert "image/png" in kinds
