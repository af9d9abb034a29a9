"""Experts, or data alone, over several devices: the arithmetic of one."""

import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import keras
import numpy as np
import pytest

from keras_vmoe import distribution
from keras_vmoe import models

IS_JAX = keras.backend.backend() == "jax"
SHARDS = [1, 2, 4, 8]
OPTIONS = [
    ("vit",),
    ("vit", "--noise"),
    ("convnext",),
    ("convnext", "--noise"),
    ("vit", "--router", "expert_choice"),
    ("vit", "--router", "soft"),
    ("vit", "--shard_dense"),
]
RUNS = [  # Other backends refuse it, see below.
    pytest.param(options, marks=pytest.mark.slow)
    for options in (OPTIONS if IS_JAX else [])
]


def shards_of(options):
    """All numbers of shards, but one for what differs in one option."""
    return SHARDS if len(options) == 1 else [4]


FOLDER = tempfile.TemporaryDirectory()


@functools.cache
def run(*options):
    """The results of a process of its own, which has eight devices."""
    shards, save = ["0", *map(str, shards_of(options))], []
    if len(options) == 1:
        folder = pathlib.Path(FOLDER.name) / options[0]
        folder.mkdir()
        shards, save = [*shards, "data"], ["--save", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.distribution.run", options[0], *shards]
        + [*options[1:], *save],
        capture_output=True,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("options", RUNS)
def test_the_arithmetic_is_that_of_one_device(options):
    one, *others = run(*options).values()
    for many in others:
        for name in ("losses", "accuracy", "prediction"):
            np.testing.assert_allclose(many[name], one[name], atol=1e-5)
        for mine, theirs in zip(many["weights"], one["weights"], strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-5)
    assert len(set(one["losses"])) == len(one["losses"])


@pytest.mark.parametrize("options", RUNS)
def test_each_device_holds_its_share_of_the_experts(options):
    for shards in shards_of(options):
        share = run(*options)[str(shards)]["share"]
        assert share["weights"] == share["slots"] == [1 / shards]
        dense = share["dense"]
        assert dense < 0.5 if "--shard_dense" in options else dense == 1


@pytest.mark.parametrize("options", RUNS)
def test_buffers_travel_by_all_to_alls_and_nothing_else(options):
    for shards in shards_of(options):
        if shards == 1:
            continue
        result = run(*options)[str(shards)]
        found = result["collectives"]
        assert "collective-permute" not in found
        if "--shard_dense" in options:  # Kernels that are not experts'.
            assert found.pop("all-gather")
        assert set(found) == {"all-to-all"}
        moves = found["all-to-all"]
        assert len(moves) == 4 * 2  # Two MoE layers.
        assert sorted(moves) == sorted(4 * result["buffer_bytes"])


# Bad input, on the one device of this process.


def test_bad_numbers_of_shards():
    words = r"divisor of the number of devices, \d+. Received: .*=3"
    if not IS_JAX:
        words = "needs the JAX backend. Received: the backend"
    with pytest.raises(ValueError, match=words):
        distribution.ExpertParallel(3)


ERRORS = """
import keras, numpy as np
from keras_vmoe import distribution, layers
def fit(shards, experts=8, images=16, per_group=2, moe=True, capacity=1.0):
    parallel = distribution.DataParallel()
    if shards != "data":
        parallel = distribution.ExpertParallel(shards)
    with parallel.scope():
        inputs = keras.Input((4, 6))
        router = layers.TopKRouter(experts, 2, capacity_factor=capacity)
        layer = layers.MoEMLP(experts, 8, router, per_group)
        x = (layer if moe else keras.layers.Dense(6))(inputs)
        model = keras.Model(inputs, x)
        model.compile("sgd", "mse")
        x = np.zeros((images, 4, 6), "float32")
        model.fit(x, x, batch_size=images, verbose=0)
try:
    fit({arguments})
except ValueError as error:
    print("ValueError:", error)
"""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("4, experts=6", "num_expert_shards=4 for the 6 experts of"),
        ("8, images=12", "a batch of 12 for 8 devices"),
        ("'data', images=12", "a batch of 12 for 8 devices"),
        ("2, images=8", "4 groups for 8 devices"),
        ("2, images=24", "12 groups for 8 devices"),
        ("4, moe=False", "and a model without experts"),
        ("3", "divisor of the number of devices, 8. Received"),
        ("4, capacity=None", "dropless routing in 'mo_emlp/experts'"),
    ]
    if IS_JAX
    else [],
)
def test_what_does_not_divide(arguments, words):
    flag = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", ERRORS.replace("{arguments}", arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": flag},
    )
    assert done.returncode == 0, done.stderr
    assert words in done.stdout, done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not IS_JAX, reason="others refuse")
@pytest.mark.parametrize("family", ["vit", "convnext"])
def test_saved_models_load_on_one_device(family):
    run(family)
    files = sorted((pathlib.Path(FOLDER.name) / family).glob("*.keras"))
    assert len(files) == 6
    images = np.random.default_rng(1).normal(size=(4, 8, 8, 3))
    outputs = [
        models.load(file).predict(images.astype("float32"), verbose=0)
        for file in files
    ]
    for output in outputs[1:]:
        np.testing.assert_allclose(output, outputs[0], atol=1e-5)
