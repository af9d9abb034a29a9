"""Processes, killed by the system while they train and write.

A file of its own: it takes minutes, and the other worker runs the rest.
"""

import contextlib
import itertools
import math
import os
import random
import signal
import time

import numpy as np
import pytest

from keras_vmoe import models
from keras_vmoe import training
from keras_vmoe.training.checkpointing import Checkpoints
from tests import processes
from tests.training.small import config_of

pytestmark = pytest.mark.backends("jax")

# More of them: make test-kills KILLS=60
KILLS = int(os.environ.get("KILLS", 3))
EPOCHS = max(20, 4 * KILLS)  # A process lives for few of them.
# On a slow disk, or few kills would hit a write.
SCRIPT = """
import os, sys, time
fsync = os.fsync
os.fsync = lambda file: (time.sleep(0.03), fsync(file))
from keras_vmoe import training
from tests.training.small import config_of
training.train(config_of(sys.argv[1], sys.argv[2], epochs=int(sys.argv[3])))
"""


@pytest.mark.slow
def test_kills_at_random_moments(tmp_path, cache):
    """In a write, anywhere from the start on, and behind a checkpoint."""
    whole = training.train(config_of(tmp_path / "whole", cache, epochs=EPOCHS))
    run_dir, moments = tmp_path / "killed", random.Random(0)
    folder = run_dir / "checkpoints"
    kinds = itertools.cycle((in_a_write, behind_a_checkpoint, at_any_moment))
    hits, start_up = 0, math.inf
    for wait in itertools.islice(kinds, KILLS):
        before, start = written(folder), time.monotonic()
        process = train_in_a_process(run_dir, cache)
        wait(process, folder, moments, start_up)
        if wait is not at_any_moment:  # The first of them has to compile.
            start_up = min(start_up, time.monotonic() - start)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL  # And had not ended before.
        hits += written(folder) not in (None, before)
    assert hits >= -(-KILLS // 3)
    process = train_in_a_process(run_dir, cache)
    assert process.wait() == 0
    saved = models.load(run_dir / "model.keras")
    for mine, theirs in zip(saved.weights, whole.model.weights, strict=True):
        np.testing.assert_array_equal(np.array(mine), np.array(theirs))


def train_in_a_process(run_dir, cache):
    with open(os.devnull, "w") as nowhere:
        return processes.Process(
            "-c", SCRIPT, run_dir, cache, EPOCHS, output=nowhere
        )


def in_a_write(process, folder, moments, start_up):
    """Waits until a checkpoint is half written, and holds the process there."""
    before = written(folder)  # By a process that was killed.
    while process.poll() is None:
        if written(folder) not in (None, before):
            time.sleep(moments.uniform(0.0, 0.02))
            process.send_signal(signal.SIGSTOP)
            process.wait_until_stopped()
            if written(folder) not in (None, before):
                return
            process.send_signal(signal.SIGCONT)
        time.sleep(0.001)


def at_any_moment(process, folder, moments, start_up):
    """From its start to the first checkpoint or a little behind."""
    time.sleep(moments.uniform(0.0, 1.1 * start_up))


def behind_a_checkpoint(process, folder, moments, start_up):
    """Waits for one more, and for a step or two."""
    checkpoints = Checkpoints(folder)
    before = max(checkpoints.epochs(), default=0)
    while process.poll() is None:
        if max(checkpoints.epochs(), default=0) > before:
            break
        time.sleep(0.01)
    time.sleep(moments.uniform(0.0, 0.4))


def written(folder):
    """The half-written file of weights and its time; None without one."""
    for path in folder.glob(".partial.epoch_*.weights.h5"):
        with contextlib.suppress(FileNotFoundError):  # It has its name now.
            return path.name, path.stat().st_mtime_ns
    return None
