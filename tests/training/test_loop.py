"""A run from the configuration to its files, on the embedded digits."""

import dataclasses
import json
import os
import pathlib
import types

import keras
import numpy as np
import pytest
import yaml

from keras_vmoe import _files
from keras_vmoe import data
from keras_vmoe import models
from keras_vmoe import training
from keras_vmoe.data.folders import ImageFolder
from keras_vmoe.training import batches
from keras_vmoe.training import building
from keras_vmoe.training import loop
from keras_vmoe.training import recipes
from keras_vmoe.training.callbacks import NonFiniteLossError
from keras_vmoe.training.checkpointing import SaveCheckpoint
from keras_vmoe.training.initialization import starting_model
from tests.training.small import SMALL
from tests.training.small import changed
from tests.training.small import history

# Nothing of it depends on the backend.
once = pytest.mark.backends("torch")


def test_run_folder(result):
    names = {path.name for path in result.run_dir.iterdir()}
    assert names == {
        "classes.json",
        "config.yaml",
        "curves.png",
        "history.csv",
        "model.keras",
        "predictions.npz",
        "result.json",
    }
    rows = history(result.run_dir)
    assert len(rows) == 2
    for column in (
        "loss",
        "accuracy",
        "val_loss",
        "val_accuracy",
        "auxiliary_loss",
        "dropped_share",
        "min_expert_load",
        "max_expert_load",
        "block_0_moe/dropped_share",
        "block_0_moe/load_3",
    ):
        assert rows[1][column] != ""
    assert 0 <= result.test_accuracy <= 1
    classes = json.loads((result.run_dir / "classes.json").read_text())
    assert classes == [str(digit) for digit in range(10)]
    settings = yaml.safe_load((result.run_dir / "config.yaml").read_text())
    assert settings["moe"]["num_experts"] == 4
    saved = models.load(result.run_dir / "model.keras")
    for one, other in zip(saved.weights, result.model.weights, strict=True):
        assert (one.numpy() == other.numpy()).all()


@once
def test_weight_decay_is_on_kernels_and_positions():
    config = changed(
        SMALL,
        model=dataclasses.replace(
            SMALL.model,
            pooling="token",
            layer_scale_init_value=0.1,
            representation_size=4,
            remat=True,
        ),
    )
    info = data.info("digits")
    model = starting_model(config, info)
    assert model.remat
    building.compile_model(model, config, 4 * config.epochs)
    decayed = [
        weight.path
        for weight in model.trainable_weights
        if model.optimizer.decay_of(weight)
    ]
    kernels = [w.path for w in model.trainable_weights if w.ndim > 1]
    others = ("bias", "class_token/token")
    assert decayed == [path for path in kernels if not path.endswith(others)]
    assert "block_0_moe/experts/hidden_kernel" in decayed
    assert "block_0_attention_scale/scale" not in decayed


@pytest.fixture
def folder(tmp_path):
    """Folders of images, where one image of the training is corrupt."""
    root = tmp_path / "images"
    for split, count in (("train", 16), ("validation", 4), ("test", 4)):
        for i in range(count):
            path = root / split / "ab"[i % 2] / f"{i:02}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            keras.utils.save_img(
                path, np.full((12, 12, 3), 10 * i), scale=False
            )
    bad = root / "train" / "b" / "05.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    return root


@pytest.mark.backends("torch")
def test_corrupt_images_are_named_or_left_out(config, folder, capsys):
    """Left out in a run on a folder without splits, a share of it held out."""
    config = changed(
        config, dataset="image_folder", data_dir=str(folder), batch_size=4,
        train_split="train", validation_split="validation", test_split="test",
        epochs=1, moe=None,
    )  # fmt: skip
    with pytest.raises(OSError, match="05.jpg, which is corrupt, in the split"):
        training.train(config)
    config = changed(
        config, skip_corrupt=True, run_dir=config.run_dir + "_left_out",
        data_dir=str(folder / "train"),
    )  # fmt: skip
    words = "split='validation'.*`validation_split`; --validation_share 0.1"
    info = data.info("image_folder", config.data.data_dir)
    with pytest.raises(ValueError, match=words):
        batches.load(config, info, "validation_split", training=False)
    config = changed(config, validation_share=0.25)
    with pytest.warns(UserWarning, match="05.jpg cannot be decoded"):
        result = training.train(config)
    assert len(history(result.run_dir)) == 1
    printed = capsys.readouterr().out
    assert "test: on the validation images, train[12:]; " in printed
    assert ", train[:12], in 1 epoch\n" in printed
    reads = recipes.load(result.run_dir / "config.yaml").data
    assert reads.train_split == "train[:12]"
    assert reads.validation_split == reads.test_split == "train[12:]"
    _, labels = ImageFolder(reads.data_dir).files("train[12:]")
    assert sorted(labels) == [0, 0, 1, 1]


@once
def test_a_share_of_the_training_split(config):
    """Rounded, at least one image; tests on it only where there are none."""

    def cut(size, share, splits=(), **changes):
        names = {"validation_split": "validation", "test_split": "test"}
        changes = {**names, "train_split": "train", **changes}
        info = types.SimpleNamespace(splits={"train": size, **dict(splits)})
        other = changed(config, validation_share=share, **changes)
        reads = batches.with_splits(other, info).data
        assert reads.validation_share is None
        return reads.train_split, reads.validation_split, reads.test_split

    held = "train[13:]"
    assert cut(15, 0.12) == ("train[:13]", held, held)
    assert cut(14, 0.01) == ("train[:13]", held, held)
    assert cut(15, 0.12, {"test": 9}) == ("train[:13]", held, "test")
    kept = cut(15, 0.12, test_split="train[:5]")
    assert kept == ("train[:13]", held, "train[:5]")
    with pytest.raises(ValueError, match="validation_split='train.:5.'"):
        cut(15, 0.12, validation_split="train[:5]")


