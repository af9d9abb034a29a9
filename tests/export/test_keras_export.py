"""`model.export` of Keras: right for every batch, or refused."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_vmoe import layers
from tests.export import small

ROUTINGS = {
    "groups of 3": ({}, {"images_per_group": 3}),
    "batch": ({"batch_priority": True}, {"images_per_group": "batch"}),
    "dropless": ({"capacity_factor": "dropless"}, {"images_per_group": 1}),
}


def user_model(router=None, **options):
    """A functional model around the layer, of no class of ours."""
    router = layers.TopKRouter(4, **(router or {}))
    images = keras.Input((2, 2, 8))
    moe = layers.MoEMLP(4, 8, router, activation="relu", **options)
    x = keras.layers.GlobalAveragePooling2D()(moe(images))
    return small.wild(keras.Model(images, x))


@pytest.mark.backends("torch")
def test_models_of_the_papers_are_exported_by_us(tmp_path):
    words = r"keras_vmoe\.export\.onnx\(model, path\)"
    with pytest.raises(ValueError, match=words):
        small.convnext().export(tmp_path / "model.onnx", format="onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@small.IN_TENSORFLOW
@pytest.mark.parametrize("is_ours", [False, True])
def test_onnx(is_ours, tmp_path):
    import onnxruntime

    groups = {"images_per_group": 3}
    model = small.vit(**groups) if is_ours else user_model(**groups)
    path = tmp_path / "model.onnx"
    model(ops.zeros((5, *model.input_shape[1:])))
    model.export(path, format="onnx", verbose=False)
    session = onnxruntime.InferenceSession(str(path))
    (entry,) = session.get_inputs()
    for count in (1, 3, 8):
        images = np.random.default_rng(0).normal(
            size=(count, *model.input_shape[1:])
        )
        images = images.clip(-2, 2).astype("float32")
        (answer,) = session.run(None, {entry.name: images})
        expected = model.predict(images, batch_size=count, verbose=0)
        np.testing.assert_allclose(answer, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.backends("jax")
@pytest.mark.parametrize("kind", ROUTINGS)
def test_a_symbolic_batch(kind):
    import jax

    router, options = ROUTINGS[kind]
    model = user_model(router, **options)
    (batch,) = jax.export.symbolic_shape("batch")
    spec = jax.ShapeDtypeStruct((batch, 2, 2, 8), "float32")
    call = jax.jit(lambda x: model(x))
    exported = jax.export.export(call)(spec)
    for count in (1, 8):
        images = keras.random.normal((count, 2, 2, 8), seed=count)
        np.testing.assert_allclose(
            exported.call(images), call(images), atol=1e-5, rtol=1e-5
        )


@pytest.mark.backends("torch")
def test_a_tracer_of_one_batch_is_refused(tmp_path):
    model = user_model()
    model(ops.zeros((1, *model.input_shape[1:])))
    with pytest.raises(ValueError, match=r"keras_vmoe\.export\.onnx"):
        model.export(tmp_path / "model.onnx", format="onnx", verbose=False)
    assert not list(tmp_path.iterdir())
