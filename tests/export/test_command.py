"""`keras-vmoe export`."""

import json

import numpy as np
import pytest

from keras_vmoe import data
from keras_vmoe import models
from keras_vmoe.cli import exporting
from tests.commands import run
from tests.export import small
from tests.export import test_conversion

pytestmark = pytest.mark.backends("torch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run folder."""
    folder = tmp_path_factory.mktemp("run")
    models.save(small.MODELS["bpr"](), folder / "model.keras")
    names = str(list(small.CLASSES)).replace("'", '"')
    (folder / "classes.json").write_text(names)
    (folder / "result.json").write_text('{"accuracy": 0.25}')
    (folder / "config.yaml").write_text("test_crop: 0.5\npreset: null\n")
    return folder


@small.IN_TENSORFLOW
@small.ASKED_HERE
def test_what_the_command_writes_down(folder):
    done = run(
        "export", folder, folder / "served", "--warmup=[2]", "--signatures",
        "fast:capacity_factor=0.5,batch_priority=true", "--signatures",
        "same:", "--mean=[1,2,3]", "--std=64", "--max_pixels=4096",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"model: {folder / 'served' / '1'}\n"
    path = folder / "served" / "1" / "assets.extra" / "model_card.json"
    card = json.loads(path.read_text())
    assert card["preprocessing"] == {
        "mean": [1, 2, 3], "std": 64, "test_crop": 0.5, "channels": 3,
        "interpolation": "bilinear", "exif_orientation": True,
    }  # fmt: skip
    assert card["max_pixels"] == 4096
    assert "test_accuracy" not in card  # Nobody measured it with this mean.
    assert card["channels"] == 3
    names = path.with_name("labels.txt").read_text().split()
    assert tuple(names) == small.CLASSES
    slots = {
        name: {x["slots_per_image"] for x in signature["routing"]}
        for name, signature in card["signatures"].items()
    }
    assert slots["serving_default"] == slots["same"] == {4 * 12}
    assert slots["fast"] == {4 * 8}  # 17 tokens, K=2: 4.25, to a multiple.
    done = run("export", folder, folder / "served")
    assert done.returncode == 1 and "Nothing is overwritten" in done.stderr


def test_the_accuracy_of_a_run_that_is_preprocessed_as_before(folder):
    tested = data.Preprocessing(test_crop=0.5)
    card = exporting._card(folder, data.Preprocessing(test_crop=0.5), tested)
    assert card["test_accuracy"] == 0.25
    assert "not quantized" in card["test_accuracy_of"]
    for name, value in (("mean", 127.0), ("std", [1, 2, 3]), ("test_crop", 1)):
        other = data.Preprocessing(**{"test_crop": 0.5, name: value})
        assert "test_accuracy" not in exporting._card(folder, other, tested)


@pytest.mark.parametrize(
    ("output", "arguments", "words"),
    [
        ("x", ["--signatures", "fast=1"], "NAME:SETTING=VALUE"),
        (
            "x",
            ["--signatures", "a:capacity_factor=1,capacity_factor=2"],
            "each setting once",
        ),
        (
            "x.onnx",
            ["--format=onnx", "--signatures", "a:features=true"],
            "Only a SavedModel has signatures",
        ),
        (
            "x",
            ["--num_selected_experts=1"],
            "--signatures mine:num_selected_experts=1",
        ),
        ("x", ["--signatures", "a:input=["], "numbers, words"),
        ("x.onnx", ["--format=saved_model"], "Choose another name"),
        ("x.xyz", [], "must end in .onnx or .tflite, and that"),
        ("x.onnx", ["--std=2"], "Only a SavedModel has std"),
    ],
)
def test_what_the_command_refuses(folder, output, arguments, words):
    done = run("export", folder, folder / output, *arguments)
    assert done.returncode == 1 and words in done.stderr
    assert not (folder / output).exists()


def test_a_folder_may_end_in_a_version():
    assert exporting._format_of("served/digits-1.2") == "saved_model"


@small.IN_TENSORFLOW
@pytest.mark.slow
def test_a_file_by_the_command(folder, tmp_path):
    path = tmp_path / "a.tflite"
    done = run(
        "export", folder, path, "--num_selected_experts=1",
        "--batch_priority=false", "--capacity_factor=0.5",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    model = small.alone(
        models.load(folder / "model.keras"),
        num_selected_experts=1,
        batch_priority=False,
        capacity_factor=0.5,
    )
    right = small.logits(model, small.images(3))
    given = test_conversion.run(path, small.images(3))
    np.testing.assert_allclose(given, right, atol=1e-5 * np.abs(right).max())
