"""`ablate`: each change by hand, and the weights are put back."""

import types

import numpy as np
import pytest
from keras import ops

from keras_vmoe import evaluation
from keras_vmoe import models
from keras_vmoe.evaluation import ablation
from tests.commands import run
from tests.harness import randomize
from tests.models.definitions import images_of
from tests.models.definitions import tiny

IMAGES, LABELS = images_of(24), np.arange(24) % 10


def accuracy_of(model):
    return evaluation.measure(model, [(IMAGES, LABELS)]).accuracy


@pytest.mark.backends("torch")
def test_every_change():
    model = randomize(tiny(moe={"num_selected_experts": 2}))
    before = [ops.convert_to_numpy(w).copy() for w in model.weights]
    rows = evaluation.ablate(model, [(IMAGES, LABELS)])
    for old, weight in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(old, ops.convert_to_numpy(weight))
    names = [(row["layer"], row["change"]) for row in rows]
    assert names[0] == ("", "as it is")
    assert names[1:5] == [
        ("block_1_moe", f"without expert {e}") for e in range(4)
    ]
    assert names[5] == ("block_1_moe", "random router")
    assert names[-4:] == [("", f"K={k}") for k in (1, 2, 3, 4)]
    assert len(rows) == 1 + 2 * 5 + 4
    first = rows[0]["accuracy"]
    assert first == accuracy_of(model)
    assert rows[-3]["accuracy"] == first, "K is 2"
    k = models.set_routing(model, num_selected_experts=1)
    assert rows[-4]["accuracy"] == accuracy_of(k)
    for row in rows:
        assert row["difference"] == pytest.approx(row["accuracy"] - first)
    bank = model.get_layer("block_3_moe").experts
    for weight in (bank.output_kernel, bank.output_bias):
        array = ops.convert_to_numpy(weight).copy()
        array[2] = 0
        weight.assign(array)
    expected = accuracy_of(model)
    (row,) = [x for x in rows if x["layer"] == "block_3_moe"
              and x["change"] == "without expert 2"]  # fmt: skip
    assert row["accuracy"] == expected


@pytest.mark.backends("torch")
@pytest.mark.parametrize(
    "moe",
    [
        {"router": "soft", "images_per_group": None, "num_slots": 1},
        {"gate": "cosine"},
        {"gate": "l2"},
    ],
)
def test_gates_with_a_scale(moe):
    model = randomize(tiny(moe=moe))
    rows = evaluation.ablate(
        model, [(IMAGES, LABELS)], layers="block_3_moe", max_images=2
    )
    assert {row["layer"] for row in rows} == {"", "block_3_moe"}
    assert all((2 * row["accuracy"]) % 1 == 0 for row in rows), "two images"


@pytest.mark.backends("torch")
def test_a_frozen_router_is_random_too(monkeypatch):
    model = randomize(tiny())
    model.trainable = False
    kernel = model.get_layer("block_3_moe").router.gate_layer.kernel
    seen = []

    def measure(*args, **kwargs):
        seen.append(ops.convert_to_numpy(kernel).copy())
        return types.SimpleNamespace(accuracy=0.0)

    monkeypatch.setattr(ablation, "measure", measure)
    rows = evaluation.ablate(model, [], layers="block_3_moe")
    at = [row["change"] for row in rows].index("random router")
    assert (seen[at] != seen[0]).any()
    np.testing.assert_array_equal(
        np.sort(seen[at].ravel()), np.sort(seen[0].ravel())
    )
    np.testing.assert_array_equal(seen[-1], seen[0])


@pytest.mark.backends("torch")
def test_a_dense_model():
    with pytest.raises(ValueError, match="without any"):
        evaluation.ablate(tiny(moe=None), [])


@pytest.mark.backends("torch")
def test_weights_are_put_back_after_an_error():
    model = randomize(tiny())
    before = [ops.convert_to_numpy(w).copy() for w in model.weights]
    images = iter([[(IMAGES, LABELS)], [(IMAGES, LABELS)]])

    class Once:
        def __iter__(self):
            return iter(next(images))

    with pytest.raises(Exception, match=".*"):  # noqa: B017, PT011
        evaluation.ablate(model, Once())
    for old, weight in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(old, ops.convert_to_numpy(weight))


@pytest.mark.backends("torch")
def test_the_command(trained, tmp_path):
    run_dir, _ = trained
    output = tmp_path / "report"
    done = run("inspect", run_dir, "--ablations", f"--output={output}")
    assert done.returncode == 0, done.stderr
    assert "block_0_moe  without expert 3" in done.stdout
    lines = (output / "ablations.csv").read_text().split("\n")
    assert len(lines) == 2 + 1 + 5 + 4
    done = run("inspect", run_dir, "--ablations", "--images", "a.png")
    assert done.returncode == 1 and "--images with --ablations" in done.stderr


@pytest.mark.backends("torch")
def test_a_removed_expert_gives_nothing_at_all(monkeypatch):
    """Neither kernel nor bias of it is left while it is measured."""
    model, seen = randomize(tiny()), []

    def look(changed, *_, **__):
        bank = changed.get_layer("block_1_moe").experts
        weights = map(
            ops.convert_to_numpy, (bank.output_kernel, bank.output_bias)
        )
        left = [np.abs(w).reshape(4, -1).max(axis=1) > 0 for w in weights]
        seen.append(np.stack(left).any(axis=0).tolist())
        return types.SimpleNamespace(accuracy=0.0)

    monkeypatch.setattr(ablation, "measure", look)
    evaluation.ablate(model, [])
    assert seen[0] == [True] * 4
    assert seen[1:5] == [[e != i for i in range(4)] for e in range(4)]
