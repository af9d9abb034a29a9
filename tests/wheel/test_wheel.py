"""The wheel and the sdist, as a stranger gets them: `make test-wheel`."""

import pathlib
import re
import subprocess
import tarfile
import zipfile

import pytest

import keras_vmoe
from tests.checkpoints import test_torch
from tests.commands import SMALL
from tests.wheel import bare

ROOT = pathlib.Path(__file__).parents[2]
MODEL = """
import os

import keras
import numpy as np

from keras_vmoe import models

model = models.ViTMoE(
    image_size=8, patch_size=4, hidden_dim=8, num_layers=2, num_heads=2,
    mlp_dim=16, num_classes=3, moe=dict(layers="last_1", num_experts=2),
)
images = np.random.default_rng(0).random((4, 8, 8, 3), "float32")
assert keras.backend.backend() == os.environ["KERAS_BACKEND"]
"""
# What an extra is for; without it, the error says how to install it.
TASKS = {
    "data": """
from keras_vmoe import data
next(iter(data.load("digits", "test", 8, 4, training=False)))
""",
    "checkpoints": """
from keras_vmoe import checkpoints
found = models.ViTMoE(**checkpoints.vmoe_config("model.safetensors"))
checkpoints.load(found, "model.safetensors")
""",
    "plots": """
from keras_vmoe import inspection
inspection.plot_history({"loss": [2.0, 1.0]}, None, "curves.png")
""",
    "cli": """
from keras_vmoe import cli
assert not cli.main(["presets", "--format", "csv"])
""",
    "serving": """
from keras_vmoe import export
export.saved_model(model, "served", version=1)
""",
    "onnx": """
from keras_vmoe import export
export.onnx(model, "model.onnx")
""",
    "litert": """
from keras_vmoe import export
export.litert(model, "model.tflite")
""",
}
ALONE = """
import sys

loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile("sgd", loss)
model.fit(images, np.arange(4) % 3, verbose=0)
models.save(model, "model.keras")
again = models.load("model.keras")
np.testing.assert_array_equal(
    model.predict(images, verbose=0), again.predict(images, verbose=0)
)
others = {"jax", "tensorflow", "torch"} - {keras.backend.backend()}
assert not others & set(sys.modules)
"""
REFUSED = f"""
for extra, task in {TASKS}.items():
    try:
        exec(task)
    except AssertionError:
        assert extra == "cli"  # Which prints its errors.
    except ImportError as error:
        assert f"pip install 'keras_vmoe[{{extra}}]'" in str(error), error
    else:
        raise AssertionError(extra)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Creates environments beside this one's files, for hard links."""

    def create(*extras):
        name = "-".join(extras)
        folder = tmp_path_factory.mktemp(name)
        place = ROOT / "build" / "bare" / name
        return bare.create(place, bare.built("*.whl"), extras), folder

    return create


@pytest.mark.parametrize("backend", ["jax", "tensorflow", "torch"])
def test_without_extras(environment, backend):
    python, folder = environment(backend)
    done = bare.run(python, MODEL + ALONE + REFUSED, backend, folder)
    assert not done.returncode, done.stderr
    assert "pip install 'keras_vmoe[cli]'" in done.stderr


# JAX brings SciPy, PyTorch Jinja2, TensorFlow most of what others need.
@pytest.mark.parametrize(
    "backend, extra",
    [("jax", x) for x in TASKS]
    + [("torch", x) for x in ("data", "checkpoints", "cli")],
)
def test_with_an_extra(environment, extra, backend):
    python, folder = environment(backend, extra)
    if extra == "checkpoints":
        test_torch.written("deit3", folder)
    done = bare.run(python, MODEL + TASKS[extra], backend, folder)
    assert not done.returncode, done.stderr


def test_the_extras_of_the_readme_train_and_serve(environment):
    found = r'of your own: `pip install "\.\[(.+?)\]"'
    (extras,) = re.findall(found, (ROOT / "README.md").read_text())
    python, folder = environment(*extras.split(","))
    command = ["train", *SMALL, "--run_dir=run"]
    program = f"""
from keras_vmoe import cli, export, models
assert not cli.main({command})
export.saved_model(models.load("run/model.keras"), "served")
"""
    done = bare.run(python, program, extras.partition(",")[0], folder)
    assert not done.returncode, done.stderr


def test_the_wheel_holds_the_package():
    with zipfile.ZipFile(bare.built("*.whl")) as archive:
        held = {x for x in archive.namelist() if ".dist-info/" not in x}
    assert held == tracked("keras_vmoe")


def test_the_sdist_holds_what_builds_and_describes_it():
    path = bare.built("*.tar.gz")
    with tarfile.open(path) as archive:
        names = [x.name for x in archive.getmembers() if x.isfile()]
    held = {x.partition("/")[2] for x in names}
    assert path.name == f"keras_vmoe-{keras_vmoe.__version__}.tar.gz"
    described = {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"}
    built = {"setup.py", "pyproject.toml", *tracked("keras_vmoe")}
    assert held >= described | built
    assert not {x for x in held if x.startswith(("build", "runs", "dist"))}


def tracked(folder):
    """The files of a folder that git knows."""
    listed = ["git", "ls-files", folder]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True)
    return set(done.stdout.decode().split())
