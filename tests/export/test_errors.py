"""What cannot be exported is refused before anything is written."""

import concurrent.futures
import contextlib
import errno
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import keras
import numpy as np
import pytest

from keras_vmoe import _files
from keras_vmoe import export
from keras_vmoe._files import creating
from keras_vmoe.export.variants import features_of
from tests import processes
from tests.export import small
from tests.export.c_api import ServedModel

# JAX does as PyTorch does, and takes longer.
pytestmark = pytest.mark.backends("tensorflow", "torch")
IS_TENSORFLOW = keras.backend.backend() == "tensorflow"
OWN_LAYER = """
import keras

@keras.saving.register_keras_serializable("own")
class Own(keras.layers.Layer):
    def call(self, x):
        {code}
"""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"signatures": {"features": {}}}, "'features' twice"),
        (
            {"signatures": [("fast", small.FAST), ("fast", small.FAST)]},
            "'fast' twice",
        ),
        ({"signatures": {"a b": {}}}, "Received: 'a b'"),
        ({"signatures": {"__init": {}}}, "Received: '__init'"),
        (
            {"signatures": {"more": {"num_selected_experts": 5}}},
            r"num_selected_experts=5 with num_experts=4.*Signature 'more'",
        ),
        ({"signatures": {"x": {"capacity": 1}}}, "mean 'capacity_factor'"),
        ({"signatures": {"x": {"input": "png"}}}, "input='png'"),
        ({"capacity_factor": -1}, "capacity_factor=-1"),
        ({"images_per_group": 0}, "images_per_group=0"),
        ({"version": 0}, "version=0"),
        ({"max_batch_size": 0}, "max_batch_size=0"),
        ({"warmup": [1, 2000]}, "a batch of 2000 with max_batch_size=1024"),
        ({"class_names": ["a"]}, "each of the 10 classes. Received: 1 names"),
        ({"quantize_experts": "int4"}, "quantize_experts='int4'"),
        ({"class_names": "abcdefghij"}, "must be a list of names"),
        ({"class_names": {0: "a"}}, "must be a list of names"),
        ({"class_names": 10}, "must be a list of names"),
        ({"class_names": ["a\nb", *"bcdefghij"]}, "non-empty lines of text"),
        ({"class_names": ["b", *"bcdefghij"[:9]]}, "non-empty lines of text"),
        ({"class_names": ["", *"bcdefghij"]}, "non-empty lines of text"),
        ({"signatures": 3}, "signatures=3"),
        ({"signatures": "fast"}, "signatures='fast'"),
        ({"signatures": {"_x": {}}}, "Received: '_x'"),
        ({"signatures": {"x": {"features": 1}}}, "features=1"),
        ({"version": 2**63}, "version=9223372036854775808"),
        ({"max_batch_size": 2**31}, "must be at most 2147483647"),
        ({"warmup": range(1, 252)}, "warm-up requests=1004"),
        ({"directory": None}, "directory=None"),
        ({"directory": "runs[1]"}, "as a pattern"),
        ({"class_names": {*"abcdefghij"}}, "must be a list of names"),
        ({"class_names": b"abcdefghij"}, "must be a list of names"),
        ({"class_names": [b"a", *"bcdefghij"]}, "must be a list of names"),
        ({"class_names": ["\udcff", *"bcdefghij"]}, "non-empty lines of text"),
        ({"card": [1]}, r"card=\[1\]"),
        ({"card": {"accuracy": float("nan")}}, "must be a dict of JSON values"),
        ({"warmup": "8"}, "warmup='8'"),
        ({"warmup": 8.5}, "warmup=8.5"),
        ({"signatures": ["fast"]}, "must map names to dicts"),
        ({"signatures": {"fast": None}}, "must map names to dicts"),
        ({"signatures": {"x": {"features": "maybe"}}}, "features='maybe'"),
        ({"preprocessing": "imagenet"}, "None or a Preproc.*='imagenet'"),
        ({"max_pixels": 0}, "max_pixels=0"),
        ({"card": {"params": 1}}, "has a 'params' entry"),
        ({"card": {"a": object()}}, "must be a dict of JSON values"),
    ],
)
def test_bad_arguments(model, tmp_path, arguments, words):
    with pytest.raises(ValueError, match=words):
        export.saved_model(
            **{"model": model, "directory": tmp_path / "served", **arguments}
        )
    assert not list(tmp_path.iterdir())


