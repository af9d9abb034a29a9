"""Runs that are stopped, at any moment, end as if they had not been."""

import dataclasses
import json
import pathlib

import keras
import numpy as np
import pytest
import yaml

from keras_vmoe import data
from keras_vmoe import models
from keras_vmoe import training
from keras_vmoe.training import checkpointing
from keras_vmoe.training import loop
from keras_vmoe.training.checkpointing import Checkpoints
from keras_vmoe.training.config import GROUPS
from keras_vmoe.training.config import VIT_SIZES
from tests.models.definitions import images_of
from tests.models.definitions import tiny
from tests.training.small import SMALL
from tests.training.small import changed
from tests.training.small import config_of
from tests.training.small import history

# Bit-equal but on TensorFlow, which adds up in an order of its own.
EXACT = keras.backend.backend() != "tensorflow"

# Nothing of it depends on the backend.
once = pytest.mark.backends("torch")


def assert_same(result, whole):
    for mine, theirs in zip(
        result.model.weights, whole.model.weights, strict=True
    ):
        mine, theirs = np.array(mine), np.array(theirs)
        if EXACT:
            np.testing.assert_array_equal(mine, theirs)
        else:
            np.testing.assert_allclose(mine, theirs, atol=1e-4)
    saved = models.load(result.run_dir / "model.keras")
    for mine, theirs in zip(saved.weights, result.model.weights, strict=True):
        np.testing.assert_array_equal(np.array(mine), np.array(theirs))
    rows, expected = history(result.run_dir), history(whole.run_dir)
    assert [row["epoch"] for row in rows] == [row["epoch"] for row in expected]
    if EXACT:
        assert rows == expected
        assert result.test_accuracy == whole.test_accuracy


# The slow ones are those of `make test-slow`.
KILLS = [
    pytest.param(n, marks=() if n == 8 else pytest.mark.slow)
    for n in range(1, 15)
]


@pytest.mark.backends("torch")
@pytest.mark.parametrize("number", KILLS)
def test_a_kill_at_any_file(whole, number, left):
    assert_same(training.train(left(number)), whole)


# JAX's trainer keeps the state in its own way; TensorFlow traces for minutes.
@pytest.mark.backends("jax", "torch")
@pytest.mark.slow
def test_whatever_a_run_remembers(tmp_path, cache):
    """Slots, averages, accumulated gradients, seeds of all layers.

    Three epochs are twelve steps: after the second of them two updates are
    done, and two thirds of another.
    """
    model = dataclasses.replace(
        SMALL.model, num_layers=2, dropout=0.1, drop_path_rate=0.2
    )
    config = config_of(
        tmp_path / "run", cache, optimizer="lamb", ema=0.9, accumulate=3,
        augmentation=data.Augmentation(crop_padding=1, mixup=0.8), model=model,
    )  # fmt: skip
    undisturbed = changed(config, run_dir=str(tmp_path / "whole"))
    stop_after(config, 2)
    assert_same(training.train(config), training.train(undisturbed))


@pytest.mark.backends("torch")
def test_checkpoints_within_an_epoch(whole, tmp_path, cache):
    """Steps and their images are those of whole epochs."""
    config = config_of(tmp_path / "run", cache, checkpoints_per_epoch=2)
    stop_after(config, 3)  # In the middle of the second epoch.
    result = training.train(config)
    rows = history(result.run_dir)
    assert [row["epoch"] for row in rows] == [str(i) for i in range(1, 7)]
    pairs = (x.model.trainable_weights for x in (result, whole))
    for mine, theirs in zip(*pairs, strict=True):
        mine, theirs = np.array(mine), np.array(theirs)
        np.testing.assert_allclose(mine, theirs, atol=0 if EXACT else 1e-4)


@once
def test_more_checkpoints_than_steps(tmp_path, cache):
    config = config_of(tmp_path / "run", cache, checkpoints_per_epoch=5)
    with pytest.raises(ValueError, match="checkpoints_per_epoch=5 with 4"):
        training.train(config)


@once
def test_a_truncated_checkpoint_falls_back(whole, left):
    config = left(9)  # Behind the second epoch.
    folder = pathlib.Path(config.run_dir) / "checkpoints"
    path = folder / "epoch_000002.weights.h5"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="epoch_000002.* is corrupt"):
        result = training.train(config)
    assert_same(result, whole)


class Killed(BaseException):
    """What no handler of ours catches, as a kill is."""


def stop_after(config, epochs):
    """Trains some epochs of a run and stops as by a kill."""

    class SaveAndStop(checkpointing.SaveCheckpoint):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == epochs:
                raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.loop, "SaveCheckpoint", SaveAndStop)
        with pytest.raises(Killed):
            training.train(config)


@once
def test_curves_of_a_resumed_run_are_of_all_epochs(left, monkeypatch):
    """Metrics and the load of the experts."""
    drawn = []
    monkeypatch.setattr(loop, "_plot", lambda *given: drawn.append(given))
    config = left(9)  # Behind the second epoch.
    training.train(config)
    ((rows, routing, _),) = drawn
    assert len(rows) == len(routing) == config.epochs > 2