@pytest.mark.backends("torch")
def test_logs_for_tensorboard(config, result):
    """They change nothing of the run, which has one history for one seed."""
    again = training.train(changed(config, tensorboard=True))
    files = {
        path.relative_to(again.run_dir / "tensorboard").parts[0]
        for path in again.run_dir.glob("tensorboard/*/*tfevents*")
    }
    assert files == {"train", "validation", "routing"}
    assert history(again.run_dir) == history(result.run_dir)


@once
def test_nan_keeps_the_last_good_model(config):
    """A learning rate that blows up: the error names the step."""
    wild = changed(config, learning_rate=1e30, warmup=0.0)
    with pytest.raises(NonFiniteLossError, match="at step .* of epoch"):
        training.train(wild)


@pytest.mark.backends("torch")
@pytest.mark.parametrize(
    ("kind", "ema"),
    [
        pytest.param(KeyboardInterrupt, None, marks=once),
        (NonFiniteLossError, 0.5),
    ],
)
def test_an_interrupted_run_leaves_its_last_whole_epoch(
    config, result, kind, ema, monkeypatch
):
    config = changed(config, ema=ema)

    class Interrupted(SaveCheckpoint):
        def on_train_batch_end(self, batch, logs=None):
            if (batch, len(self.checkpoints.epochs())) == (1, 1):
                raise kind

    monkeypatch.setattr(loop, "SaveCheckpoint", Interrupted)
    with pytest.raises(kind):
        training.train(config)
    model = models.load(pathlib.Path(config.run_dir) / "model.keras")
    again = training.restore(config.run_dir)
    for mine, theirs in zip(model.weights, again.weights, strict=True):
        np.testing.assert_array_equal(mine.numpy(), theirs.numpy())
    monkeypatch.undo()
    whole = training.train(config)
    if ema is None:
        assert history(whole.run_dir) == history(result.run_dir)


@once
def test_folder_with_files_is_not_overwritten(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.keras").write_text("precious")
    with pytest.raises(FileExistsError, match="new or empty.*Received: run_d"):
        training.train(config)
    assert (tmp_path / "run" / "model.keras").read_text() == "precious"


@once
def test_two_runs_in_a_folder(config, tmp_path):
    """The second is refused; a lock that a dead process left holds nobody."""
    (tmp_path / "run").mkdir()
    left = tmp_path / "run" / ".partial.lock"
    left.write_text("process 1 on nowhere")
    with _files.locked(tmp_path / "run"):
        words = f"to one process at a time.*process {os.getpid()} on"
        with pytest.raises(BlockingIOError, match=words):
            training.train(config)
        assert list((tmp_path / "run").iterdir()) == [left]
    assert not left.exists()


@once
@pytest.mark.parametrize(
    "change, words",
    [
        (dict(dataset="digitz"), "Received: name='digitz'"),
        (dict(train_split="training"), "Received: split='training'"),
        (
            dict(validation_share=0.1),
            "taken from a whole split.*train_split='train.:128.'",
        ),
        (
            dict(
                moe=models.MoEConfig(
                    layers="every_1", num_experts=2, num_selected_experts=3
                )
            ),
            "num_selected_experts=3 with num_experts=2",
        ),
        (
            dict(model=dataclasses.replace(SMALL.model, patch_size=3)),
            "image_size=.*patch_size=3",
        ),
    ],
)
def test_bad_settings_write_nothing(config, tmp_path, change, words):
    with pytest.raises((ValueError, OSError), match=words):
        training.train(changed(config, **change))
    assert not (tmp_path / "run").exists()


@once
@pytest.mark.parametrize(
    "change, words",
    [
        (dict(batch_size=0), "`data.batch_size` must be an integer of at"),
        (dict(epochs=-1), "`epochs` must be an integer"),
        (dict(learning_rate=0.0), "`learning_rate` must be a positive number"),
        (dict(optimizer="adam"), "`optimizer.name` must be one of .*lamb"),
        (dict(freeze="router"), "`model.freeze` must be one of .*'backbone'"),
        (dict(capacity_factor=-1.0), "`capacity_factor` must be positive"),
        (
            dict(weight_decay=-1.0),
            "`weight_decay` must be .* not negative. Received",
        ),
        (dict(learning_rate=float("nan")), "learning_rate=nan"),
        (
            dict(warmup=1.0),
            "`warmup` must be a number of at least 0",
        ),
        (
            dict(warmup=0.1, warmup_steps=9),
            "must be set by one of .*Received: warmup=0.1, warmup_steps=9. Set",
        ),
        (
            dict(warmup=None, warmup_epochs=2),
            "`warmup_epochs` must be below epochs=2. Received",
        ),
        (dict(warmup=None, warmup_epochs=-1), "warmup_epochs=-1"),
        (dict(validation_share=1.0), "must be below 1. Received: .*=1.0"),
        (dict(warmup=None, warmup_steps=0), "warmup_steps"),
    ],
)
def test_settings_are_checked_when_made(change, words):
    with pytest.raises(ValueError, match=words):
        changed(SMALL, **change)


@pytest.mark.backends("torch")
@pytest.mark.slow
def test_policies_of_the_configuration_reach_the_model(config):
    model = dataclasses.replace(config.model, dtype="mixed_bfloat16")
    result = training.train(changed(config, model=model))
    assert result.model.get_layer("block_0_moe").compute_dtype == "bfloat16"
    assert keras.config.dtype_policy().name == "float32"
