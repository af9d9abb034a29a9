"""Several processes, by loopback: the arithmetic of one, errors, a death."""

import csv
import json
import re
import signal
import socket
import time

import keras
import numpy as np
import pytest

from keras_vmoe import distribution
from keras_vmoe import models
from keras_vmoe.distribution import _processes
from keras_vmoe.training.checkpointing import UNFINISHED
from keras_vmoe.training.checkpointing import Checkpoints
from tests import devices
from tests.processes import Process

BACKEND = keras.backend.backend()
IS_JAX = BACKEND == "jax"
SMALL = """
--model.image_size 8 --model.patch_size 4 --model.hidden_dim 16
--model.num_layers 2 --model.num_heads 2 --model.mlp_dim 32 --moe.layers last_1
--moe.num_experts 4 --moe.images_per_group 2 --batch_size 32
--train_split train[:128] --validation_split validation[:64]
--test_split test[:50]
""".split()


def start(arguments, count, **environment):
    """A process with some virtual devices."""
    return Process(
        "-m", *arguments, XLA_FLAGS=devices.flags(count), **environment
    )


def free_address():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return f"localhost:{server.getsockname()[1]}"


def train(run_dir, *arguments, count=8):
    """`keras-vmoe train` in one process."""
    command = ["keras_vmoe.cli", "train", "--run_dir", str(run_dir), *SMALL]
    return start([*command, *arguments], count)


def train_on_two(run_dir, *arguments):
    """The same in two."""
    common = ["--job_addresses", free_address(), "--num_processes", "2"]
    common += ["--distribution", "expert_parallel", *arguments]
    return [train(run_dir, *common, "--process_id", i, count=4) for i in "01"]


