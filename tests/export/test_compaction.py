"""Smaller graphs that do the same."""

import numpy as np
import pytest
import tensorflow as tf

from keras_vmoe import export
from keras_vmoe.export.compaction import compact_function
from keras_vmoe.export.compaction import compact_version
from keras_vmoe.models import ViTMoE
from tests.export import small
from tests.export.c_api import ServedModel

pytestmark = small.IN_TENSORFLOW


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
    old = tf.saved_model.experimental.read_fingerprint(str(tmp_path))
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
    new = tf.saved_model.experimental.read_fingerprint(str(tmp_path))
    assert new.saved_model_checksum != old.saved_model_checksum


def library(text):
    """A library of functions from the text of a proto."""
    from google.protobuf import text_format
    from tensorflow.core.framework import function_pb2

    return text_format.Parse(text, function_pb2.FunctionDefLibrary())


def test_what_a_function_keeps():
    """Control inputs and outputs, what has a state, the names of arguments."""
    text = """function {
      signature { name: 'f' input_arg { name: 'x_0' type: DT_FLOAT }
        output_arg { name: 'y' type: DT_FLOAT } control_output: 'last' }
      node_def { name: 'first' op: 'Assign' input: 'x_0' }
      node_def { name: 'again' op: 'Assign' input: 'x_0' }
      node_def { name: 'one' op: 'Neg' input: 'x_0' input: '^first' }
      node_def { name: 'two' op: 'Neg' input: 'x_0' input: '^again' }
      node_def { name: 'same' op: 'Neg' input: 'x_0' input: '^again' }
      node_def { name: 'unread' op: 'Neg' input: 'two:y:0' }
      node_def { name: 'sum' op: 'Add' input: 'one:y:0' input: 'same:y:0' }
      ret { key: 'y' value: 'sum:z:0' }
      node_def { name: 'end' op: 'NoOp' input: '^again' }
      control_ret { key: 'last' value: 'end' }
    }"""
    (function,) = library(text).function
    compact_function(function, {"Assign"})
    nodes = {x.name: x for x in function.node_def}
    assert sorted(nodes) == [
        "Add_0", "Assign_0", "Assign_1", "Neg_0", "Neg_1", "NoOp_0",
    ]  # fmt: skip
    assert function.ret["y"] == "Add_0:z:0"
    (last,) = function.signature.control_output
    assert dict(function.control_ret) == {last: last}
    controls = [
        nodes[x.partition(":")[0]].input[1] for x in nodes["Add_0"].input
    ]
    assert last == "NoOp_0" and controls[1] == nodes[last].input[0]
    assert controls[0].startswith("^Assign") and controls[0] != controls[1]


@small.ASKED_HERE
@pytest.mark.slow
def test_many_positions_of_the_dial_take_little(tmp_path):
    """Four of them, with a small model of two MoE layers."""
    kinds = ("float", "uint8", "encoded")
    model = ViTMoE(
        16, 4, 64, 2, 4, 128, 10, moe={"layers": [0, 1], "num_experts": 8}
    )  # fmt: skip
    table = {
        f"{kind}_{i}": {"capacity_factor": 0.5 + 0.1 * i, "input": kind}
        for i in range(4)
        for kind in kinds[: 1 if i else 3]
    }
    folder = export.saved_model(model, tmp_path, signatures=table, warmup=False)
    size = sum(x.stat().st_size for x in folder.rglob("*") if x.is_file())
    assert size < 1.15 * 4 * model.count_params() + 1e6
    served = ServedModel(folder)
    assert len(served.signatures) == 10
    images = small.images(2)
    for i in range(4):
        right = small.alone(model, capacity_factor=0.5 + 0.1 * i)
        given = served(f"float_{i}", images=images)["logits"]
        np.testing.assert_allclose(
            given, small.logits(right, images), atol=1e-5
        )
