"""Stopped runs that resume elsewhere, as if they had not stopped or moved."""

import functools
import json
import tempfile

import keras
import numpy as np
import pytest

from tests import processes

BACKEND = keras.backend.backend()
# PyTorch has one device, and `tests/training/test_resume.py`.
pytestmark = [pytest.mark.slow, pytest.mark.backends("jax", "tensorflow")]
ENDS = {
    "jax": ["whole", "resumed, two shards", "resumed, one device"],
    "tensorflow": ["whole", "resumed, mirrored"],
}.get(BACKEND, [])


@functools.cache
def runs():
    """The results of all runs, from a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        done = processes.run("-m", "tests.distribution.run_resumed", folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("end", ENDS)
def test_it_ends_as_one_device_would(end):
    """Losses, validation of an uneven split, weights and the test."""
    one, other = runs()["one"], runs()[end]
    np.testing.assert_allclose(other["history"], one["history"], atol=1e-5)
    for mine, theirs in zip(other["weights"], one["weights"], strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    assert other["test"] == one["test"]
    losses = [row[0] for row in one["history"]]
    assert len(losses) == 2 and losses[0] != losses[1]


def test_a_batch_without_whole_groups():
    devices = 8 if BACKEND == "jax" else 2
    words = f"batch_size=12 for {devices} devices, 4 images per group"
    assert words in runs()["refused"]
