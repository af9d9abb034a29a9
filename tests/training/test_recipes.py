"""The recipes: each loads, makes a model and runs; what files may hold."""

import re

import keras
import pytest
import yaml

from keras_vmoe import data
from keras_vmoe import training
from keras_vmoe.models.costs import without_weights
from keras_vmoe.models.presets import PRESETS
from keras_vmoe.training import building
from keras_vmoe.training import recipes
from keras_vmoe.training.architecture import resolved
from keras_vmoe.training.config import GROUPS
from keras_vmoe.training.config import given
from keras_vmoe.training.run_folder import settings_of
from tests.training.small import SMALL
from tests.training.small import changed
from tests.training.small import history

pytestmark = pytest.mark.backends("torch")

CONVNEXTS = [name for name in recipes.names() if "convnext" in name]
# The models in the Sweet Spot paper's tables 1 and 2, arXiv:2411.18322, by the
# images they were trained on first.
VITS, CONVNEXT = (
    ("vit_s16", "vit_b16"),
    ("convnext_t", "convnext_s", "convnext_b"),
)
TRAINED = {
    "sweet_spot_vit_in1k": VITS,
    "sweet_spot_vit_in21k": VITS,
    "sweet_spot_convnext_in1k": (*CONVNEXT, "convnext_iso_s", "convnext_iso_b"),
    "sweet_spot_convnext_in21k": CONVNEXT,
    "swin_moe_in21k": ("swin_s_192", "swin_b_192"),
}


def load(name, **settings):
    """A recipe; one for a ConvNeXt has a small one."""
    if name in CONVNEXTS:
        settings.setdefault("convnext", {"depths": [1, 1], "dims": [8, 16]})
    if name.startswith("swin"):
        sizes = {"depths": [1, 1], "dims": [8, 16], "num_heads": [2, 2]}
        settings.setdefault("swin", sizes)
    return recipes.load(name, **settings)


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_says_where_it_is_from(name):
    text = (recipes.FOLDER / f"{name}.yaml").read_text()
    note = [line for line in text.splitlines() if line.startswith("#")]
    for word in ("# Source: ", "# Command:", "# Result: "):
        assert any(line.startswith(word) for line in note)
    assert f"--recipe {name}" in text or "benchmarks/" in text


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_makes_its_models(name):
    config = load(name)
    rates = config.model.drop_path_rate
    assert not rates or set(rates) <= set(PRESETS)
    for preset in list(rates or [])[:1]:
        sparse = next(x for x in PRESETS if x.startswith(f"{preset}_e8"))
        made = recipes.load(name, model={"preset": sparse})
        assert made.drop_path_rate == rates[preset]
        with without_weights():
            model = building.make_model(made, 10)
        assert model.moe_layers


@pytest.mark.parametrize("name", TRAINED)
def test_presets_of_the_sweet_spot_paper_have_a_recipe(name):
    """With a drop path rate of their own."""
    for preset in TRAINED[name]:
        config = recipes.load(name, model={"preset": preset})
        assert preset in config.model.drop_path_rate


IN1K, IN21K = 1_281_167, 14_197_122