def flat_end(x):
    """What changes no number, or only its type."""
    x = keras.layers.Identity()(keras.ops.cast(x, "float32"))
    return keras.layers.Activation("linear", dtype="float32")(x)


def test_a_head_before_what_changes_nothing():
    image = keras.Input((8, 8, 3))
    features = keras.layers.GlobalAveragePooling2D()(image)
    head = keras.layers.Dense(3)
    x = head(features)
    again = head(x)
    assert features_of(keras.Model(image, flat_end(x))) is features
    assert features_of(keras.Model(image, again)) is x
    assert features_of(keras.Model(image, flat_end(again))) is x
    assert features_of(keras.Model(image, x / 2)) is None


def test_models_that_have_no_graph_or_no_images(tmp_path):
    dense = keras.layers.Dense(3)
    flat = keras.Sequential([keras.Input((4,)), dense])
    image = keras.Input((8, 8, 3))
    pooled = keras.layers.GlobalAveragePooling2D()(image)
    soft = keras.layers.Dense(3, activation="softmax")(pooled)
    pixels = keras.Input((8, 8, 3), dtype="uint8")
    for model, words in (
        ("model.keras", "the path 'model.keras'. Load it"),
        (keras.Sequential([keras.layers.Dense(3)]), "must be a built"),
        (flat, "one batch of images of a known size"),
        (keras.Model(image, soft), "a Dense with an activation"),
        (
            keras.Model(image, keras.layers.Softmax()(pooled)),
            "a Softmax with an activation",
        ),
        (
            keras.Model(image, keras.ops.softmax(pooled)),
            "a Softmax with an activation",
        ),
        (keras.Model(image, flat_end(soft)), "a Dense with an activation"),
        (
            keras.Sequential([image, keras.Model(image, soft)]),
            "a Dense with an activation",
        ),
        (
            keras.Model(image, keras.ops.cast(pooled, "int32")),
            "outputs of type int32",
        ),
        (
            keras.Model(pixels, flat_end(keras.ops.cast(pixels, "float32"))),
            "inputs of type uint8",
        ),
        (
            keras.Model(image, keras.layers.Conv2D(3, 1)(image)),
            "one vector per image",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            export.saved_model(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_dense_and_soft_models_have_no_such_dial(tmp_path):
    for kind in ("dense", "soft"):
        with pytest.raises(ValueError, match="Signature 'fast'"):
            export.saved_model(
                small.MODELS[kind](), tmp_path, signatures={"fast": small.FAST}
            )
    dense = small.MODELS["dense"]()
    for arguments, words in (
        ({"quantize_experts": "int8"}, "Only `MLPExperts` can be quantized"),
        ({"capacity_factor": 2.0}, "nothing to route.*capacity_factor=2.0"),
        ({"images_per_group": 8}, "nothing to route.*images_per_group=8"),
    ):
        with pytest.raises(ValueError, match=words):
            export.saved_model(dense, tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


def test_no_version_is_overwritten(model, tmp_path):
    (tmp_path / "1").mkdir()
    with pytest.raises(FileExistsError, match="Nothing is overwritten"):
        export.saved_model(model, tmp_path)
    assert not list((tmp_path / "1").iterdir())


def test_a_folder_that_cannot_be(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="can be written to. Received"):
        export.saved_model(model, tmp_path / "file" / "served")


def test_a_name_that_somebody_else_took_meanwhile(tmp_path):
    for name, make in (("1", "mkdir"), ("a.onnx", "touch")):
        with pytest.raises(FileExistsError, match="Nothing is overwritten"):
            with creating(tmp_path / name) as path:
                getattr(path, make)()
                getattr(tmp_path / name, make)()
        assert [x.name for x in tmp_path.iterdir()] == [name]
        (tmp_path / name).rmdir() if make == "mkdir" else None


@pytest.mark.parametrize("name", ["1", "a.onnx"])
def test_two_at_once_and_one_wins(name, tmp_path, monkeypatch):
    """Both are whole and find the name free before either takes it."""
    check, both = _files._check_new, threading.Barrier(2)

    def check_together(path):
        check(path)
        both.wait(timeout=60)

    def write(words):
        try:
            with _files.creating(tmp_path / name) as path:
                if name == "1":
                    path.mkdir()
                    path = path / "graph"
                path.write_text(words)
        except FileExistsError as error:
            assert "Choose another version or name" in str(error)
            return None
        return words

    monkeypatch.setattr(_files, "_check_new", check_together)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        won = set(pool.map(write, ["first", "second"])) - {None}
    path = tmp_path / name
    path = path / "graph" if name == "1" else path
    assert won == {path.read_text()}
    assert [x.name for x in tmp_path.iterdir()] == [name]


def test_what_fails_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), creating(tmp_path / "1") as path:
        path.mkdir()
        (path / "half").write_text("x")
        raise KeyError
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="must be written completely") as caught:
        with creating(tmp_path / "1"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "No space left" in str(caught.value)
    with pytest.raises(KeyError), creating(tmp_path / "new" / "1"):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_without_links_and_with_what_a_kill_left(tmp_path, monkeypatch):
    def link(source, path):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    old, new, other = (
        tmp_path / f"{_files.PARTIAL}{name}" for name in ("1.a", "1.b", "2.a")
    )
    for left in (old, new, other):
        left.mkdir()
    for left in (old, other):
        os.utime(left, (0, 0))
    with creating(tmp_path / "1") as path:
        path.write_text("whole")
    assert {*tmp_path.iterdir()} == {tmp_path / "1", new, other}


def test_a_folder_of_somebody_else(model, tmp_path, monkeypatch):
    def refuse(**kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(OSError, match=r"Permission denied\). Choose another"):
        export.saved_model(model, tmp_path / "served")
    assert not list(tmp_path.glob("served*"))


@pytest.mark.backends("torch")
@pytest.mark.slow
def test_a_full_disk(tmp_path):
    """The limits are less than the weights, and less than TensorFlow's graph.

    (Under JAX and PyTorch the process that exports is the one that fails.)
    """
    limits = ["50_000", "400_000"] if IS_TENSORFLOW else ["50_000"]
    program = (
        "import resource, sys\n"
        "from keras_vmoe import export\n"
        "from tests.export import small\n"
        "model = small.MODELS['bpr']()\n"
        "for size in map(int, sys.argv[2:]):\n"
        "    limit = (size, resource.RLIM_INFINITY)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, limit)\n"
        "    try:\n"
        "        export.saved_model(model, sys.argv[1], warmup=False)\n"
        "    except OSError as error:\n"
        "        print('REFUSED', error)\n"
    )
    done = processes.run("-c", program, tmp_path, *limits)
    refused = done.stdout.count("REFUSED")
    assert refused == len(limits), done.stderr[-2000:]
    assert not list(tmp_path.iterdir())


def own_model(tmp_path, monkeypatch, code):
    """A model with a layer from a module of its own."""
    name = f"own_{keras.backend.backend()}_{len(code)}"
    (tmp_path / f"{name}.py").write_text(OWN_LAYER.format(code=code))
    monkeypatch.syspath_prepend(tmp_path)
    own = __import__(name).Own()
    images = keras.Input((8, 8, 3))
    x = keras.layers.GlobalAveragePooling2D()(own(images))
    return keras.Model(images, keras.layers.Dense(10)(x))


@small.IN_TENSORFLOW
@pytest.mark.slow
def test_a_table_is_refused(tmp_path):
    images = keras.Input((8, 8, 3))
    mean = keras.layers.GlobalAveragePooling2D()(images)
    x = keras.layers.IntegerLookup(vocabulary=[1, 2])(
        keras.ops.cast(mean, "int64")
    )
    x = keras.layers.Flatten()(keras.layers.Embedding(4, 2)(x))
    model = keras.Model(images, keras.layers.Dense(3)(x))
    with pytest.raises(ValueError, match="no lookup tables"):
        export.saved_model(model, tmp_path / "served")
    assert not list(tmp_path.iterdir())


@small.ASKED_HERE
@pytest.mark.slow
def test_layers_and_functions_of_ones_own(tmp_path, monkeypatch):
    name = f"own_function_{keras.backend.backend()}"
    (tmp_path / f"{name}.py").write_text(
        "import keras\n\n"
        "@keras.saving.register_keras_serializable('own')\n"
        "def double(x):\n    return 2 * keras.ops.relu(x)\n"
    )
    model = own_model(tmp_path, monkeypatch, "return keras.ops.relu(x)")
    double = __import__(name).double
    x = keras.layers.Dense(4, activation=double)(model.layers[-2].output)
    model = keras.Model(model.inputs[0], keras.layers.Dense(3)(x))
    path = export.saved_model(model, tmp_path / "served", warmup=False)
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3))
    images = images.astype("float32")
    np.testing.assert_allclose(
        ServedModel(path)("serving_default", images=images)["logits"],
        small.logits(model, images),
        atol=1e-6,
    )


@small.IN_TENSORFLOW
@pytest.mark.slow
def test_layers_that_tensorflow_cannot_trace(tmp_path, monkeypatch):
    """They load, as they tell their shape, and fail in the graph."""
    code = (
        "if keras.backend.backend() == 'tensorflow':\n"
        "            return keras.ops.convert_to_tensor(x.numpy())\n"
        "        return x\n\n"
        "    def compute_output_spec(self, x):\n"
        "        return keras.KerasTensor(x.shape, x.dtype)"
    )
    model = own_model(tmp_path, monkeypatch, code)
    with pytest.raises(ValueError, match="Use keras.ops in custom layers"):
        export.saved_model(model, tmp_path / "served")
    assert not list(tmp_path.glob("served*"))


@pytest.mark.slow
@small.IN_TENSORFLOW
@small.ASKED_HERE
def test_a_version_with_other_outputs_gets_no_name(tmp_path, monkeypatch):
    """As if compaction had left something out."""
    from keras_vmoe.export import compaction

    def forget(graph, stateful):
        compact(graph, stateful)
        for node in graph.node_def:
            if node.op == "Rsqrt":
                node.op = "Sqrt"

    compact = compaction.compact_function
    monkeypatch.setattr(compaction, "compact_function", forget)
    with pytest.raises(ValueError, match="must reproduce the model's outputs"):
        export.saved_model(small.MODELS["bpr"](), tmp_path / "served")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.backends("torch")  # Where TensorFlow is another backend.
@small.ASKED_HERE
@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise KeyError('not here')", "KeyError: 'not here'.*use keras.ops"),
        ("return 2 * x", "must reproduce.*outputs.*their own backend"),
    ],
)
def test_layers_that_differ_under_tensorflow(
    code, words, tmp_path, monkeypatch
):
    code = (
        "if keras.backend.backend() == 'tensorflow':\n"
        "            print('Something to say.')\n"
        f"            {code}\n"
        "        return x"
    )
    model = own_model(tmp_path, monkeypatch, code)
    with pytest.raises(ValueError, match=words):
        export.saved_model(model, tmp_path / "served")
    assert not list(tmp_path.glob("served*"))


