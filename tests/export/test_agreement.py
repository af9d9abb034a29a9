"""One check for all formats: only what agrees with the model is written."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest

from keras_vmoe import export
from keras_vmoe import models
from keras_vmoe.export import agreement
from keras_vmoe.export.contents import newest_version
from keras_vmoe.export.settings import Settings
from keras_vmoe.export.settings import Signature
from tests.export import replay
from tests.export import small

pytestmark = pytest.mark.backends("torch")
ALONE = {"serving_default": Signature(images_per_group=1)}
FAST = Signature(images_per_group=1, **small.FAST)
NAMED = Settings(ALONE, class_names=tuple("abc"))


def answer(logits):
    """What a signature says of images with these logits."""
    logits = np.array(logits, "float32")
    return {"logits": logits, **agreement._derived(logits, NAMED)}


def distances(given, right):
    right = {"logits": np.array(right, "float32")}
    return agreement._distances("s", given, right, NAMED)


def test_distances_of_images():
    """Relative to the largest number of the model's answers."""
    right = [[0, 1, 2], [8, 0, 0]]
    assert distances(answer(right), right).tolist() == [0, 0]
    found = distances(answer([[0, 1, 2.4], [8, 0, 0]]), right)
    np.testing.assert_allclose(found, [0.05, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("class_id", [2, 1]),
        ("class_name", [b"c", b"b"]),
        ("probabilities", [[0.09, 0.245, 0.665], [0, 0, 1]]),
    ],
)
def test_an_answer_fits_its_own_logits(name, value):
    right = [[0, 1, 2], [8, 0, 0]]
    given = {**answer(right), name: np.array(value)}
    given[name] = given[name].astype(answer(right)[name].dtype)
    found = distances(given, right)
    assert found[0] < 1e-3 and found[1] > 0.9


def test_answers_without_a_number_and_of_another_shape():
    with pytest.raises(ValueError, match="NaN or infinity from 's'"):
        distances(answer([[np.nan, 1, 2]]), [[0, 1, 2]])
    with pytest.raises(ValueError, match=r"shape \(1, 3\) instead of \(1, 2\)"):
        distances(answer([[0, 1, 2]]), [[0, 1]])


def fake(monkeypatch, change):
    """Lets a model of the test be what is asked, with changed answers."""

    def ask(path, signatures, probes):
        (batches,) = probes.values()
        answers = [{"logits": small.logits(path, x)} for x in batches]
        change(answers)
        return {"serving_default": answers}

    monkeypatch.setattr(agreement, "ask", ask)


def far(index, images, by=1.0):
    def change(answers):
        answers[index]["logits"][images] += by

    return change


@pytest.fixture(scope="module")
def linear():
    """A model that is computed in no time."""
    layers = [keras.layers.Flatten(), keras.layers.Dense(10)]
    return keras.Sequential([keras.Input((16, 16, 3)), *layers])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (far(0, slice(0, 0)), None),
        (far(0, slice(1, 3)), None),  # Half of the images agree.
        (far(0, slice(1, 4)), "must reproduce the model's outputs"),
        (far(0, slice(0, 1)), "must not depend on its batch mates"),
        (far(1, slice(0, 1), 1e-3), "must not depend on its batch mates"),
        (far(2, slice(0, 1)), None),
        (lambda x: [far(i, slice(0, 1))(x) for i in (2, 3)], "must reproduce"),
        (far(0, slice(0, 1), np.nan), "NaN or infinity"),
    ],
)
def test_which_images_must_agree(change, words, linear, monkeypatch):
    fake(monkeypatch, change)
    if words is None:
        found = agreement.agree(linear, linear, Settings(ALONE))
        assert 0 <= found["serving_default"] < 1e-5
        return
    with pytest.raises(ValueError, match=words):
        agreement.agree(linear, linear, Settings(ALONE))


def test_another_model_is_found_out(model, monkeypatch):
    """Of other routing, of another bias."""
    fake(monkeypatch, lambda answers: None)
    routed = small.alone(model)
    settings = Settings({"serving_default": FAST})
    with pytest.raises(ValueError, match="must reproduce the model's outputs"):
        agreement.agree(routed, model, settings)
    other = small.vit(num_selected_experts=2)
    head = other.get_layer("head")
    head.bias.assign(np.array(keras.ops.convert_to_numpy(head.bias)) + 1e-3)
    with pytest.raises(ValueError, match="must reproduce the model's outputs"):
        agreement.agree(small.alone(other), model, Settings(ALONE))


