"""MirroredStrategy on virtual devices: the arithmetic of one device."""

import functools
import json
import random

import keras
import numpy as np
import pytest

from keras_vmoe import distribution
from keras_vmoe.distribution import _replicas
from tests import processes

BACKEND = keras.backend.backend()


def python(*arguments):
    """The last line of a process of its own."""
    done = processes.run(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@functools.cache
def run(family, devices):
    name = "tests.distribution.run_mirrored"
    return json.loads(python("-m", name, family, str(devices)))


@pytest.mark.slow
@pytest.mark.backends("tensorflow")
def test_the_arithmetic_is_that_of_one_device():
    """Losses, auxiliary losses, metrics, and by SGD's steps the gradients."""
    one, many = run("vit_clip", 1), run("vit_clip", 2)
    assert one["auxiliary_loss"][0] > 0.01 and one["dropped_share"][0] > 0
    for name in one.keys() - {"weights", "compiles"}:
        np.testing.assert_allclose(
            many[name], one[name], atol=1e-5, err_msg=name
        )
    for mine, theirs in zip(many["weights"], one["weights"], strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


@pytest.mark.slow
@pytest.mark.backends("tensorflow")
def test_every_replica_has_noise_of_its_own():
    for draws in run("vit_clip", 2)["noise"]:
        assert len(draws) == 2
        assert len({json.dumps(draw) for draw in draws}) == 2


@pytest.mark.slow
@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("family", ["vit_clip", "convnext"])
def test_xla_compiles_the_training_step(family):
    assert run(family, 1)["compiles"]


FIT = """
import json, keras, numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
devices = [tf.config.LogicalDeviceConfiguration()] * 2
tf.config.set_logical_device_configuration(cpu, devices)
from keras_vmoe import distribution, layers
def fit(batch, per_group, training=True):
    with distribution.resolve("mirrored").scope():
        inputs = keras.Input((4, 6))
        layer = layers.MoEMLP(4, 8, images_per_group=per_group)
        model = keras.Model(inputs, layer(inputs))
        model.compile("sgd", "mse")
    x = np.zeros((24, 4, 6), "float32")
    data = tf.data.Dataset.from_tensor_slices((x, x))
    data = data.batch(batch, drop_remainder=True)
    try:
        model.fit(data, verbose=0) if training else model.evaluate(data)
    except ValueError as error:
        return str(error)
print(json.dumps([
    fit(12, 4), fit(12, "batch"), fit(12, 3), fit(12, 1), fit(12, 4, False)]))
"""


@pytest.mark.slow
@pytest.mark.backends("tensorflow")
def test_a_replica_trains_on_whole_groups():
    """Two replicas of six images: groups of four would be torn."""
    torn, one_group, *good = json.loads(python("-c", FIT))
    assert "batch_size=12 for 2 devices, 4 images per group" in torn
    assert "Choose a multiple of 8" in torn
    assert "12 images per group" in one_group
    assert good == [None] * 3


WORKER = """
import json, os, sys
port, index = int(sys.argv[1]), int(sys.argv[2])
workers = [f"localhost:{port}", f"localhost:{port + 1}"]
task = {"type": "worker", "index": index}
os.environ["TF_CONFIG"] = json.dumps(
    {"cluster": {"worker": workers}, "task": task})
import keras, numpy as np, tensorflow as tf
with tf.distribute.MultiWorkerMirroredStrategy().scope():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
x = np.zeros((8, 2), "float32")
data = tf.data.Dataset.from_tensor_slices((x, x))
try:
    model.fit(data.batch(4, drop_remainder=True), verbose=0)
except ValueError as error:
    print(repr(str(error)))
"""
CANNOT = "with an unsupported type (<class 'tensorflow.python.distribute"


@pytest.mark.slow
@pytest.mark.backends("tensorflow")
def test_keras_cannot_fit_with_several_workers():
    """Why `resolve` has no such name. Should this fail, Keras may have it."""
    port = random.randrange(20000, 30000)
    both = [processes.Process("-c", WORKER, port, i) for i in range(2)]
    for worker in both:
        assert CANNOT in worker.communicate(timeout=300)[0]


# Bad input, on the one device of this process.

WORDS = {
    "jax": r"one of \['data_parallel', 'expert_parallel', 'auto'\]",
    "tensorflow": r"one of \['mirrored', 'tpu', 'auto'\]",
    "torch": r"one of \['auto'\] with the torch backend",
}


def test_a_strategy_that_the_backend_has_not():
    name = "expert_parallel" if BACKEND != "jax" else "mirrored"
    with pytest.raises(ValueError, match=WORDS[BACKEND] + ".*" + name):
        distribution.resolve(name)
    with pytest.raises(
        ValueError, match="num_expert_shards=2, shard_dense=False"
    ):
        distribution.resolve("auto", num_expert_shards=2)


def test_one_device_needs_no_strategy(monkeypatch):
    # Other tests of the process may have made virtual ones.
    monkeypatch.setattr(keras.distribution, "list_devices", lambda: ["cpu:0"])
    assert distribution.resolve("auto", num_experts=8) is None
    assert _replicas.num_replicas(None) == 1


@pytest.mark.backends("tensorflow")
def test_no_tpu():
    with pytest.raises(RuntimeError, match="must find a TPU. Received"):
        distribution.resolve("tpu")


def test_batches_of_whole_groups():
    _replicas.check_batch(32, 8, 4)
    with pytest.raises(ValueError, match="batch_size=24 for 4 devices, 8 im"):
        _replicas.check_batch(24, 8, 4)
    with pytest.raises(ValueError, match="Choose a multiple of 32"):
        _replicas.check_batch(16, 8, 2, processes=32)
