"""The plan of docs/scaling.md: its arithmetic, and a compiled step."""

import csv
import importlib
import json
import pathlib

import pytest

from tests import devices
from tests import processes

pytestmark = pytest.mark.backends("jax")

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def scaling(monkeypatch):
    """The benchmark, which imports its neighbors."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("scaling")


def test_dense_gradients_are_summed_island_by_island(scaling):
    """16 devices in islands of 4 sum 8 GB, a quarter of it between them."""
    machine = scaling.Machine(peak=1, near=1, island=4, far=1)
    sums = {"dense": 8e9, "experts": 0}
    near, far = scaling.sent(machine, 16, 4, 0, sums)
    assert near == pytest.approx(2 * 8 * 3 / 4)
    assert far == pytest.approx(2 * 8 / 4 * 3 / 4)


def test_experts_and_tokens_leave_the_island_where_they_must(scaling):
    """8 shards lie in two islands of 4; replicas of an expert in two others."""
    machine = scaling.Machine(peak=1, near=1, island=4, far=1)
    sums = {"dense": 0, "experts": 3e9}
    near, far = scaling.sent(machine, 16, 8, 8e9, sums)
    assert near == pytest.approx(3)
    assert far == pytest.approx(4 + 3)  # Tokens, and one ring of two.
    assert scaling.sent(machine, 4, 2, 0, sums) == (pytest.approx(3), 0)


def test_no_figure_beyond_a_slice(scaling):
    v5e = scaling.MACHINES["TPU v5e"]
    sums = {"dense": 1e9, "experts": 1e9}
    for count in (256, 512):
        near, far = scaling.sent(v5e, count, 32, 1e9, sums)
        figure = scaling.ratio(v5e, near, far, 1.0)
        assert (figure is None) == (count == 512)


@pytest.mark.parametrize("name", ["scaling", "scaling_compiled"])
def test_tables_say_what_made_them(name):
    path = ROOT / "benchmarks" / "results" / f"{name}.csv"
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            assert "jax" in row["versions"] and row["hardware"]


@pytest.mark.slow
def test_a_step_on_256_devices():
    done = processes.run(
        "benchmarks/scaling.py", "--one", 2, XLA_FLAGS=devices.flags(256)
    )
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["devices"] == 256 and row["all-to-alls"] == 4
    assert row["their buffers (GB)"] == pytest.approx(
        row["by arithmetic"], rel=0.01
    )
    assert row["summed (GB)"] == pytest.approx(row["gradients (GB)"], rel=0.01)
    assert row["all-gathers"] == row["collective-permutes"] == 0
    held = row["weights and slots (GB)"]
    assert held <= row["arguments (GB)"] <= held + 0.01  # And the images.
    estimate = row["activations (GB)"] + row["gradients (GB)"]
    assert 1 < row["XLA's temporaries (GB)"] / estimate < 1.7
