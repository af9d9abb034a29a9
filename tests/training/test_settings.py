"""Other losses, optimizers and starts of a run."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest

from keras_vmoe import data
from keras_vmoe import layers
from keras_vmoe import models
from keras_vmoe import training
from keras_vmoe.training import loop
from tests.training.small import history


@pytest.mark.parametrize(
    "changes",
    [
        dict(optimizer="lamb", loss="bce", expert_weight_decay=0.1),
        dict(optimizer="sgd", label_smoothing=0.1, clip_norm=1.0,
             schedule="linear"),
        dict(accumulate=2, ema=0.9, schedule="rsqrt"),
        dict(augmentation=data.Augmentation(flip=True, mixup=0.8), moe=None),
        dict(
            model=training.ViTConfig(image_size=8),
            convnext=training.ConvNeXtConfig((1, 1), (8, 16)),
            class_weights=[2.0] + [1.0] * 9,
        ),
    ],
    ids=["lamb", "sgd", "ema", "mixup", "convnext"],
)  # fmt: skip
def test_other_settings(config, changes):
    result = training.train(dataclasses.replace(config, **changes))
    rows = history(result.run_dir)
    assert len(rows) == 2 and float(rows[-1]["loss"]) > 0


PRESET = {"preset": "convnext_iso_s_e8_last2", "moe": models.MoEConfig()}


def test_a_preset(config):
    model = training.ViTConfig(image_size=32, drop_path=0.1)
    changed = dataclasses.replace(config, **PRESET, model=model)
    made = loop.make_model(changed, data.info("digits"))
    assert made.drop_path == 0.1 and made.output_shape == (None, 10)
    large = dataclasses.replace(changed, model=training.ViTConfig())
    assert changed.image_size == 32 and large.image_size == 224


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": training.ViTConfig(hidden_dim=99)}, "model.hidden_dim=99"),
        ({"moe": models.MoEConfig(num_experts=16)}, "moe=MoEConfig"),
        ({"moe": None}, "moe=None with preset="),
        ({"preset": "convnext"}, "The preset must be one of"),
        ({"convnext": training.ConvNeXtConfig()}, "convnext=ConvNeXtConfig"),
        (
            {
                "preset": None,
                "convnext": training.ConvNeXtConfig(),
                "model": training.ViTConfig(patch_size=2),
            },
            "A convnext has its own sizes. Received: model.patch_size=2 with",
        ),
    ],
)
def test_sizes_beside_a_preset_are_refused(config, changes, words):
    settings = {"model": training.ViTConfig(), **PRESET, **changes}
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(config, **settings)


def test_v_moes_first_bias_and_last_rate(config):
    changes = {"head_bias": -10.0, "final_learning_rate": 1e-5}
    config = dataclasses.replace(config, **changes)
    model = loop.make_model(config, data.info("digits"))
    assert (np.array(model.get_layer("head").bias) == -10).all()
    loop.compile_model(model, config, 8 * config.epochs)
    rate = model.optimizer._learning_rate
    assert float(rate(8 * config.epochs)) == pytest.approx(1e-5)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_rate_falls_until_the_last_step(config, accumulate):
    """Keras counts the steps of an update, too."""
    changes = {"accumulate": accumulate, "epochs": 4, "ema": 0.9}
    config = dataclasses.replace(config, **changes)
    model = loop.make_model(config, data.info("digits"))
    loop.compile_model(model, config, 8 * config.epochs)
    # As one update of the average with the momentum that was asked for.
    optimizer = model.optimizer
    assert optimizer.ema_momentum**accumulate == pytest.approx(0.9)
    rate = optimizer._learning_rate
    assert float(rate(16)) == pytest.approx(config.learning_rate)
    assert 0 < float(rate(31)) < 0.01 * config.learning_rate


def test_v_moes_loss_is_a_sum_over_classes():
    labels, logits = np.eye(3, dtype="float32"), np.zeros((3, 3), "float32")
    losses = loop.sigmoid_crossentropy(labels, logits)
    np.testing.assert_allclose(losses, 3 * np.log(2) * np.ones(3), rtol=1e-6)


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


def test_the_head_of_other_classes_starts_anew(result, config, tmp_path):
    """As many classes, by other names."""
    start = tmp_path / "start"
    start.mkdir()
    shutil.copy(result.run_dir / "model.keras", start)
    info = data.info("digits")
    kernel = result.model.get_layer("head").kernel.numpy()
    for names in (list(info.class_names), list("abcdefghij")):
        (start / "classes.json").write_text(json.dumps(names))
        changed = dataclasses.replace(config, init=str(start))
        if names[0] == "a":
            with pytest.warns(UserWarning, match="other classes"):
                made = loop.make_model(changed, info)
        else:
            made = loop.make_model(changed, info)
        same = (made.get_layer("head").kernel.numpy() == kernel).all()
        assert same == (names[0] != "a")


def test_frozen_routers(config):
    made = loop.make_model(
        dataclasses.replace(config, freeze="routers"), data.info("digits")
    )
    frozen = [w.path for w in made.weights if not w.trainable]
    assert frozen == ["block_1_moe/router/gate/kernel"]


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_bias_stays(frozen):
    """A balancing router moves its bias without a gradient."""
    router = layers.BiasBalancedRouter(4, 1)
    router.trainable = not frozen
    tokens = np.random.default_rng(0).normal(size=(2, 8, 6))
    router(tokens.astype("float32"), training=True)
    assert (np.array(router.bias) == 0).all() == frozen


def test_weights_of_another_model_are_refused(result, config):
    model = dataclasses.replace(config.model, hidden_dim=32)
    changed = dataclasses.replace(
        config, init=str(result.run_dir / "model.keras"), model=model
    )
    with pytest.raises(ValueError, match="same model. Received: layers that"):
        training.train(changed)


def test_a_description(result, config):
    # A start from other weights changes no cost.
    start = dataclasses.replace(config, init=str(result.run_dir))
    text = training.describe(start)
    assert "optimizer: adamw" in text and "million active per token" in text
    assert "steps: 4 per epoch, 8 in all, 4 of warm-up" in text
    assert "memory, estimated" in text


@pytest.mark.parametrize(
    ("changes", "warmup"),
    [
        ({"warmup": None}, 1),  # A twelfth of 16 steps.
        ({"warmup": 0.25}, 4),
        ({"warmup": None, "warmup_epochs": 3}, 12),
        ({"warmup": None, "warmup_epochs": 0.5}, 2),
        ({"warmup": None, "warmup_steps": 5}, 5),
        ({"warmup": None, "warmup_steps": 5, "accumulate": 2}, 10),
    ],
)
def test_one_of_three_sets_the_warm_up(config, changes, warmup):
    changed = dataclasses.replace(config, epochs=4, **changes)
    assert loop.make_schedule(changed, 16).warmup_steps == warmup
    text = training.describe(changed)
    assert f"steps: 4 per epoch, 16 in all, {warmup} of warm-up" in text


@pytest.mark.parametrize("do", [training.describe, training.train])
def test_a_warm_up_longer_than_the_run(config, do):
    changed = dataclasses.replace(config, warmup=None, warmup_steps=8)
    with pytest.raises(ValueError, match="warmup_steps=8, steps=8. Shorten"):
        do(changed)
    assert not pathlib.Path(config.run_dir).exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"init": "nowhere.keras"}, "must exist: a .keras file"),
        ({"expert_shards": 2}, "need a distribution"),
        ({"run_dir": "run"}, "a finished run"),
    ],
)
def test_a_description_of_what_cannot_be(result, config, changes, words):
    if "run_dir" in changes:
        changes = {"run_dir": str(result.run_dir)}
    with pytest.raises((OSError, ValueError), match=words):
        training.describe(dataclasses.replace(config, **changes))
