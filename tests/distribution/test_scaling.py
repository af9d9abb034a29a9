"""The plan of docs/scaling.md: one of its compiled steps."""

import json
import os
import pathlib
import subprocess
import sys

import keras
import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="ExpertParallel is JAX's"
)
def test_a_step_on_256_devices():
    flag = "--xla_force_host_platform_device_count=256"
    done = subprocess.run(
        [sys.executable, "benchmarks/scaling.py", "--one", "2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": flag},
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
