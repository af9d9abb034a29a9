"""Routing statistics with the batch spread over several devices."""

import json
import os
import subprocess
import sys

import pytest


def history_on(devices):
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.layers.distributed_run", str(devices)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# Keras spreads no batch over devices with PyTorch.
@pytest.mark.backends("jax")
@pytest.mark.slow
def test_statistics_are_those_of_one_device():
    one, many = history_on(1), history_on(2)
    assert one.keys() == many.keys()
    assert one["moe/dropped_share"][0] > 0
    for name, values in one.items():
        if name != "loss":
            assert many[name] == pytest.approx(values, rel=1e-5), name
