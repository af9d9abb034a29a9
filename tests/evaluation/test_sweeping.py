"""`sweep_routing`: every position against `measure` at that position."""

import numpy as np
import pytest

from keras_vmoe import evaluation
from keras_vmoe import models
from keras_vmoe.evaluation import sweeping
from tests.commands import run
from tests.commands import write_folder
from tests.harness import randomize
from tests.models.definitions import images_of
from tests.models.definitions import tiny

BATCHES = [(images_of(8), np.arange(8) % 10)]
SETTINGS = {"batch_priority": [False, True], "capacity_factor": [0.25, 4.0]}


@pytest.mark.backends("jax", "torch")
def test_every_position():
    model = randomize(tiny(moe={"num_selected_experts": 1}))
    rows = evaluation.sweep_routing(model, BATCHES, **SETTINGS)
    found = [(x["batch_priority"], x["capacity_factor"]) for x in rows]
    assert found == [(False, 0.25), (False, 4.0), (True, 0.25), (True, 4.0)]
    for row in rows:
        settings = {name: row[name] for name in SETTINGS}
        dial = models.set_routing(model, **settings)
        expected = evaluation.measure(dial, BATCHES)
        assert row["accuracy"] == expected.accuracy
        assert row["loss"] == pytest.approx(expected.loss, rel=1e-5)
        assert row["macs"] == models.cost(dial).macs
        assert row["images_per_s"] > 0
    assert rows[0]["macs"] < rows[1]["macs"]
    assert rows[0]["dropped_share"] > rows[1]["dropped_share"]
    table = sweeping.sweep_table(rows).split("\n")
    assert len(table) == 5 and table[0].split() == [
        "batch_priority", "capacity_factor", "accuracy", "loss", "MACs",
        "dropped", "images/s",
    ]  # fmt: skip
    (axis,) = sweeping.sweep_figure(rows).axes
    assert [x.get_label() for x in axis.lines] == [
        "batch_priority=False", "batch_priority=True",
    ]  # fmt: skip


@pytest.mark.backends("torch")
def test_what_does_not_fit():
    with pytest.raises(ValueError, match="MoE layers"):
        evaluation.sweep_routing(tiny(moe=None), BATCHES, **SETTINGS)
    with pytest.raises(ValueError, match="`capacity_factor` must be"):
        evaluation.sweep_routing(tiny(), BATCHES, capacity_factor=[1.0, -1])


@pytest.mark.backends("torch")
def test_the_command(trained, tmp_path):
    run_dir, _ = trained
    plot, table = tmp_path / "plot.png", tmp_path / "table.csv"
    done = run(
        "sweep", run_dir, "digits", "--split=test[:32]", "--batch_priority",
        "false", "true", "--capacity_factor", 0.5, 2,
        f"--plot={plot}", f"--csv={table}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split("\n")
    assert lines[0] == "data: digits, test[:32]"
    assert lines[2].split()[:2] == ["False", "0.5"]
    assert lines[5].split()[:2] == ["True", "2.0"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert table.read_text().count("\n") == 5
    factors = ("--capacity_factor", 0.5, "dropless", "--split=test[:8]")
    done = run("sweep", run_dir, "digits", *factors)
    assert done.stdout.split("\n")[3].split()[0] == "dropless"
    three = write_folder(tmp_path / "images", "abc", ("test",), 2)
    done = run("sweep", run_dir, "image_folder", three, "--capacity_factor=1")
    assert "a model of 10 classes for the 3" in done.stderr
    done = run("sweep", run_dir, "digits")
    assert done.returncode == 1
    assert "There must be values to combine" in done.stderr