@pytest.mark.parametrize(
    ("name", "epochs", "images", "updates"),
    [
        ("sweet_spot_vit_in1k", 300, IN1K, 5 * (IN1K // 2048)),
        ("sweet_spot_convnext_in1k", 300, IN1K, 20 * (IN1K // 4096)),
        ("sweet_spot_convnext_in1k", 30, IN1K, 20 * (IN1K // 4096)),
        ("sweet_spot_vit_in21k", 10, IN21K, 5 * (IN21K // 2048)),
        ("vmoe_s32_in21k", 300, IN21K, 10_000),
        ("vmoe_h14_in21k", 10, IN21K, 10_000),
        ("vmoe_finetune", 8, IN1K, 0),
        ("swin_moe_in21k", 90, IN21K, 10 * (IN21K // 4096)),
        ("e3_finetune", 42, 49_000, 200),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_tables_warm_up_holds(name, epochs, images, updates, accumulate):
    """Also for other epochs, and when a batch is put together of parts."""
    config = load(name, epochs=epochs, optimizer={"accumulate": accumulate})
    steps = epochs * (images // config.data.batch_size) * accumulate
    schedule = building.make_schedule(config, steps)
    assert schedule.warmup_steps == updates * accumulate


def test_a_recipe_based_on_another():
    small, huge = recipes.load("vmoe_s32_in21k"), recipes.load("vmoe_h14_in21k")
    assert huge.optimizer.learning_rate == 3e-4
    assert huge.optimizer.clip_norm == 1.0 and small.optimizer.clip_norm is None
    same = {"preset": small.model.preset, "clip_norm": None}
    assert changed(huge, learning_rate=1e-3, **same) == small


@pytest.mark.parametrize("preset", ["vmoe_s32_e8_last2", None, "vit_s16"])
def test_the_capacity_of_fine_tuning(preset):
    size = None if preset is None else 32
    config = recipes.load(
        "vmoe_finetune", model={"preset": preset, "image_size": size}
    )
    with without_weights():
        model = building.make_model(config, 10)
    assert preset != "vit_s16" or not model.moe_layers
    for layer in model.moe_layers:
        assert layer.router.capacity_factor == 1.5


def test_a_recipe_of_the_other_family():
    with pytest.raises(ValueError, match="is for a ConvNeXt. Received: a ViT"):
        recipes.load("sweet_spot_convnext_in1k", model={"preset": "vit_s16"})
    with pytest.raises(ValueError, match="is for a ViT. Received: a ConvNeXt"):
        recipes.load("vmoe_b_in21k", model={"preset": "convnext_t"})
    with pytest.raises(ValueError, match="is for a ViT. Received: a Swin"):
        recipes.load("vmoe_b_in21k", model={"preset": "swin_s_192"})
    with pytest.raises(ValueError, match="A Swin has its own sizes. Received"):
        training.TrainConfig(
            swin=training.SwinConfig(),
            model=training.ModelConfig(hidden_dim=8),
        )


def test_k_of_an_ensemble_is_that_of_the_reference():
    config = recipes.load("e3_finetune")
    assert config.model.ensemble_size == 2
    with without_weights():
        model = building.make_model(changed(config, image_size=32), 10)
    (moe, *_) = model.moe_layers
    assert moe.router.num_selected_experts == 1
    assert moe.router.capacity_factor == 1.5


@pytest.mark.parametrize("name", ["swin_moe_in21k", "swin_moe_finetune"])
def test_pixels_of_swin_are_those_of_imagenet(name):
    wanted = recipes.load(name).data
    imagenet = data.Preprocessing.imagenet()
    assert tuple(wanted.mean) == tuple(imagenet.mean)
    assert tuple(wanted.std) == tuple(imagenet.std)
    assert wanted.interpolation == "bicubic"


def test_an_ensemble_of_sigmoids():
    with pytest.raises(ValueError, match="Set loss='ce'"):
        training.TrainConfig(
            model=training.ModelConfig(ensemble_size=2),
            optimizer=training.OptimizerConfig(loss="bce"),
        )


@pytest.mark.parametrize("name", recipes.names())
def test_a_dry_run_needs_no_dataset(name):
    """It is of what the recipe says, and says what is missing."""
    text = training.describe(recipes.load(name))
    assert "million active per token" in text
    if name != "digits_small":
        assert re.search(r"steps: [\d.]+ per 1,000 images, in \d+ epochs", text)
        assert "note: a run would be refused." in text
    assert ("needs a model to start from" in text) == ("finetune" in name)


@pytest.mark.slow
@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_runs(name, tmp_path):
    """A few steps, on small images and with a small model."""
    config = changed(
        load(name), epochs=2, batch_size=8, image_size=8, warmup=0.5,
        warmup_epochs=None, warmup_steps=None, run_dir=str(tmp_path / "run"),
        train_split="train[:16]", validation_split="validation[:8]",
        test_split="test[:8]", dataset="digits", preset=None, needs_init=False,
    )  # fmt: skip
    if config.family == "vit":
        config = changed(
            config, patch_size=4, hidden_dim=16, num_layers=1, num_heads=2,
            mlp_dim=32, moe=SMALL.moe,
        )  # fmt: skip
    result = training.train(config)
    first, last = (float(x["loss"]) for x in history(result.run_dir))
    assert 0 < last < 1.5 * first


# Files.


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epohs: 3", r"recipe.yaml, with epohs=3. Did you mean 'epochs'\?"),
        ("lerning_rate: 1e-3", "Did you mean 'learning_rate'"),
        ("optimizer: {lerning_rate: 1}", "`optimizer` takes the keys .*learn"),
        ("data: {augmentation: {flop: true}}", "Did you mean 'flip'"),
        ("moe: {num_expert: 4}", "Did you mean 'num_experts'"),
        ("convnext: {dim: [1]}", "Did you mean 'dims'"),
        ("recipe: digits_smal", "Did you mean 'digits_small'"),
        ("optimizer: {schedule: null}", "`optimizer.schedule` must be one of"),
        ("data: {skip_corrupt: maybe}", "`data.skip_corrupt` must be True or"),
        ("data: 5", "`data` must be a mapping of names"),
        ("optimizer: null", "`optimizer` must be a mapping .*optimizer=None"),
        ("data: null", "`data` must be a mapping .*Leave it out"),
        ("model: null", "`model` must be a mapping"),
        ("checkpoint: null", "`checkpoint` must be a mapping"),
        ("devices: []", r"`devices` must be a mapping .*devices=\[\]"),
        ("recipe: 3", "`recipe` must be the name .*Received: recipe=3 in"),
        ("recipe: {a: 1}", "`recipe` must be the name"),
        ("recipe: RING", "must not be based on itself. Received: recipe="),
        ("moe: 3", "moe.* must be a .*3"),
        ("convnext: 3", "`convnext` must be a mapping"),
        ("moe: {capacity_factor: null}", "Write 'dropless', or leave it out"),
        ("moe: {images_per_group: null}", "Write 'batch', or leave it out"),
        ("[1, 2]", "must be a mapping of names to values"),
        ("", "recipe.yaml, which holds None. An empty one is {}"),
        ("recipe: none/x.yaml", "must be an existing YAML file. Received: n"),
        ("a: [", "must be a YAML file. Received: .*recipe.yaml"),
    ],
)
def test_a_wrong_recipe_is_named(tmp_path, text, words):
    write(tmp_path, text.replace("RING", str(tmp_path / "b.yaml")))
    (tmp_path / "b.yaml").write_text(f"recipe: {tmp_path / 'recipe.yaml'}")
    with pytest.raises(ValueError, match=words):
        recipes.load(tmp_path / "recipe.yaml")


def test_every_group_is_of_its_class():
    for name in GROUPS:
        with pytest.raises(ValueError, match=f"`{name}` must be of the class"):
            training.TrainConfig(**{name: None})


def test_unknown_recipe():
    with pytest.raises(ValueError, match="vit_in1. Did you mean 'sweet_spot_v"):
        recipes.load("sweet_spot_vit_in1")


def test_groups_may_be_left_out(tmp_path):
    path = write(tmp_path, "learning_rate: 1e-3\nmodel: {hidden_dim: 32}")
    config = recipes.load(path, model={"num_layers": 2})
    assert config.optimizer.learning_rate == 1e-3
    assert (config.model.hidden_dim, config.model.num_layers) == (32, 2)


def test_a_configuration_is_a_recipe(tmp_path):
    config = changed(SMALL, backend=keras.backend.backend())
    text = yaml.safe_dump(settings_of(config))
    assert recipes.load(write(tmp_path, text)) == config


OLD = """
run_dir: runs/old
backend: jax
dataset: digits
train_split: train[:128]
class_weights: null
augmentation: {repeats: 1, crop_padding: 1, flip: false}
batch_size: 32
epochs: 2
optimizer: sgd
learning_rate: 0.002
warmup: 0.5
decay_gates: false
ema: 0.9
checkpoints_per_epoch: 2
expert_shards: null
preset: null
capacity_factor: null
model: {image_size: 8, drop_path: 0.1, layer_scale: 0.2}
convnext: null
moe:
  {layers: last_1, num_experts: 4, images_per_group: 8, capacity_factor: auto}
"""


def test_a_configuration_of_version_0_1_0(tmp_path):
    config = recipes.load(write(tmp_path, OLD))
    assert config.optimizer == training.OptimizerConfig(
        name="sgd", learning_rate=0.002, warmup=0.5, decay_gates=False, ema=0.9
    )
    assert config.model == training.ModelConfig(
        image_size=8, drop_path_rate=0.1, layer_scale_init_value=0.2
    )
    assert config.data.augmentation == data.Augmentation(crop_padding=1)
    assert config.checkpoint.checkpoints_per_epoch == 2
    moe = {"layers": "last_1", "num_experts": 4, "images_per_group": 8}
    assert given(config.moe) == moe
    preset = OLD.replace("preset: null", "preset: convnext_t_e4_last2")
    config = resolved(recipes.load(write(tmp_path, preset)))
    assert (config.moe.num_experts, config.convnext.mlp_ratio) == (4, 4)
    words = OLD.replace("images_per_group: 8", "images_per_group: null")
    words = words.replace("capacity_factor: auto", "capacity_factor: null")
    moe = recipes.load(write(tmp_path, words)).moe
    assert (moe.capacity_factor, moe.images_per_group) == ("dropless", "batch")


@pytest.mark.parametrize(
    ("text", "factor"),
    [
        ("model: {drop_path: 0.1}", "dropless"),
        ("optimizer: sgd\nconvnext: {layer_scale: 0.1}", "dropless"),
        ("optimizer: {name: sgd}", None),
        ("optimizer: adamw\ndata: {batch_size: 8}", None),
    ],
)
def test_the_version_of_a_file_is_told_by_its_names(tmp_path, text, factor):
    """`optimizer` is a word in both; a null factor has two meanings."""
    file = write(tmp_path, f"{text}\nmoe: {{capacity_factor: null}}")
    assert recipes.load(file).moe.capacity_factor == factor
