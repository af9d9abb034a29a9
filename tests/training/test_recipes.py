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

pytestmark = pytest.mark.backends("jax")

# What a recipe does unless its table says otherwise.
PLAIN = dict(
    schedule="cosine", final_learning_rate=0.0, head_bias=0.0,
    warmup_epochs=0.0, warmup_steps=None, expert_weight_decay=None,
    augmentation=Augmentation(), loss="ce", label_smoothing=0.0,
    test_crop=None, decay_gates=False, decay_positions=False, clip_norm=None,
    capacity_factor=None, drop_path={}, is_convnext=False,
)  # fmt: skip
CONVNEXT_DROP_PATH = {
    "convnext_t": 0.0, "convnext_s": 0.0, "convnext_b": 0.1,
    "convnext_iso_s": 0.1, "convnext_iso_b": 0.5,
}  # fmt: skip
V_MOE = PLAIN | dict(
    epochs=300, batch_size=4096, optimizer="adamw", schedule="linear",
    final_learning_rate=1e-5, weight_decay=0.1, warmup_epochs=None,
    warmup_steps=10_000, head_bias=-10.0, loss="sigmoid", test_crop=0.875,
    decay_gates=True,
    augmentation=Augmentation(
        crop_area=(0.08, 1.0), flip=True, rand_augment=2.0,
        rand_augment_layers=2, mixup=0.5),
)  # fmt: skip
# The papers' tables of hyperparameters, column by column, whole.
TABLE = {
    "sweet_spot_vit_in1k": PLAIN | dict(
        epochs=300, batch_size=2048, optimizer="lamb", learning_rate=3e-3,
        weight_decay=0.03, expert_weight_decay=0.06, warmup_epochs=5,
        loss="bce", test_crop=1.0,
        drop_path={"vit_s16": 0.1, "vit_b16": 0.2},
        augmentation=Augmentation(
            repeats=3, flip=True, three_augment=True, color_jitter=0.3,
            mixup=0.8, cutmix=1.0),
    ),
    "sweet_spot_vit_in21k": PLAIN | dict(
        epochs=90, batch_size=2048, optimizer="lamb", learning_rate=3e-3,
        weight_decay=0.02, expert_weight_decay=0.04, warmup_epochs=5,
        label_smoothing=0.1, test_crop=1.0,
        drop_path={"vit_s16": 0.0, "vit_b16": 0.1},
        augmentation=Augmentation(
            crop_area=(0.08, 1.0), flip=True, three_augment=True,
            color_jitter=0.3, cutmix=1.0),
    ),
    "sweet_spot_convnext_in1k": PLAIN | dict(
        epochs=300, batch_size=4096, optimizer="adamw", learning_rate=4e-3,
        weight_decay=0.05, expert_weight_decay=0.05, warmup_epochs=20,
        label_smoothing=0.1, test_crop=0.875, is_convnext=True,
        drop_path={"convnext_t": 0.1, "convnext_s": 0.3, "convnext_b": 0.6,
                   "convnext_iso_s": 0.1, "convnext_iso_b": 0.5},
        augmentation=Augmentation(
            flip=True, rand_augment=0.9, rand_augment_layers=2, mixup=0.8,
            cutmix=1.0, erasing=0.25),
    ),
    "sweet_spot_convnext_in21k": PLAIN | dict(
        epochs=90, batch_size=4096, optimizer="adamw", learning_rate=4e-3,
        weight_decay=0.05, expert_weight_decay=0.05, warmup_epochs=5,
        label_smoothing=0.1, test_crop=0.875, is_convnext=True,
        drop_path=CONVNEXT_DROP_PATH,
        augmentation=Augmentation(
            crop_area=(0.08, 1.0), flip=True, rand_augment=0.9,
            rand_augment_layers=2, cutmix=1.0),
    ),
    "vmoe_s32_in21k": V_MOE | dict(learning_rate=1e-3),
    "vmoe_b_in21k": V_MOE | dict(learning_rate=8e-4),
    "vmoe_l32_in21k": V_MOE | dict(learning_rate=6e-4),
    "vmoe_l16_in21k": V_MOE | dict(learning_rate=4e-4),
    "vmoe_h14_in21k": V_MOE | dict(learning_rate=3e-4, clip_norm=1.0),
    "vmoe_finetune": PLAIN | dict(
        epochs=8, batch_size=512, optimizer="sgd", learning_rate=3e-3,
        weight_decay=0.0, clip_norm=10.0, capacity_factor=1.5,
        augmentation=Augmentation(crop_area=(0.08, 1.0), flip=True),
    ),
    "sweet_spot_vit_finetune": PLAIN | dict(
        epochs=50, batch_size=2048, optimizer="lamb", learning_rate=3e-4,
        weight_decay=0.02, expert_weight_decay=0.04, warmup_epochs=5,
        label_smoothing=0.1, test_crop=1.0,
        drop_path={"vit_s16": 0.0, "vit_b16": 0.1},
        augmentation=Augmentation(
            crop_area=(0.08, 1.0), flip=True, three_augment=True,
            color_jitter=0.3, cutmix=1.0),
    ),
    "sweet_spot_convnext_finetune": PLAIN | dict(
        epochs=30, batch_size=512, optimizer="adamw", learning_rate=5e-5,
        weight_decay=1e-8, label_smoothing=0.1, test_crop=0.875,
        is_convnext=True, drop_path=CONVNEXT_DROP_PATH,
        augmentation=Augmentation(
            crop_area=(0.08, 1.0), flip=True, rand_augment=0.9,
            rand_augment_layers=2, erasing=0.25),
    ),
    "digits_small": PLAIN | dict(
        epochs=60, batch_size=64, optimizer="adamw", learning_rate=2e-3,
        weight_decay=0.3, warmup_epochs=5, decay_gates=True,
        decay_positions=True, augmentation=Augmentation(crop_padding=3),
    ),
    "cifar10_small": PLAIN | dict(
        epochs=6, batch_size=64, optimizer="adamw", learning_rate=2e-3,
        weight_decay=0.1, warmup_epochs=0.6, clip_norm=1.0,
        augmentation=Augmentation(crop_padding=4, flip=True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_the_papers_table(name):
    expected = {**TABLE[name]}
    expected["augmentation"] = dataclasses.asdict(expected["augmentation"])
    recipe = dataclasses.asdict(RECIPES[name])
    assert recipe.pop("source")
    assert recipe == expected


IN1K, IN21K = 1_281_167, 14_197_122


@pytest.mark.parametrize(
    ("name", "epochs", "images", "updates"),
    [
        ("sweet_spot_vit_in1k", 300, IN1K, 5 * (IN1K // 2048)),
        ("sweet_spot_convnext_in1k", 300, IN1K, 20 * (IN1K // 4096)),
        ("sweet_spot_convnext_in1k", 30, IN1K, 20 * (IN1K // 4096)),
        ("sweet_spot_vit_in21k", 10, IN21K, 5 * (IN21K // 2048)),
        ("vmoe_s32_in21k", 300, IN21K, 10_000),
        ("vmoe_s32_in21k", 10, IN21K, 10_000),
        ("vmoe_finetune", 8, IN1K, 0),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_tables_warm_up_holds(name, epochs, images, updates, accumulate):
    """Also for other epochs, and when a batch is put together of parts."""
    settings = {**RECIPES[name].settings(), "epochs": epochs}
    config = training.TrainConfig(**settings, accumulate=accumulate)
    steps = epochs * (images // config.batch_size) * accumulate
    schedule = loop.make_schedule(config, steps)
    assert schedule.warmup_steps == updates * accumulate


@pytest.mark.parametrize("name", RECIPES)
def test_settings_make_a_configuration(name):
    recipe = RECIPES[name]
    settings = recipe.settings()
    config = training.TrainConfig(**settings)
    assert config.batch_size == recipe.batch_size and recipe.source
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


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs(name, tmp_path):
    """A few steps, on small images and with a small model."""
    settings = {**RECIPES[name].settings(), "batch_size": 8, "epochs": 2}
    settings |= {"warmup": 0.5, "warmup_epochs": None, "warmup_steps": None}
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
