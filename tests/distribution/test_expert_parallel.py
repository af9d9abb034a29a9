"""Experts, or data alone, over several devices: the arithmetic of one."""

import json

import keras
import numpy as np
import pytest

from keras_vmoe import distribution
from keras_vmoe import layers
from keras_vmoe import models
from tests import processes

IS_JAX = keras.backend.backend() == "jax"
# Models, and the numbers of shards; 0 is one device.
CASES = {
    "vit": "0 1 8 data dense",
    "vit --noise": "0 4",
    "convnext --noise": "0 4 data",
    "vit --router expert_choice": "0 4",
    "vit --router soft": "0 4",
    "banks": "0 4",
    "swin": "0 4",
}
SAVED = ("vit", "convnext --noise")
each_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the models are saved."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def results(folder):
    """Those of all cases, from one process, which has eight devices."""
    lines = []
    for case, shards in CASES.items():
        family, *options = case.split()
        if case in SAVED:
            (folder / family).mkdir()
            options += ["--save", str(folder / family)]
        lines.append(" ".join([family, shards, *options]))
    done = processes.run("-m", "tests.distribution.run", *lines)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[-len(CASES) :]
    return dict(zip(CASES, map(json.loads, lines), strict=True))


def sharded(results, case):
    """Numbers of shards, whether dense kernels are sharded too, results."""
    found = {k: v for k, v in results[case].items() if k not in ("0", "data")}
    is_dense = {k: k == "dense" for k in found}
    return [
        (4 if is_dense[k] else int(k), is_dense[k], found[k]) for k in found
    ]


@pytest.mark.slow
@pytest.mark.backends("jax")
@each_case
def test_the_arithmetic_is_that_of_one_device(results, case):
    one, *others = results[case].values()
    for many in others:
        for name in ("losses", "accuracy", "prediction"):
            np.testing.assert_allclose(many[name], one[name], atol=1e-5)
        for mine, theirs in zip(many["weights"], one["weights"], strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-5)
    assert len(set(one["losses"])) == len(one["losses"])


@pytest.mark.slow
@pytest.mark.backends("jax")
@each_case
def test_each_device_holds_its_share_of_the_experts(results, case):
    for shards, is_dense, result in sharded(results, case):
        share = result["share"]
        assert share["weights"] == share["slots"] == [1 / shards]
        assert share["dense"] < 0.5 if is_dense else share["dense"] == 1


@pytest.mark.slow
@pytest.mark.backends("jax")
@each_case
def test_buffers_travel_by_all_to_alls_and_nothing_else(results, case):
    for shards, is_dense, result in sharded(results, case):
        if shards == 1:
            continue
        found = result["collectives"]
        assert "collective-permute" not in found
        if is_dense:  # Kernels that are not experts'.
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


def fit(shards, experts=8, images=8, per_group=2, moe=True, capacity=1.0):
    """A step on the four devices of this process."""
    parallel = distribution.DataParallel()
    if shards != "data":
        parallel = distribution.ExpertParallel(shards)
    with parallel.scope():
        inputs = keras.Input((4, 6))
        router = layers.TopKRouter(experts, 2, capacity_factor=capacity)
        layer = layers.MoEMLP(
            experts, 8, router, images_per_group=per_group, name="moe"
        )
        x = (layer if moe else keras.layers.Dense(6))(inputs)
        model = keras.Model(inputs, x)
        model.compile("sgd", "mse")
        x = np.zeros((images, 4, 6), "float32")
        model.fit(x, x, batch_size=images, verbose=0)


@pytest.mark.backends("jax")
@pytest.mark.parametrize(
    ("shards", "changes", "words"),
    [
        (4, {"experts": 6}, "num_expert_shards=4 for the 6 experts of"),
        (4, {"images": 6}, "a batch of 6 for 4 devices"),
        ("data", {"images": 6}, "a batch of 6 for 4 devices"),
        (2, {"images": 4}, "2 groups for 4 devices"),
        (2, {"images": 12}, "6 groups for 4 devices"),
        (4, {"moe": False}, "and a model without experts"),
        (3, {}, "divisor of the number of devices, 4. Received"),
        (4, {"capacity": "dropless"}, "dropless routing in 'moe/experts'"),
    ],
)
def test_what_does_not_divide(shards, changes, words):
    with pytest.raises(ValueError, match=words):
        fit(shards, **changes)


@pytest.mark.slow
@pytest.mark.backends("jax")
@pytest.mark.parametrize("case", SAVED)
def test_saved_models_load_on_one_device(results, folder, case):
    files = sorted((folder / case.split()[0]).glob("*.keras"))
    assert len(files) == len(CASES[case].split())
    images = np.random.default_rng(1).normal(size=(4, 8, 8, 3))
    outputs = [
        models.load(file).predict(images.astype("float32"), verbose=0)
        for file in files
    ]
    for output in outputs[1:]:
        np.testing.assert_allclose(output, outputs[0], atol=1e-5)