@small.IN_TENSORFLOW
@small.ASKED_HERE
@pytest.mark.slow
def test_images_that_are_not_alone(tmp_path):
    images = keras.Input((8, 8, 3))
    x = keras.layers.GlobalAveragePooling2D()(images)
    x = x - keras.ops.mean(x, axis=0, keepdims=True)
    model = keras.Model(images, keras.layers.Dense(3)(x))
    with pytest.raises(ValueError, match="must not depend on its batch mates"):
        export.saved_model(model, tmp_path / "served")
    assert not list(tmp_path.glob("served*"))


@pytest.mark.slow
@small.IN_TENSORFLOW
@small.ASKED_HERE
def test_images_that_have_no_answer(model, tmp_path):
    with pytest.raises(ValueError, match="NaN or infinity from 'serve_jpeg'"):
        export.saved_model(model, tmp_path / "served", max_pixels=100)
    assert not list(tmp_path.iterdir())


@pytest.mark.backends("torch")
@pytest.mark.slow
def test_a_killed_export_leaves_no_version(tmp_path):
    """Nor, under other backends, its process of TensorFlow."""
    program = (
        "import sys\n"
        "from keras_vmoe import export\n"
        "from tests.export import small\n"
        "export.saved_model(small.MODELS['bpr'](), sys.argv[1])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], start_new_session=True
    )
    while process.poll() is None and not [*tmp_path.glob(".*/1/variables/*")]:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert [x.name[:11] for x in tmp_path.iterdir()] == [".partial.1."]
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and lives(process.pid):
        time.sleep(0.1)
    assert not lives(process.pid)


def lives(session):
    """Whether a process of a session is there, and is no zombie."""
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its = path.read_text().rpartition(")")[2].split()[:4]
            if int(its) == session and state != "Z":
                return True
    return False
