import pathlib

import keras
import numpy as np
import pytest

from keras_vmoe import models


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


# Written by 0.1.0 with random weights, as were the logits of these shapes.
FILES = {
    # ViTMoE(4, 2, 8, 2, 2, 8, 3, pooling="gap", drop_path=0.1, layer_scale=0.5,
    #     moe=dict(layers=[0, 1], num_experts=3, num_selected_experts=2, router=
    #     "bias_balanced", capacity_factor=None, images_per_group=None))
    "vit": [
        [0.61556315, -0.93538827, 0.30634466],
        [0.59049559, -0.77951515, 0.36114603],
        [0.61522341, -0.87431729, 0.34707016],
    ],
    # ConvNeXtMoE(32, (1, 1, 2, 1), (4, 4, 8, 8), 3, drop_path=0.1,
    #     layer_scale=0.5, moe=dict(num_experts=3, gate="cosine",
    #     shared_hidden_dim=4, layers="last_2", capacity_factor=1.5))
    "convnext": [
        [0.61192542, 0.02146530, 1.23801792],
        [0.61919087, -0.80532235, 0.49819386],
        [0.47567523, -1.66943479, -0.39631310],
    ],
    # MoEMLP(3, 5, TopKRouter(3, 2, capacity_factor=None, gate=L2Gate(3, 4),
    #     renormalize=True), images_per_group=None, activation="gelu_tanh",
    #     dropout=0.1), SharedExpertMoEMLP(3, 5, 4, router=
    #     ExpertChoiceRouter(3)), MoEMLP(3, 5, SoftRouter(3, num_slots=2)),
    #     a mean of tokens and Dense(2), in keras.Model
    "layers": [
        [0.46564579, -0.08716431],
        [0.69471467, -0.57246423],
        [0.49836844, -0.20447122],
    ],
}
SHAPES = {"vit": (4, 4, 3), "convnext": (32, 32, 3), "layers": (4, 6)}


def of_version_0_1_0(name):
    file = f"version_0_1_0_{name}.keras"
    return models.load(pathlib.Path(__file__).with_name(file))


@pytest.mark.backends("tensorflow", "torch")
@pytest.mark.parametrize("name", FILES)
def test_files_of_version_0_1_0(name):
    model = of_version_0_1_0(name)
    images = np.random.default_rng(1).normal(size=(3, *SHAPES[name]))
    logits = model.predict(images.astype("float32"), verbose=0)
    np.testing.assert_allclose(logits, FILES[name], atol=1e-5)


@pytest.mark.backends("torch")
def test_words_of_version_0_1_0():
    """None was dropless routing and a whole batch."""
    model = of_version_0_1_0("vit")
    for layer in [*model.moe_layers, of_version_0_1_0("layers").layers[1]]:
        assert layer.images_per_group == "batch"
        assert layer.router.capacity_factor == "dropless"
    assert keras.ops.convert_to_numpy(model.moe_layers[0].router.bias).any()
    assert model.moe.images_per_group == "batch"
    assert model.moe.capacity_factor == "dropless"
    for renamed in (model, of_version_0_1_0("convnext")):
        assert renamed.drop_path_rate == 0.1
        assert renamed.layer_scale_init_value == 0.5
