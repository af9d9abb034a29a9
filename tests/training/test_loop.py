"""A run from the configuration to its files, on the embedded digits."""

import csv
import dataclasses
import json

import keras
import pytest
import yaml

from keras_vmoe import data
from keras_vmoe import models
from keras_vmoe import training
from keras_vmoe.training import loop
from keras_vmoe.training.callbacks import NonFiniteLossError

SMALL = training.TrainConfig(
    train_split="train[:128]",
    validation_split="validation[:64]",
    test_split="test[:64]",
    augmentation=data.Augmentation(crop_padding=1),
    batch_size=32,
    epochs=2,
    warmup=0.5,
    model=training.ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_dim=16,
        num_layers=2,
        num_heads=2,
        mlp_dim=32,
    ),
    moe=models.MoEConfig(layers="last_1", num_experts=4),
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One folder of prepared digits for all tests of this file."""
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture
def config(tmp_path, cache):
    return dataclasses.replace(
        SMALL, run_dir=str(tmp_path / "run"), data_dir=cache
    )


def history(run_dir):
    with open(run_dir / "history.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def result(tmp_path_factory, cache):
    run_dir = str(tmp_path_factory.mktemp("runs") / "run")
    return training.train(
        dataclasses.replace(SMALL, run_dir=run_dir, data_dir=cache)
    )


def test_run_folder(result):
    names = {path.name for path in result.run_dir.iterdir()}
    assert names == {
        "checkpoints",
        "classes.json",
        "config.yaml",
        "curves.png",
        "history.csv",
        "model.keras",
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
        "block_1_moe/dropped_share",
        "block_1_moe/load_3",
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


def test_one_seed_one_run(result, config):
    again = training.train(config)
    assert history(again.run_dir) == history(result.run_dir)


def test_weight_decay_is_on_kernels_and_positions():
    config = dataclasses.replace(
        SMALL,
        model=dataclasses.replace(
            SMALL.model, pooling="token", layer_scale=0.1, representation_size=4
        ),
    )
    info = data.info("digits")
    model = loop.make_model(config, info)
    loop.compile_model(model, config, 4)
    decayed = [
        weight.path
        for weight in model.trainable_weights
        if model.optimizer.decay_of(weight)
    ]
    kernels = [w.path for w in model.trainable_weights if w.ndim > 1]
    others = ("bias", "class_token/token")
    assert decayed == [path for path in kernels if not path.endswith(others)]
    assert "block_1_moe/experts/hidden_kernel" in decayed
    assert "block_0_attention_scale/scale" not in decayed


def test_dense_twin(config):
    result = training.train(dataclasses.replace(config, moe=None, epochs=2))
    assert result.model.moe_layers == []
    assert "auxiliary_loss" not in history(result.run_dir)[0]


def test_nan_keeps_the_last_good_model(config):
    """A learning rate that blows up: the error names the step."""
    wild = dataclasses.replace(config, learning_rate=1e30, warmup=0.0)
    with pytest.raises(NonFiniteLossError, match="at step .* of epoch"):
        training.train(wild)


def test_folder_with_files_is_not_overwritten(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.keras").write_text("precious")
    with pytest.raises(FileExistsError, match="new or empty.*Received: run_d"):
        training.train(config)
    assert (tmp_path / "run" / "model.keras").read_text() == "precious"


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(dataset="digitz"), "Received: name='digitz'"),
        (dict(train_split="training"), "Received: split='training'"),
        (
            dict(
                moe=models.MoEConfig(
                    layers="last_1", num_experts=2, num_selected_experts=3
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
        training.train(dataclasses.replace(config, **change))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(batch_size=0), "`batch_size` must be positive. Received"),
        (dict(epochs=-1), "`epochs` must be positive"),
        (dict(learning_rate=0.0), "`learning_rate` must be positive"),
        (
            dict(weight_decay=-1.0),
            "`weight_decay` must be at least 0. Received",
        ),
        (dict(learning_rate=float("nan")), "learning_rate=nan"),
        (dict(warmup=1.0), "`warmup` must be at least 0 and below 1"),
    ],
)
def test_settings_are_checked_when_made(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(SMALL, **change)


@pytest.mark.slow
def test_policies_of_the_configuration_reach_the_model(config):
    model = dataclasses.replace(config.model, dtype="mixed_bfloat16")
    result = training.train(dataclasses.replace(config, model=model))
    assert result.model.get_layer("block_1_moe").compute_dtype == "bfloat16"
    assert keras.config.dtype_policy().name == "float32"


# Other losses, optimizers, starts.


@pytest.mark.parametrize(
    "changes",
    [
        dict(optimizer="lamb", loss="bce", expert_weight_decay=0.1),
        dict(optimizer="sgd", label_smoothing=0.1, clip_norm=1.0,
             schedule="linear"),
        dict(accumulate=2, ema=0.9, schedule="rsqrt"),
        dict(augmentation=data.Augmentation(flip=True, mixup=0.8), moe=None),
    ],
    ids=["lamb", "sgd", "ema", "mixup"],
)  # fmt: skip
def test_other_settings(config, changes):
    result = training.train(dataclasses.replace(config, **changes))
    rows = history(result.run_dir)
    assert len(rows) == 2 and float(rows[-1]["loss"]) > 0


def test_a_preset(config):
    model = dataclasses.replace(config.model, image_size=32, drop_path=0.1)
    changed = dataclasses.replace(
        config, preset="convnext_iso_s_e8_last2", model=model
    )
    made = loop.make_model(changed, data.info("digits"))
    assert made.drop_path == 0.1 and made.output_shape == (None, 10)


def test_fine_tuning(result, config, tmp_path):
    """Other classes, another resolution, all but the head frozen."""
    start = result.run_dir / "model.keras"
    changed = dataclasses.replace(
        config,
        init=str(start),
        freeze="backbone",
        num_classes=12,
        model=dataclasses.replace(config.model, image_size=16),
    )
    with pytest.warns(UserWarning, match="other classes"):
        tuned = training.train(changed).model
    assert tuned.output_shape == (None, 12)
    kernel = tuned.get_layer("block_1_moe").experts.hidden_kernel
    before = result.model.get_layer("block_1_moe").experts.hidden_kernel
    assert (kernel.numpy() == before.numpy()).all()
    assert [w.path for w in tuned.trainable_weights] == [
        "head/kernel", "head/bias"
    ]  # fmt: skip


def test_frozen_routers(config):
    made = loop.make_model(
        dataclasses.replace(config, freeze="routers"), data.info("digits")
    )
    frozen = [w.path for w in made.weights if not w.trainable]
    assert frozen == ["block_1_moe/router/gate/kernel"]


def test_weights_of_another_model_are_refused(result, config):
    model = dataclasses.replace(config.model, hidden_dim=32)
    changed = dataclasses.replace(
        config, init=str(result.run_dir / "model.keras"), model=model
    )
    with pytest.raises(ValueError, match="same model. Received: layers that"):
        training.train(changed)


def test_a_description(config):
    text = training.describe(config)
    assert "optimizer: adamw" in text and "million active per token" in text
    assert "steps: 4 per epoch, 8 in all, 4 of warm-up" in text
    assert "memory, estimated" in text
