"""Smaller graphs that do the same."""

import numpy as np
import pytest
import tensorflow as tf

from keras_vmoe import export
from keras_vmoe.export.compaction import compact_version
from keras_vmoe.export.served import ServedModel
from keras_vmoe.models import ViTMoE
from tests.export import small


class Counter(tf.Module):
    """Constants and sizes over and over, a state, a loop, a dead end."""

    def __init__(self):
        super().__init__()
        self.calls = tf.Variable(0.0)

    @tf.function(input_signature=[tf.TensorSpec((None, 3), name="x")])
    def __call__(self, x):
        unread = tf.exp(x)
        for _ in range(5):
            x = tf.reshape(x, (tf.shape(x)[0], 3)) + tf.constant(1.0)
            unread = unread * x
        with tf.name_scope("a/very/long/path"):
            before = self.calls.assign_add(1.0)
            after = self.calls.assign_add(1.0)
        loop = tf.while_loop(lambda i, _: i < 3, _step, (0, x))[1]
        return {"sum": loop + before * after, "calls": after}


def _step(i, x):
    return i + 1, x * 2.0


def functions(folder):
    """All functions of a SavedModel."""
    from tensorflow.core.protobuf import saved_model_pb2

    content = (folder / "saved_model.pb").read_bytes()
    (graph,) = saved_model_pb2.SavedModel.FromString(content).meta_graphs
    return graph.graph_def.library.function


def nodes(folder):
    """The nodes of its largest function."""
    return max((list(f.node_def) for f in functions(folder)), key=len)


def test_a_smaller_graph_does_the_same(tmp_path):
    tf.saved_model.save(Counter(), str(tmp_path))
    x = np.arange(6, dtype="float32").reshape(2, 3)
    right = ServedModel(tmp_path)
    before = nodes(tmp_path)
    compact_version(tmp_path)
    after = nodes(tmp_path)
    given, python = ServedModel(tmp_path), tf.saved_model.load(str(tmp_path))
    for _ in range(3):  # The state counts on.
        expected = right("serving_default", x=x)
        for answer in (given("serving_default", x=x), python(x)):
            for name, value in expected.items():
                assert np.array_equal(answer[name], value)
    assert len(after) < 0.6 * len(before)
    assert not any(node.op == "Exp" for node in after)
    assert sum(node.op == "AssignAddVariableOp" for node in after) == 2
    assert max(len(node.name) for node in after) < 25
    tf.saved_model.experimental.read_fingerprint(str(tmp_path))


class Caller(tf.Module):
    """Functions of which two do the same, and one nearly."""

    def __init__(self):
        super().__init__()
        self.scales = [tf.Variable(x) for x in (2.0, 5.0)]

    @tf.function(input_signature=[tf.TensorSpec((None, 3), name="x")])
    def __call__(self, x):
        def times(scale, add):
            return tf.function(lambda y: scale * y + add)

        first, second = self.scales
        for scale, add in ((first, 1.0), (second, 1.0), (second, 3.0)):
            x = times(scale, add)(x)
        return {"x": x}


def test_equal_functions_are_one_and_others_are_not(tmp_path):
    tf.saved_model.save(Caller(), str(tmp_path))
    before = {f.signature.name: f for f in functions(tmp_path)}
    compact_version(tmp_path)
    after = [f.signature.name for f in functions(tmp_path)]
    assert len(after) == len(before) - 1 and set(after) < set(before)
    x = np.ones((2, 3), "float32")
    right = 5 * (5 * (2 * x + 1) + 1) + 3
    given = ServedModel(tmp_path)("serving_default", x=x)["x"]
    python = tf.saved_model.load(str(tmp_path))(x)["x"]
    assert np.array_equal(given, right) and np.array_equal(python, right)


@pytest.mark.slow
def test_many_positions_of_the_dial_take_little(tmp_path):
    """Twelve of them, with a small model of four MoE layers."""
    model = ViTMoE(
        16, 4, 64, 4, 4, 128, 10, moe={"layers": [0, 1, 2, 3], "num_experts": 8}
    )  # fmt: skip
    table = {
        f"{kind}_{i}": {"capacity_factor": 0.5 + 0.1 * i, "input": kind}
        for i in range(12)
        for kind in ("float", "uint8", "encoded")
    }
    folder = export.saved_model(model, tmp_path, signatures=table, warmup=False)
    size = sum(x.stat().st_size for x in folder.rglob("*") if x.is_file())
    assert size < 1.15 * 4 * model.count_params() + 2e6
    served = ServedModel(folder)
    assert len(served.signatures) == 40
    assert served("float_11", images=small.images(2))["logits"].shape == (2, 10)