def output_of(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out + err


@pytest.mark.slow
@pytest.mark.backends("jax")
def test_the_arithmetic_is_that_of_one_process(tmp_path):
    address, results = free_address(), {}
    for count in (1, 2):
        name = "tests.distribution.run_processes"
        processes = [
            start([name, address, f"{count}", f"{i}", str(tmp_path)], 1)
            for i in range(count)
        ]
        lines = [output_of(p).splitlines() for p in processes]
        found = [
            next(json.loads(x) for x in out if x.startswith("{"))
            for out in lines
        ]
        assert all(result == found[0] for result in found)
        results[count] = found[0]
    assert len(results[2]["drawn"]) == 4  # The same in both, see above.
    one, two = results[1], results[2]
    for name in ("losses", "accuracy", "test", "load"):
        np.testing.assert_allclose(two[name], one[name], atol=1e-5)
    for words in (two["errors"], two["dense"]):
        assert "a short one would deadlock them" in words["short"]
        assert "number: 1 in process 0, 2 in process 1" in words["unequal"]
        assert "a dataset of unknown cardinality" in words["unknown"]
        for name in ("arrays", "generator"):
            assert "must be provided as a `tf.data.Dataset`" in words[name]
    assert "keras: '3.0' in process 0, '3.1' in process 1" in two["versions"]
    files = [models.load(tmp_path / f"{count}.keras") for count in (1, 2)]
    for mine, theirs in zip(*(x.variables for x in files), strict=True):
        np.testing.assert_allclose(mine.numpy(), theirs.numpy(), atol=1e-5)


# What JAX says of it, or the exchange that the other was to take part in.
LOST = r"JAX distributed service|coordination service|[Gg]loo"


def error_within_a_minute(process):
    """What a process says at its end, which must come soon."""
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    return err


@pytest.mark.slow
@pytest.mark.backends("jax")
def test_a_process_dies_and_the_run_goes_on(tmp_path):
    """While both save; the other stops with an error, one ends the run."""
    run_dir = tmp_path / "run"
    board = ["--tensorboard", "true"]
    first, second = train_on_two(run_dir, "--epochs", "12", *board)
    checkpoints = Checkpoints(run_dir / "checkpoints")
    while first.poll() is None:
        unfinished = list(checkpoints.folder.glob(UNFINISHED))
        if checkpoints.epochs() and unfinished:
            break
        time.sleep(0.005)
    second.send_signal(signal.SIGKILL)
    assert re.search(LOST, error_within_a_minute(first))
    assert unfinished[0].exists()
    done = max(checkpoints.epochs())
    assert done < 12 and not (run_dir / "result.json").exists()

    # What it ends as elsewhere: see `test_resumed.py`.
    text = output_of(train(run_dir, "--epochs", "12", count=1))
    assert f"resumed after epoch {done}" in text
    with open(run_dir / "history.csv", newline="") as file:
        epochs = [int(row["epoch"]) for row in csv.DictReader(file)]
    assert epochs == list(range(1, 13))
    assert (run_dir / "result.json").exists()


PROGRAM = """
import sys
from keras_vmoe import cli, training
from keras_vmoe.distribution import _processes
def train(config):
    {}
training.train = train
sys.exit(cli.main(sys.argv[1:]))
"""
ONE_FAILS = """
    if _processes.process_id() == 1:
        raise ValueError("only here")
    _processes.check_agreement("nothing", number=1)
"""
FOR_EVER = """
    while True:
        _processes.check_agreement("nothing", number=1)
        print("together", flush=True)
"""


def command_on_two(tmp_path, train):
    """`keras-vmoe train` in two processes, with something else as training.

    They know of each other by Keras's variables, without a flag.
    """
    (tmp_path / "program.py").write_text(PROGRAM.format(train.strip()))
    start = "KERAS_DISTRIBUTION_"
    common = {f"{start}JOB_ADDRESSES": free_address()}
    common[f"{start}NUM_PROCESSES"] = "2"
    return [
        Process(
            "program.py",
            "train",
            cwd=tmp_path,
            **common,
            **{f"{start}PROCESS_ID": i},
        )
        for i in "01"
    ]


@pytest.mark.slow
@pytest.mark.backends("jax")
def test_the_first_process_dies(tmp_path):
    """The one that all others talk to."""
    first, second = command_on_two(tmp_path, FOR_EVER)
    while first.stdout.readline() not in ("together\n", ""):
        pass
    first.send_signal(signal.SIGKILL)
    assert re.search(LOST, error_within_a_minute(second))
    first.communicate()


@pytest.mark.slow
@pytest.mark.backends("jax")
def test_an_error_in_one_process_ends_all(tmp_path):
    processes = command_on_two(tmp_path, ONE_FAILS)
    errors = [process.communicate(timeout=150)[1] for process in processes]
    assert all(process.returncode for process in processes)
    assert "keras-vmoe: error: only here" in errors[1]


@pytest.mark.slow
@pytest.mark.backends("jax")
def test_a_stopped_run_goes_on_in_two_processes(tmp_path):
    address = free_address()
    command = ["tests.distribution.run_two", address]
    both = [start([*command, i, str(tmp_path)], 2) for i in "01"]
    said = [output_of(process).splitlines() for process in both]
    assert "resumed after epoch 1" in said[0]
    for lines in said:
        found = next(json.loads(x) for x in lines if x.startswith("{"))
        words = "weight_decay: 0.3 in process 0, 0.1 in process 1"
        assert words in found["refused"]
        assert len(found["whole"]) == 2
        np.testing.assert_allclose(found["resumed"], found["whole"], atol=1e-5)
        assert max(found["growth"]) < 4  # A copy of its parts has 8.
    assert not (tmp_path / "refused").exists()
    one, other = (
        models.load(tmp_path / name / "model.keras").weights
        for name in ("whole", "stopped")
    )
    for mine, theirs in zip(one, other, strict=True):
        np.testing.assert_allclose(mine.numpy(), theirs.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((None, 2, 0), "job_addresses=None, num_processes=2"),
        (("localhost", 2, 0), "the address of the first as host:port"),
        (("localhost:1", 2, 2), "process_id=2"),
    ],
)
def test_what_a_process_must_know(arguments, words):
    if not IS_JAX:
        words = "Several processes need the JAX backend. Received: job_"
    with pytest.raises(ValueError, match=words):
        distribution.initialize(*arguments)


@pytest.fixture
def two(monkeypatch):
    """Lets this process seem the first of two; the other's values differ."""

    def with_values(**others):
        monkeypatch.setattr(
            _processes, "_gather", lambda values: [values, {**values, **others}]
        )

    return with_values


def test_a_seed_that_not_all_have(two):
    two(seed=7)  # This one's is 0, as for all tests.
    with pytest.raises(ValueError, match="the same seed. Received: seed: 0 in"):
        _processes._agree_on_a_seed()


@pytest.mark.parametrize("name", ["keras_vmoe", "keras", BACKEND])
def test_other_versions(two, name):
    two(**{name: "0.0 (other)"})
    words = f"the same code. Received: {name}: '.*' in process 0, '0.0 .other"
    with pytest.raises(ValueError, match=words):
        _processes.check_agreement("code", **_processes.versions())


def test_a_value_that_only_another_has(two):
    two(jax="0.1")
    with pytest.raises(ValueError, match="jax: 'absent' in process 0, '0.1'"):
        _processes.check_agreement("code", keras="3")


def test_one_process(monkeypatch):
    distribution.initialize()
    assert _processes.num_processes() == 1
    assert _processes.is_first_process()
    monkeypatch.setenv("KERAS_DISTRIBUTION_NUM_PROCESSES", "many")
    with pytest.raises(ValueError, match="num_processes='many'"):
        distribution.initialize()