def test_probes():
    """The first image is the same in all batches but the last."""
    settings = Settings({"float": Signature(), "jpeg": Signature("encoded")})
    for probes in agreement.make_probes(settings, (16, 16, 3)).values():
        images, mixed, first, second = probes
        assert len(images) == len(mixed) == 4
        assert np.array_equal(images[:1], mixed[:1])
        assert not np.array_equal(images[1:], mixed[1:])
        assert np.array_equal(images[:1], first)
        assert np.array_equal(images[1:2], second)
    few = dataclasses.replace(settings, max_batch_size=1)
    lengths = [len(x) for x in agreement.make_probes(few, (16, 16, 3))["float"]]
    assert lengths == [1, 1, 1]


@small.IN_TENSORFLOW
def test_what_cannot_be_loaded(tmp_path):
    path = tmp_path / "a.onnx"  # The runtime that is imported fastest.
    path.write_bytes(b"none")
    probes = {"serving_default": [small.images(1)]}
    with pytest.raises(ValueError, match="must load and answer in a process"):
        agreement.ask(path, ALONE, probes)


def test_the_newest_version(tmp_path):
    assert newest_version(tmp_path) is None
    for name in ("9", "10", "11.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "saved_model.pb").write_text("")
    assert newest_version(tmp_path) == tmp_path / "10"


@small.IN_TENSORFLOW
@small.ASKED_HERE
@pytest.mark.slow
def test_half_precision_and_features_agree(tmp_path):
    moe = {"layers": [1], "num_experts": 4}
    half = small.wild(
        models.ViTMoE(16, 4, 32, 2, 4, 64, 10, moe=moe, dtype="mixed_bfloat16")
    )
    path = export.saved_model(half, tmp_path / "half", warmup=False)
    assert (path / "saved_model.pb").exists()
    settings = Settings({"serving_default": Signature()})
    without = models.ViTMoE(16, 4, 32, 2, 4, 64, None, moe=moe)
    _, tolerance, _ = agreement._right(
        half, Signature(), settings, small.images(1), {}
    )
    assert tolerance == agreement.TOLERANCES["16 bits"]
    right, tolerance, _ = agreement._right(
        without, Signature(), settings, small.images(1), {}
    )
    assert tolerance == agreement.TOLERANCES["CPU"]
    assert right["features"].shape == (1, 32) and "logits" not in right


@small.IN_TENSORFLOW
@small.ASKED_HERE
@pytest.mark.slow
def test_quantized_experts_agree_as_such(tmp_path):
    model = small.vit(num_experts=8, hidden_dim=256, num_selected_experts=2)
    sizes = {}
    for version, kind in ((1, None), (2, "float16"), (3, "int8")):
        path = export.saved_model(
            model, tmp_path, version, warmup=False, quantize_experts=kind
        )
        files = (path / "variables").iterdir()
        sizes[kind] = sum(x.stat().st_size for x in files)
    kernels = 4 * 2 * 8 * 32 * 256
    assert sizes[None] - sizes["float16"] > 0.98 * kernels / 2
    assert sizes[None] - sizes["int8"] > 0.95 * kernels * 3 / 4


@small.IN_TENSORFLOW
@small.ASKED_HERE
@pytest.mark.slow
def test_the_loader_in_a_process_without_keras(tmp_path):
    """At most 2.5 times the weights of 60 MB; warm-up requests are answered."""
    model = small.vit(num_experts=64, hidden_dim=3600)
    folder = export.saved_model(model, tmp_path, warmup=[1])
    weights = sum(x.stat().st_size for x in (folder / "variables").iterdir())
    assert weights > 5.5e7
    disk = sum(x.stat().st_size for x in folder.rglob("*") if x.is_file())
    assert disk < 1.15 * weights + 2e6
    command = [sys.executable, replay.__file__, str(folder), "--rounds=1"]
    done = subprocess.run(
        [*command, "--save", str(tmp_path / "answers.npz")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["load_bytes"] < 2.5 * weights
    assert [x["batch"] for x in facts["requests"]] == [1] * 4
    (_, inputs), *_ = replay.read_requests(pathlib.Path(folder))
    right = small.logits(small.alone(model), inputs["images"])
    with np.load(tmp_path / "answers.npz") as answers:
        np.testing.assert_allclose(
            answers["0/logits"], right, atol=1e-5 * np.abs(right).max()
        )
