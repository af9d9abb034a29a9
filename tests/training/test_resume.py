"""Runs that are stopped, at any moment, end as if they had not been."""

import dataclasses
import json
import pathlib

import keras
import numpy as np
import pytest

from keras_vmoe import data
from keras_vmoe import models
from keras_vmoe import training
from keras_vmoe.training import checkpointing
from keras_vmoe.training.checkpointing import Checkpoints
from tests.models.definitions import images_of
from tests.models.definitions import tiny
from tests.training.small import SMALL
from tests.training.small import changed
from tests.training.small import history

EPOCHS = 4
# Bit-equal on JAX; the others add up in an order of their own.
EXACT = keras.backend.backend() == "jax"


def config_of(run_dir, cache, **changes):
    changes = {"epochs": EPOCHS, **changes}
    return changed(SMALL, run_dir=str(run_dir), data_dir=cache, **changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """A run that nobody disturbed."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    return training.train(config_of(run_dir, cache))


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


class Killed(BaseException):
    """What no handler of ours catches, as a kill is."""


def die_at(monkeypatch, number):
    """Lets the process die at the n-th renaming of a file."""
    count = 0
    replace = pathlib.Path.replace

    def dying(path, target):
        nonlocal count
        count += 1
        if count == number:
            raise Killed
        return replace(path, target)

    monkeypatch.setattr(pathlib.Path, "replace", dying)


# Two files at the start, then three an epoch: history, weights, state; then
# the model and the result.
# Where files stand is the same on all backends: one of them tries all.
MOMENTS = (5,)
if EXACT:
    slow = (1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16)
    MOMENTS += tuple(pytest.param(n, marks=pytest.mark.slow) for n in slow)


@pytest.mark.parametrize("number", MOMENTS)
def test_death_at_any_file(whole, number, tmp_path, cache, monkeypatch):
    config = config_of(tmp_path / "run", cache)
    with monkeypatch.context() as patch:
        die_at(patch, number)
        with pytest.raises(Killed):
            training.train(config)
    assert_same(training.train(config), whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        dict(optimizer="lamb", ema=0.9, accumulate=3,
             augmentation=data.Augmentation(crop_padding=1, mixup=0.8)),
        dict(model=dataclasses.replace(
            SMALL.model, dropout=0.1, drop_path_rate=0.2)),
    ],
    ids=["lamb-ema-accumulate-mixup", "dropout-drop_path"],
)  # fmt: skip
def test_whatever_a_run_remembers(changes, tmp_path, cache):
    """Slots, averages, gradients half added up, seeds of all layers.

    Three epochs are twelve steps: two updates are behind the second of them,
    and two thirds of another.
    """
    config = config_of(tmp_path / "run", cache, epochs=3, **changes)
    undisturbed = changed(config, run_dir=str(tmp_path / "whole"))
    stop_after(config, 2)
    assert_same(training.train(config), training.train(undisturbed))


def test_checkpoints_within_an_epoch(whole, tmp_path, cache):
    """Steps and their images are those of whole epochs."""
    config = config_of(tmp_path / "run", cache, checkpoints_per_epoch=2)
    stop_after(config, 3)  # In the middle of the second epoch.
    result = training.train(config)
    rows = history(result.run_dir)
    assert [row["epoch"] for row in rows] == [str(i) for i in range(1, 9)]
    pairs = (x.model.trainable_weights for x in (result, whole))
    for mine, theirs in zip(*pairs, strict=True):
        mine, theirs = np.array(mine), np.array(theirs)
        np.testing.assert_allclose(mine, theirs, atol=0 if EXACT else 1e-4)


def test_more_checkpoints_than_steps(tmp_path, cache):
    config = config_of(tmp_path / "run", cache, checkpoints_per_epoch=5)
    with pytest.raises(ValueError, match="checkpoints_per_epoch=5 with 4"):
        training.train(config)


def test_a_truncated_checkpoint_falls_back(whole, tmp_path, cache):
    config = config_of(tmp_path / "run", cache)
    stop_after(config, 3)
    folder = tmp_path / "run" / "checkpoints"
    path = folder / "epoch_000003.weights.h5"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="epoch_000003.* is damaged"):
        result = training.train(config)
    assert_same(result, whole)


def stop_after(config, epochs):
    """Trains some epochs of a run and stops as by an interrupt."""

    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == epochs:
                raise Killed

    save = checkpointing.SaveCheckpoint

    class SaveAndStop(save, Stop):
        pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.loop, "SaveCheckpoint", SaveAndStop)
        with pytest.raises(Killed):
            training.train(config)


def test_a_run_without_a_checkpoint_is_started_anew(tmp_path, cache):
    config = config_of(tmp_path / "run", cache, epochs=1)
    stop_after(config, 0)
    assert (tmp_path / "run" / "config.yaml").exists()
    training.train(changed(config, learning_rate=0.001))
    assert not (tmp_path / "run" / "checkpoints").exists()  # It is finished.


def test_another_configuration_is_refused(tmp_path, cache):
    config = config_of(tmp_path / "run", cache)
    stop_after(config, 1)
    other = changed(
        config,
        learning_rate=0.5,
        augmentation=data.Augmentation(crop_padding=2),
    )
    words = (
        "these differ: data.augmentation.crop_padding: 1 there, 2 here; "
        "optimizer.learning_rate: 0.002 there, 0.5 here. Name another folder"
    )
    with pytest.raises(ValueError, match=words):
        training.train(other)


def test_a_finished_run_is_not_run_again(whole, cache):
    with pytest.raises(FileExistsError, match="which holds a finished run"):
        training.train(config_of(whole.run_dir, cache))
    result = json.loads((whole.run_dir / "result.json").read_text())
    assert result["accuracy"] == pytest.approx(whole.test_accuracy)


# Checkpoints by themselves.


def fitted():
    model = tiny(num_layers=2, moe={"layers": [1]})
    model.compile("adam", "mse")
    model.fit(images_of(4), np.ones((4, 10)), shuffle=False, verbose=0)
    return model


def test_a_checkpoint_holds_weights_optimizer_and_noise(tmp_path):
    model = fitted()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(model, 1, {"rows": [1, 2]})
    model.fit(images_of(4), np.ones((4, 10)), shuffle=False, verbose=0)
    expected = model.get_weights()

    twin = tiny(num_layers=2, moe={"layers": [1]})
    twin.compile("adam", "mse")
    state = checkpoints.restore(twin)
    assert state["rows"] == [1, 2] and state["epoch"] == 1
    twin.fit(images_of(4), np.ones((4, 10)), shuffle=False, verbose=0)
    for mine, theirs in zip(twin.get_weights(), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)


def test_only_the_newest_are_kept(tmp_path):
    model, checkpoints = fitted(), Checkpoints(tmp_path, keep=2)
    for epoch in range(1, 5):
        checkpoints.save(model, epoch, {})
    assert checkpoints.epochs() == [3, 4]
    assert len(list(tmp_path.iterdir())) == 4
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)


def test_an_unreadable_disk_loses_no_checkpoint(tmp_path, monkeypatch):
    """What may pass is an error and no damage."""
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
    with pytest.warns(UserWarning, match="damaged"):
        assert checkpoints.restore(model) is None
    assert checkpoints.epochs() == []


# h5py has a RuntimeError of its own for it.
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
