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


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.99])
def test_file_cut_short(tmp_path, share):
    path = models.save(small_model(), tmp_path / "model.keras")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(
        ValueError, match=r"must be whole.*Received: path=.*cut short"
    ):
        models.load(path)


def test_flipped_byte(tmp_path):
    path = models.save(small_model(), tmp_path / "model.keras")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match="must be whole"):
        models.load(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="must exist. Received: path="):
        models.load(tmp_path / "none.keras")


def test_other_suffix(tmp_path):
    with pytest.raises(ValueError, match="end in '.keras'. Received: path="):
        models.save(small_model(), tmp_path / "model.h5")
