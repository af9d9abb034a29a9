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
    "_start": set(),
    "_warnings": set(),
    "_files": set(),
    "_typing": set(),
    "_keras": set(),
    "_preprocessing": set(),
    "routing": set(),
    "losses": set(),
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
EVERYWHERE = {
    "_checks", "_extras", "_files", "_keras", "_preprocessing", "_typing",
    "_warnings", "version",
}  # fmt: skip
TREES = {path: ast.parse(path.read_text()) for path in ROOT.rglob("*.py")}
once = pytest.mark.backends("jax")


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


def places(found):
    """Where things were found, in words: `(path, what)` of each."""
    return "\n".join(
        f"{path.relative_to(ROOT)}: {what}" for path, what in found
    )


@once
def test_no_room_imports_from_above():
    wrong = []
    for path, tree in TREES.items():
        room = room_of(path)
        if room in DOORS:
            continue
        assert room in ROOMS, f"{room} is not in the plan of the house"
        above = imported_rooms(tree) - ROOMS[room] - EVERYWHERE - {room}
        wrong += [(path, f"imports {name}") for name in sorted(above)]
    assert not wrong, places(wrong)


@once
def test_every_public_name_has_a_docstring():
    wrong = []
    for path, tree in TREES.items():
        nodes = [
            node
            for node in tree.body
            if isinstance(node, ast.ClassDef | ast.FunctionDef)
            and not node.name.startswith("_")
        ]
        for node in [tree, *nodes]:
            if not ast.get_docstring(node):
                wrong.append((path, getattr(node, "name", "the module")))
    assert not wrong, places(wrong)


@once
def test_no_assert_on_user_input():
    wrong = [
        (path, f"line {node.lineno}")
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert)
    ]
    assert not wrong, places(wrong)


@once
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
