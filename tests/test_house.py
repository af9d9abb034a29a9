"""The house: who may import whom, what is documented, what an import loads."""

import ast
import os
import pathlib
import subprocess
import sys

import keras
import pytest

import keras_vmoe

ROOT = pathlib.Path(keras_vmoe.__file__).parent
# Each room, and the rooms below it that it may use. Arrows point down only.
MATHEMATICS = {"routing", "losses"}
MODELS = MATHEMATICS | {"distribution", "layers", "models"}
ROOMS = {
    "version": set(),
    "_checks": set(),
    "_extras": set(),
    "_files": set(),
    "_keras": set(),
    "routing": set(),
    "losses": {"routing"},
    "distribution": set(),
    "layers": MATHEMATICS | {"distribution"},
    "models": MODELS,
    "checkpoints": MODELS,
    "data": set(),
    "evaluation": MODELS | {"data"},
    "inspection": MODELS | {"data"},
    "export": MODELS | {"data"},
    "training": MODELS
    | {"data", "checkpoints", "evaluation", "inspection", "export"},
}
# The front doors may use all.
DOORS = {"__init__", "__main__", "cli"}
EVERYWHERE = {"_checks", "_extras", "_files", "_keras", "version"}
FILES = sorted(ROOT.rglob("*.py"))


def room_of(path):
    """The room of a file of the package."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported_rooms(tree):
    """Rooms that a file imports, also inside of its functions."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "keras_vmoe":
                names += [f"keras_vmoe.{alias.name}" for alias in node.names]
            else:
                names.append(node.module)
    parts = [name.split(".") for name in names]
    return {part[1] for part in parts if part[0] == "keras_vmoe" and part[1:]}


def ids(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_no_room_imports_from_above(path):
    room = room_of(path)
    if room in DOORS:
        return
    assert room in ROOMS, f"{room} is not in the plan of the house"
    imported = imported_rooms(ast.parse(path.read_text()))
    wrong = imported - ROOMS[room] - EVERYWHERE - {room}
    assert not wrong, f"{ids(path)} imports {sorted(wrong)}"


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_every_public_name_has_a_docstring(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the module has none"
    for node in tree.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef):
            continue
        if not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_no_assert_on_user_input(path):
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}"


def test_public_lists_are_whole():
    for name in keras_vmoe.__all__:
        module = getattr(keras_vmoe, name)
        for public in getattr(module, "__all__", []):
            assert hasattr(module, public), f"{name}.{public}"


OTHERS = {
    "jax": {"tensorflow", "torch"},
    "torch": {"tensorflow"},
    "tensorflow": {"torch"},
}
EXTRAS = {
    "tensorflow_datasets",
    "keras_cv",
    "official",
    "sklearn",
    "matplotlib",
}


def test_import_loads_no_other_framework_and_no_extra():
    backend = keras.backend.backend()
    program = (
        "import keras, sys; before = set(sys.modules); import keras_vmoe; "
        "print(*before, *sys.modules); print(*set(sys.modules) - before)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "KERAS_BACKEND": backend},
        cwd=ROOT.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    loaded, ours = (set(s.split()) for s in result.stdout.splitlines()[-2:])
    assert "keras_vmoe.layers" in ours
    assert not loaded & OTHERS[backend]
    # Keras itself looks for matplotlib.
    assert not ours & EXTRAS