@once
def test_a_run_without_a_checkpoint_is_started_anew(left):
    config = left(3, epochs=1, learning_rate=0.001)
    training.train(config)
    run_dir = pathlib.Path(config.run_dir)
    settings = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert settings["optimizer"]["learning_rate"] == 0.001
    assert not (run_dir / "checkpoints").exists()  # It is finished.


@once
def test_another_configuration_is_refused(left):
    other = left(
        6, learning_rate=0.5, augmentation=data.Augmentation(crop_padding=2)
    )
    words = (
        "these differ: data.augmentation.crop_padding: 1 there, 2 here; "
        "optimizer.learning_rate: 0.002 there, 0.5 here. Name another folder"
    )
    with pytest.raises(ValueError, match=words):
        training.train(other)


@once
def test_a_stopped_run_of_version_0_1_0_goes_on(whole, left):
    """Its folder is that of today, but for the groups of its settings."""
    config = left(9)
    file = pathlib.Path(config.run_dir) / "config.yaml"
    settings, flat = yaml.safe_load(file.read_text()), {}
    for name, value in settings.items():
        old = dict(value) if name in GROUPS else {name: value}
        if name == "optimizer":
            old["optimizer"] = old.pop("name")
        if name == "model":
            sizes = {x: old.pop(x) for x in (*VIT_SIZES, "image_size", "dtype")}
            sizes["drop_path"] = old.pop("drop_path_rate")
            sizes["layer_scale"] = sizes.pop("layer_scale_init_value")
            del old["family"]
            old["model"] = sizes
        if name == "moe":
            old["moe"] = {**value, "capacity_factor": "auto"}
        flat |= old
    assert "learning_rate" in flat and "optimizer" in flat
    file.write_text(yaml.safe_dump(flat))
    assert training.restore(config.run_dir).count_params() > 0
    assert_same(training.train(config), whole)


@once
def test_a_finished_run_is_not_run_again(whole, cache):
    with pytest.raises(FileExistsError, match="which holds a finished run"):
        training.train(config_of(whole.run_dir, cache))
    result = json.loads((whole.run_dir / "result.json").read_text())
    assert result["accuracy"] == pytest.approx(whole.test_accuracy)


# Checkpoints by themselves.


def fitted():
    model = tiny(num_layers=1, moe={"layers": [0]})
    model.compile("adam", "mse")
    model.fit(images_of(4), np.ones((4, 10)), shuffle=False, verbose=0)
    return model


def test_a_checkpoint_holds_weights_optimizer_and_noise(tmp_path):
    model = fitted()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(model, 1, {"rows": [1, 2]})
    model.fit(images_of(4), np.ones((4, 10)), shuffle=False, verbose=0)
    expected = model.get_weights()

    twin = tiny(num_layers=1, moe={"layers": [0]})
    twin.compile("adam", "mse")
    state = checkpoints.restore(twin)
    assert state["rows"] == [1, 2] and state["epoch"] == 1
    twin.fit(images_of(4), np.ones((4, 10)), shuffle=False, verbose=0)
    for mine, theirs in zip(twin.get_weights(), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)


@once
def test_only_the_newest_are_kept(tmp_path):
    model, checkpoints = fitted(), Checkpoints(tmp_path, keep=2)
    for epoch in range(1, 5):
        checkpoints.save(model, epoch, {})
    assert checkpoints.epochs() == [3, 4]
    assert len(list(tmp_path.iterdir())) == 4
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)


@once
def test_an_unreadable_disk_loses_no_checkpoint(tmp_path, monkeypatch):
    """An error that may pass is no corruption."""
    model, checkpoints = fitted(), Checkpoints(tmp_path)
    for epoch in (1, 2):
        checkpoints.save(model, epoch, {})

    def stale(path):
        raise OSError(116, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(checkpointing, "_checksum", stale)
        with pytest.raises(OSError, match="Stale"):
            checkpoints.restore(model)
    assert checkpoints.epochs() == [1, 2]
    (tmp_path / "epoch_000002.weights.h5").unlink()
    (tmp_path / "epoch_000001.json").write_text("{")
    with pytest.warns(UserWarning, match="corrupt"):
        assert checkpoints.restore(model) is None
    assert checkpoints.epochs() == []


# h5py has a RuntimeError of its own for it.
@once
@pytest.mark.parametrize("kind", [OSError, RuntimeError])
def test_a_full_disk_leaves_the_last_good_checkpoint(
    tmp_path, monkeypatch, kind
):
    model, checkpoints = fitted(), Checkpoints(tmp_path)
    checkpoints.save(model, 1, {})

    def full(path, overwrite=True):
        pathlib.Path(path).write_bytes(b"half")
        raise kind(28, "No space left on device")

    monkeypatch.setattr(model, "save_weights", full)
    with pytest.raises(OSError, match="No space left.*run the command again"):
        checkpoints.save(model, 2, {})
    assert checkpoints.epochs() == [1]
    assert {p.name for p in tmp_path.iterdir()} == {
        "epoch_000001.json",
        "epoch_000001.weights.h5",
    }
    assert Checkpoints(tmp_path).restore(model)["epoch"] == 1
