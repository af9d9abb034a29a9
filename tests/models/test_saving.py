import pathlib

import keras
import numpy as np
import pytest

from keras_vmoe import models

EXPECTED = [
    [0.61556315, -0.93538827, 0.30634466],
    [0.59049559, -0.77951515, 0.36114603],
    [0.61522341, -0.87431729, 0.34707016],
]


def small_model():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    return model


def test_round_trip(tmp_path):
    model, x = small_model(), np.ones((2, 3), "float32")
    path = models.save(model, tmp_path / "model.keras")
    loaded = models.load(path)
    np.testing.assert_array_equal(
        model.predict(x, verbose=0), loaded.predict(x, verbose=0)
    )
    assert [file.name for file in tmp_path.iterdir()] == ["model.keras"]


@pytest.mark.backends("torch")
def test_failed_save_keeps_the_file_that_was_there(tmp_path, monkeypatch):
    model = small_model()
    path = models.save(model, tmp_path / "model.keras")
    whole = path.read_bytes()

    def full_disk(target, *args, **kwargs):
        target.write_bytes(whole[:100])
        raise OSError("No space left on device")

    monkeypatch.setattr(model, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        models.save(model, path)
    assert path.read_bytes() == whole
    assert [file.name for file in tmp_path.iterdir()] == ["model.keras"]


@pytest.mark.backends("torch")
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.99])
def test_file_cut_short(tmp_path, share):
    path = models.save(small_model(), tmp_path / "model.keras")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(
        ValueError, match=r"must be complete.*Received: path=.*truncated"
    ):
        models.load(path)


@pytest.mark.backends("torch")
def test_flipped_byte(tmp_path):
    path = models.save(small_model(), tmp_path / "model.keras")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match="must be complete"):
        models.load(path)


@pytest.mark.backends("torch")
def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="must exist. Received: path="):
        models.load(tmp_path / "none.keras")


@pytest.mark.backends("torch")
def test_other_suffix(tmp_path):
    with pytest.raises(ValueError, match="end in '.keras'. Received: path="):
        models.save(small_model(), tmp_path / "model.h5")


def test_a_file_of_version_0_1_0():
    """Its words for dropless routing and whole batches, its balance bias.

    Written by 0.1.0, with random weights, as were these logits:
    `ViTMoE(4, 2, 8, 2, 2, 8, 3, pooling="gap", drop_path=0.1, layer_scale=0.5,
    moe=dict(layers=[0, 1], num_experts=3, num_selected_experts=2,
    router="bias_balanced", capacity_factor=None, images_per_group=None))`.
    """
    file = pathlib.Path(__file__).with_name("version_0_1_0.keras")
    model = models.load(file)
    for layer in model.moe_layers:
        assert layer.images_per_group == "batch"
        assert layer.router.capacity_factor == "dropless"
        assert keras.ops.convert_to_numpy(layer.router.bias).any()
    assert model.moe.images_per_group == "batch"
    assert model.moe.capacity_factor == "dropless"
    assert model.drop_path_rate == 0.1
    assert model.layer_scale_init_value == 0.5
    images = np.random.default_rng(1).normal(size=(3, 4, 4, 3))
    logits = model.predict(images.astype("float32"), verbose=0)
    np.testing.assert_allclose(logits, EXPECTED, atol=1e-5)
