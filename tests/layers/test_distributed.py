"""Routing statistics with the batch spread over several devices."""

import json

import pytest

from tests import processes


def history_on(devices):
    done = processes.run("-m", "tests.layers.distributed_run", devices)
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
