"""ONNX Runtime and LiteRT reproduce the model's outputs."""

import keras
import numpy as np
import pytest

from keras_vmoe import export
from keras_vmoe import models
from keras_vmoe.export.variants import with_quantized_experts
from tests.export import small

WRITERS = {"onnx": export.onnx, "tflite": export.litert}
# Nothing in them that the others do not have in the other format.
ONE_FORMAT = {
    "swin": ["onnx"],
    "ensemble": ["onnx"],
    "expert_choice": ["tflite"],
    "dense": ["tflite"],
}
# Under other backends the same process of TensorFlow writes the same files.
# JAX does as PyTorch does, and takes longer.
pytestmark = pytest.mark.backends("tensorflow", "torch")
IS_TENSORFLOW = keras.backend.backend() == "tensorflow"
QUANTIZED = [("onnx", "int8"), ("onnx", "float16"), ("tflite", "int8")]


def run(path, images):
    """The outputs of a file."""
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path))
        assert [x.name for x in session.get_outputs()] == ["logits"]
        return session.run(["logits"], {"images": images})[0]
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path))
    signature = interpreter.get_signature_list()["serving_default"]
    assert signature == {"inputs": ["images"], "outputs": ["logits"]}
    (inputs,) = interpreter.get_input_details()
    interpreter.resize_tensor_input(inputs["index"], images.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(inputs["index"], images)
    interpreter.invoke()
    (outputs,) = interpreter.get_output_details()
    return interpreter.get_tensor(outputs["index"])


def check_file(path, model, quantize_experts=None):
    served = small.alone(model)
    if quantize_experts:
        served = with_quantized_experts(served, quantize_experts)
    *_, largest = small.BATCHES
    right = small.logits(served, small.images(largest))
    atol = 1e-5 * max(1, np.abs(right).max())
    for batch in small.BATCHES[1:]:
        given = run(path, small.images(batch))
        np.testing.assert_allclose(given, right[:batch], atol=atol, rtol=0)


@small.IN_TENSORFLOW
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        (kind, suffix)
        for kind in small.MODELS
        for suffix in ONE_FORMAT.get(kind, WRITERS)
    ],
)
def test_the_runtime_agrees(kind, suffix, tmp_path):
    model = small.MODELS[kind]()
    path = WRITERS[suffix](model, tmp_path / f"model.{suffix}")
    assert [x.name for x in tmp_path.iterdir()] == [path.name]
    check_file(path, model)
    images, others = small.images(3), small.images(3, seed=1)
    others[0], others[1] = images[0], np.nan
    one, other = run(path, images), run(path, others)
    np.testing.assert_array_equal(one[0], other[0])
    assert np.isnan(other[1]).any() and np.isfinite(other[2]).all()


@small.IN_TENSORFLOW
@pytest.mark.slow
@pytest.mark.parametrize(
    ("groups", "suffix"), [(2, "onnx"), ("batch", "tflite")]
)
def test_images_that_are_routed_together(groups, suffix, tmp_path):
    model = small.MODELS["bpr"]()
    path = tmp_path / f"model.{suffix}"
    WRITERS[suffix](model, path, images_per_group=groups)
    served = models.set_routing(model, images_per_group=groups)
    for batch in (1, 2, 5):
        images = small.images(batch)
        right, given = small.logits(served, images), run(path, images)
        np.testing.assert_allclose(given, right, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def large():
    """A model of which most bytes are kernels of experts."""
    return small.vit(num_experts=8, hidden_dim=512, num_selected_experts=2)


@small.IN_TENSORFLOW
@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "kind"), QUANTIZED)
def test_quantized_experts(suffix, kind, large, tmp_path):
    path = WRITERS[suffix](
        large, tmp_path / f"model.{suffix}", quantize_experts=kind
    )
    kernels = 4 * sum(2 * 8 * 32 * 512 for _ in large.moe_layers)
    whole = 4 * large.count_params()
    # A scale for each output takes some of it again, and so does the graph.
    saved = 0.9 * kernels * {"int8": 3 / 4, "float16": 1 / 2}[kind]
    assert path.stat().st_size < whole - saved + 4e5
    check_file(path, large, kind)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("model.tflite", {}, "must end in '.onnx'"),
        ("model.onnx", {"quantize_experts": "int4"}, "'int4'"),
        ("model.onnx", {"num_selected_experts": 5}, "num_selected_experts=5"),
    ],
)
def test_bad_arguments(name, arguments, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        export.onnx(small.MODELS["bpr"](), tmp_path / name, **arguments)
    assert not list(tmp_path.iterdir())


def test_no_file_is_overwritten(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="Nothing is overwritten"):
        export.onnx(small.MODELS["bpr"](), path)
    assert path.read_text() == "mine"
