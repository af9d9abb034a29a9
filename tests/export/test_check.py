"""The folder, replayed without Keras, and the commands."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from keras_vmoe import export
from keras_vmoe import models
from keras_vmoe.cli import exporting
from keras_vmoe.export.replay import newest_version
from tests.commands import run
from tests.export import small
from tests.export import test_conversion


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run folder, and what the command made of it."""
    folder = tmp_path_factory.mktemp("run")
    models.save(small.MODELS["bpr"](), folder / "model.keras")
    names = str(list(small.CLASSES)).replace("'", '"')
    (folder / "classes.json").write_text(names)
    (folder / "result.json").write_text('{"accuracy": 0.25}')
    (folder / "config.yaml").write_text("test_crop: 0.5\npreset: null\n")
    done = run(
        "export", folder, folder / "served", "--warmup=[2]", "--signatures",
        "fast:capacity_factor=0.5,batch_priority=true", "--signatures",
        "same:", "--mean=[1,2,3]", "--std=64", "--max_pixels=4096",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"model: {folder / 'served' / '1'}\n")
    return folder


def test_serve_check(folder):
    done = run(
        "serve-check", folder / "served", "--model", folder, "--rounds=2"
    )
    assert done.returncode == 0, done.stderr
    assert "of which weights" in done.stdout
    for name in (*export.settings.STANDARD, "fast", "same"):
        assert f"\n{name} " in done.stdout


def test_what_the_command_wrote_down(folder):
    path = folder / "served" / "1" / "assets.extra" / "model_card.json"
    card = json.loads(path.read_text())
    assert card["preprocessing"] == {
        "mean": [1, 2, 3], "std": 64, "test_crop": 0.5, "max_pixels": 4096,
    }  # fmt: skip
    assert "test_accuracy" not in card  # Nobody measured it with this mean.
    assert card["channels"] == 3
    places = {
        name: {x["places_per_image"] for x in signature["routing"]}
        for name, signature in card["signatures"].items()
    }
    assert places["serving_default"] == places["same"] == {4 * 12}
    assert places["fast"] == {4 * 8}  # 17 tokens, K=2: 4.25, to a multiple.


def test_the_accuracy_of_a_run_that_is_preprocessed_as_before(folder):
    """Also where fewer files are decoded."""
    same = SimpleNamespace(
        model=folder, mean=127.5, std=127.5, test_crop=None, max_pixels=4096
    )
    card = exporting._card(same)
    assert card["test_accuracy"] == 0.25
    assert "not quantized" in card["test_accuracy_of"]
    for name, value in (("mean", 127.0), ("std", [1, 2, 3]), ("test_crop", 1)):
        other = SimpleNamespace(**{**vars(same), name: value})
        assert "test_accuracy" not in exporting._card(other)


def test_what_it_finds(folder):
    model = models.load(folder / "model.keras")
    checked = export.check(folder / "served", model, rounds=2)
    assert checked.folder == folder / "served" / "1" and checked.agrees
    assert 0 < checked.weight_bytes < checked.disk_bytes
    assert [x["batch"] for x in checked.requests] == [2] * 6
    for request in checked.requests:
        assert request["graph_bytes"] > 1e4 and request["ms"][1] > 0
        assert request["difference"] < 1e-5


def test_another_model_is_found_out(folder, tmp_path):
    model = models.load(folder / "model.keras")
    head = model.get_layer("head")
    head.bias.assign(np.array(head.bias) + 1e-3)
    assert not export.check(folder / "served" / "1", model, rounds=1).agrees
    models.save(model, tmp_path / "other.keras")
    done = run(
        "serve-check", folder / "served", "--rounds=1",
        "--model", tmp_path / "other.keras",
    )  # fmt: skip
    assert done.returncode == 1
    assert "must be those of the model" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rounds": 0}, "rounds=0"),
        ({"directory": 3}, "directory=3"),
        ({"model": "model.keras"}, "Load it by `models.load`"),
    ],
)
def test_bad_arguments(folder, arguments, words):
    with pytest.raises(ValueError, match=words):
        export.check(**{"directory": folder / "served", **arguments})


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("labels.txt", b"".join(b"%d\n" % i for i in range(10)), None),
        ("labels.txt", b"a\n", "with 1. Export it again"),
        ("model_card.json", b"{", "a model card must be whole"),
        ("model_card.json", b"{}", "a model card must be whole"),
        ("tf_serving_warmup_requests", bytes(7), "ends within one"),
        ("tf_serving_warmup_requests", b"\1" + bytes(16), "is damaged"),
    ],
)
def test_what_is_damaged_is_named(folder, tmp_path, name, content, words):
    shutil.copytree(folder / "served" / "1", tmp_path, dirs_exist_ok=True)
    (tmp_path / "assets.extra" / name).write_bytes(content)
    model = models.load(folder / "model.keras")
    if words is None:
        assert not export.check(tmp_path, model, rounds=1).agrees
        return
    with pytest.raises(ValueError, match=words):
        export.check(tmp_path, model, rounds=1)


