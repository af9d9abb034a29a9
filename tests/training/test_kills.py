"""Processes, killed by the system while they train and write.

A file of its own: it takes minutes, and the other worker runs the rest.
"""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from keras_vmoe import models
from keras_vmoe import training
from keras_vmoe.training.checkpointing import Checkpoints
from tests.training.test_resume import EXACT
from tests.training.test_resume import config_of

KILLS = 20 if EXACT else 3
SCRIPT = """
import dataclasses, json, sys
from keras_vmoe import training
from tests.training.test_resume import config_of
training.train(config_of(sys.argv[1], sys.argv[2], epochs=int(sys.argv[3])))
"""


@pytest.mark.slow
def test_kills_at_random_moments(tmp_path, cache):
    """Processes, killed by the system while they train and write."""
    whole = training.train(config_of(tmp_path / "whole", cache, epochs=60))
    run_dir = tmp_path / "killed"
    command = [sys.executable, "-c", SCRIPT, str(run_dir), cache, "60"]
    root = pathlib.Path(__file__).parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        # Twenty starts need not compile twenty times.
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    moments, kills = random.Random(0), 0
    while not (run_dir / "result.json").exists():
        process = subprocess.Popen(
            command,
            cwd=root,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        if kills < KILLS:
            wait_for_a_checkpoint(process, run_dir)
            time.sleep(moments.uniform(0.0, 0.4))
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
        else:
            assert process.wait() == 0
    assert kills == KILLS
    saved = models.load(run_dir / "model.keras")
    for mine, theirs in zip(saved.weights, whole.model.weights, strict=True):
        if EXACT:
            np.testing.assert_array_equal(np.array(mine), np.array(theirs))
        else:
            np.testing.assert_allclose(
                np.array(mine), np.array(theirs), atol=1e-3
            )


def wait_for_a_checkpoint(process, run_dir):
    """Waits until the process has written one more."""
    before = newest(run_dir)
    while process.poll() is None and newest(run_dir) == before:
        time.sleep(0.01)


def newest(run_dir):
    return max(Checkpoints(run_dir / "checkpoints").epochs(), default=None)
