"""The recipes: field by field against the papers' tables."""

import dataclasses

import pytest

from keras_vmoe import data
from keras_vmoe import models
from keras_vmoe import training
from keras_vmoe.data import Augmentation
from keras_vmoe.models.presets import PRESETS
from keras_vmoe.training import loop
from keras_vmoe.training.recipes import RECIPES
from keras_vmoe.training.recipes import find_recipe
from tests.training.small import SMALL
from tests.training.small import history

# The Sweet Spot paper's table of hyperparameters, column by column.
COLUMNS = {
    "sweet_spot_vit_in1k": dict(
        learning_rate=3e-3,
        epochs=300, batch_size=2048, optimizer="lamb", schedule="cosine",
        weight_decay=0.03, expert_weight_decay=0.06, warmup_epochs=5,
        label_smoothing=0.0, loss="bce", test_crop=1.0,
        drop_path={"vit_s16": 0.1, "vit_b16": 0.2},
        augmentation=Augmentation(
            repeats=3, flip=True, three_augment=True, color_jitter=0.3,
            mixup=0.8, cutmix=1.0),
    ),
    "sweet_spot_vit_in21k": dict(
        learning_rate=3e-3,
        epochs=90, batch_size=2048, optimizer="lamb", schedule="cosine",
        weight_decay=0.02, expert_weight_decay=0.04, warmup_epochs=5,
        label_smoothing=0.1, loss="ce", test_crop=1.0,
        drop_path={"vit_s16": 0.0, "vit_b16": 0.1},
        augmentation=Augmentation(
            crop_area=(0.08, 1.0), flip=True, three_augment=True,
            color_jitter=0.3, cutmix=1.0),
    ),
    "sweet_spot_convnext_in1k": dict(
        learning_rate=4e-3, batch_size=4096,
        epochs=300, optimizer="adamw", schedule="cosine", weight_decay=0.05,
        expert_weight_decay=0.05, warmup_epochs=20, label_smoothing=0.1,
        loss="ce", test_crop=0.875,
        drop_path={"convnext_t": 0.1, "convnext_s": 0.3, "convnext_b": 0.6,
                   "convnext_iso_s": 0.1, "convnext_iso_b": 0.5},
        augmentation=Augmentation(
            flip=True, rand_augment=0.9, rand_augment_layers=2, mixup=0.8,
            cutmix=1.0, erasing=0.25),
    ),
    "sweet_spot_convnext_in21k": dict(
        learning_rate=4e-3, batch_size=4096,
        epochs=90, optimizer="adamw", schedule="cosine", weight_decay=0.05,
        expert_weight_decay=0.05, warmup_epochs=5, label_smoothing=0.1,
        loss="ce", test_crop=0.875,
        drop_path={"convnext_t": 0.0, "convnext_s": 0.0, "convnext_b": 0.1,
                   "convnext_iso_s": 0.1, "convnext_iso_b": 0.5},
        augmentation=Augmentation(
            crop_area=(0.08, 1.0), flip=True, rand_augment=0.9,
            rand_augment_layers=2, cutmix=1.0),
    ),
    "vmoe_b_in21k": dict(learning_rate=8e-4, clip_norm=None),
    "vmoe_l32_in21k": dict(learning_rate=6e-4, clip_norm=None),
    "vmoe_l16_in21k": dict(learning_rate=4e-4, clip_norm=None),
    "vmoe_s32_in21k": dict(
        optimizer="adamw", weight_decay=0.1, schedule="linear",
        warmup_steps=10_000, learning_rate=1e-3, batch_size=4096, epochs=300,
        final_learning_rate=1e-5, head_bias=-10.0),
    "vmoe_h14_in21k": dict(
        learning_rate=3e-4, clip_norm=1.0, loss="sigmoid", decay_gates=True),
    "sweet_spot_vit_finetune": dict(epochs=50, learning_rate=3e-4),
    "sweet_spot_convnext_finetune": dict(epochs=30, batch_size=512),
    "vmoe_finetune": dict(
        optimizer="sgd", schedule="cosine", clip_norm=10.0,
        capacity_factor=1.5),
}  # fmt: skip


@pytest.mark.parametrize("name", COLUMNS)
def test_the_papers_table(name):
    for field, value in COLUMNS[name].items():
        assert getattr(RECIPES[name], field) == value, field


@pytest.mark.parametrize("name", RECIPES)
def test_settings_make_a_configuration(name):
    recipe = RECIPES[name]
    settings = recipe.settings()
    config = training.TrainConfig(**settings)
    assert config.batch_size == recipe.batch_size and recipe.source
    assert 0 <= config.warmup < 1
    for preset in recipe.drop_path:
        assert preset in PRESETS
        name = f"{preset}_e8_last2"
        made = training.TrainConfig(**recipe.settings(name), preset=name)
        assert made.model.drop_path == recipe.drop_path[preset]
        recipe.check_model(made)
        drop_path = recipe.settings(f"{preset}_e8_last2")["model"].drop_path
        assert drop_path == recipe.drop_path[preset]


def test_what_a_preset_adds():
    settings = RECIPES["vmoe_finetune"].settings("vmoe_s32_e8_last2")
    assert settings["capacity_factor"] == 1.5
    config = training.TrainConfig(
        **settings,
        preset="vmoe_s32_e8_last2",
        model=training.ViTConfig(image_size=32),
    )
    with models.without_weights():
        model = loop.make_model(config, data.info("digits"))
    assert model.moe_layers[0].router.capacity_factor == 1.5
    config = training.TrainConfig(**settings)
    with models.without_weights():
        model = loop.make_model(config, data.info("digits"))
    assert model.moe_layers[0].router.capacity_factor == 1.5
    dense = training.TrainConfig(**settings, preset="vit_s16")
    with models.without_weights():
        model = loop.make_model(dense, data.info("digits"))
    assert dense.image_size == 224 and not model.moe_layers


def test_a_recipe_of_the_other_family():
    recipe = RECIPES["sweet_spot_convnext_in1k"]
    with pytest.raises(ValueError, match="is for a ConvNeXt. Received: a ViT"):
        recipe.check_model(training.TrainConfig())
    recipe.check_model(training.TrainConfig(convnext=training.ConvNeXtConfig()))


# V-MoE's others differ from S/32's in numbers alone.
SAME = ("vmoe_b_in21k", "vmoe_l32_in21k", "vmoe_l16_in21k", "vmoe_h14_in21k")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RECIPES if name not in SAME])
def test_every_recipe_runs(name, tmp_path):
    """A few steps, on small images and with a small model."""
    settings = {**RECIPES[name].settings(), "batch_size": 8, "epochs": 2}
    settings["warmup"] = 0.5
    if RECIPES[name].is_convnext:
        settings["convnext"] = training.ConvNeXtConfig((1, 1), (8, 16))
        settings["model"] = training.ViTConfig(image_size=8)
    config = dataclasses.replace(
        SMALL,
        **settings,
        run_dir=str(tmp_path / "run"),
        train_split="train[:16]",
        validation_split="validation[:8]",
        test_split="test[:8]",
    )
    result = training.train(config)
    assert 0 <= result.test_accuracy <= 1
    losses = [float(row["loss"]) for row in history(result.run_dir)]
    assert len(losses) == 2 and all(loss > 0 for loss in losses)


def test_unknown_recipe():
    with pytest.raises(ValueError, match="'sweet_spot_vit'. The nearest: .'sw"):
        find_recipe("sweet_spot_vit")