def test_a_model_of_another_size(folder):
    other = models.ViTMoE(
        16, 4, 32, 2, 4, 64, 7,
        moe={"layers": [0, 1], "num_experts": 4, "num_selected_experts": 2},
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"\(2, 10\) for \(2, 7\)"):
        export.check(folder / "served", other, rounds=1)
    with pytest.raises(ValueError, match="cannot do what the signature 'fast'"):
        export.check(folder / "served", small.vit(), rounds=1)


def test_the_newest_version(tmp_path):
    with pytest.raises(FileNotFoundError, match="There must be a SavedModel"):
        export.check(tmp_path)
    for name in ("9", "10", "11.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "saved_model.pb").write_text("")
    assert newest_version(tmp_path) == tmp_path / "10"
    with pytest.raises(ValueError, match="must be able to load the folder"):
        export.check(tmp_path)


def test_exports_of_the_command(folder):
    done = run("export", folder, folder / "served")
    assert done.returncode == 1 and "Nothing is overwritten" in done.stderr
    done = run("export", folder, folder / "x", "--signatures", "fast=1")
    assert done.returncode == 1
    assert "NAME:SETTING=VALUE" in done.stderr
    done = run(
        "export", folder, folder / "x", "--signatures",
        "a:capacity_factor=1,capacity_factor=2",
    )  # fmt: skip
    assert done.returncode == 1 and "each setting once" in done.stderr
    done = run(
        "export", folder, folder / "x.onnx", "--format=onnx",
        "--signatures", "a:features=true",
    )  # fmt: skip
    assert done.returncode == 1 and "Only a SavedModel has" in done.stderr
    done = run("export", folder, folder / "x", "--num_selected_experts=1")
    assert done.returncode == 1
    assert "--signatures mine:num_selected_experts=1" in done.stderr
    done = run("export", folder, folder / "x", "--signatures", "a:input=[")
    assert done.returncode == 1 and "numbers, words" in done.stderr
    done = run("export", folder, folder / "x.onnx")
    assert done.returncode == 1 and "--format onnx" in done.stderr
    done = run("export", folder, folder / "x.onnx", "--format=onnx", "--std=2")
    assert done.returncode == 1 and "Only a SavedModel has std" in done.stderr


@small.IN_TENSORFLOW
@pytest.mark.slow
def test_a_file_by_the_command(folder, tmp_path):
    path = tmp_path / "a.tflite"
    done = run(
        "export", folder, path, "--format=litert", "--num_selected_experts=1",
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


@small.IN_TENSORFLOW
@pytest.mark.slow
def test_half_precision_and_features_are_checked(tmp_path):
    moe = {"layers": [1], "num_experts": 4}
    half = small.wild(
        models.ViTMoE(16, 4, 32, 2, 4, 64, 10, moe=moe, dtype="mixed_bfloat16")
    )
    export.saved_model(half, tmp_path / "half", warmup=[2])
    assert export.check(tmp_path / "half", half, rounds=1).agrees
    without, other = (
        small.wild(models.ViTMoE(16, 4, 32, 2, 4, 64, None, moe=moe))
        for _ in range(2)
    )
    other.get_layer("norm").beta.assign(np.ones(32))
    export.saved_model(without, tmp_path / "features", warmup=[2])
    for model, agrees in ((without, True), (other, False)):
        checked = export.check(tmp_path / "features", model, rounds=1)
        assert checked.agrees == agrees
        assert len(checked.requests) == 3


@small.IN_TENSORFLOW
@pytest.mark.slow
def test_small_experts_are_checked_as_such(tmp_path):
    model = small.vit(num_experts=8, hidden_dim=256, num_selected_experts=2)
    sizes = {}
    for version, kind in ((1, None), (2, "float16"), (3, "int8")):
        export.saved_model(
            model, tmp_path, version, warmup=[1], quantize_experts=kind
        )
        checked = export.check(tmp_path, model, rounds=1)
        assert checked.agrees
        sizes[kind] = checked.weight_bytes
    kernels = 4 * 2 * 2 * 8 * 32 * 256
    assert sizes[None] - sizes["float16"] > 0.98 * kernels / 2
    assert sizes[None] - sizes["int8"] > 0.95 * kernels * 3 / 4


@small.IN_TENSORFLOW
@pytest.mark.slow
def test_memory_of_the_loader(tmp_path):
    """At most 2.5 times the weights of 60 MB."""
    model = small.vit(num_experts=64, hidden_dim=1800)
    export.saved_model(model, tmp_path, warmup=[1])
    checked = export.check(tmp_path, rounds=1)
    assert checked.weight_bytes > 5.5e7
    assert checked.load_bytes < 2.5 * checked.weight_bytes
    assert checked.disk_bytes < 1.15 * checked.weight_bytes + 2e6
