"""Other losses, optimizers and starts of a run."""

import dataclasses
import itertools
import json
import pathlib
import re
import shutil

import keras
import numpy as np
import pytest
import yaml

from keras_vmoe import _files
from keras_vmoe import data
from keras_vmoe import layers
from keras_vmoe import models
from keras_vmoe import training
from keras_vmoe.evaluation._description import memory
from keras_vmoe.training import batches
from keras_vmoe.training import building
from keras_vmoe.training import loop
from keras_vmoe.training import run_folder
from keras_vmoe.training.architecture import resolved
from keras_vmoe.training.config import MoESettings
from keras_vmoe.training.config import given
from keras_vmoe.training.initialization import starting_model
from tests.training.small import changed
from tests.training.small import history

# Nothing of it depends on the backend.
once = pytest.mark.backends("torch")


def losses_of(config):
    """Losses of the epochs of a run."""
    rows = history(training.train(config).run_dir)
    return [float(row["loss"]) for row in rows]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(
            dict(optimizer="lamb", loss="bce", expert_weight_decay=0.1,
                 learning_rate=0.05), marks=once),
        dict(optimizer="sgd", label_smoothing=0.1, clip_norm=1.0, accumulate=2,
             schedule="linear", learning_rate=0.2),
        pytest.param(
            dict(augmentation=data.Augmentation(mixup=0.2), moe=None,
                 schedule="rsqrt"), marks=once),
        pytest.param(
            dict(
                model=training.ModelConfig(image_size=8),
                convnext=training.ConvNeXtConfig((1, 1), (8, 16)),
            ), marks=once),
        pytest.param(
            dict(
                model=training.ModelConfig(image_size=8),
                swin=training.SwinConfig((2, 2), (8, 16), (2, 2)),
            ), marks=once),
        pytest.param(
            dict(ensemble_size=2),
            marks=once),
    ],
    ids=["lamb-bce", "sgd-smoothing-accumulate", "mixup-dense", "convnext",
         "swin", "ensemble"],
)  # fmt: skip
def test_other_settings_learn(config, changes):
    """Three epochs end well below the loss of a guess, where they start."""
    more = {"train_split": "train[:512]", "epochs": 3}
    more |= {"learning_rate": 0.02, "warmup": 0.2}
    losses = losses_of(changed(config, **{**more, **changes}))
    guess = np.log(2) if changes.get("loss") == "bce" else np.log(10)
    assert len(losses) == 3
    assert losses[-1] < 0.97 * guess


@pytest.mark.backends("torch")
def test_the_average_of_a_runs_weights(config):
    """It follows the recurrence over the weights of all steps, and is saved."""
    config, raw = changed(config, ema=0.8), []

    class Steps(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raw.append(self.model.get_layer("head").kernel.numpy())

    class Validation(loop.Validation):
        def set_model(self, model):
            super().set_model(model)
            steps.set_model(model)

        def on_train_batch_end(self, batch, logs=None):
            steps.on_train_batch_end(batch, logs)

    steps = Steps()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Validation", Validation)
        result = training.train(config)
    assert len(raw) == 8
    average = raw[0]
    for weights in raw[1:]:
        average = 0.8 * average + 0.2 * weights
    saved = models.load(result.run_dir / "model.keras").get_layer("head").kernel
    np.testing.assert_allclose(saved.numpy(), average, rtol=1e-4, atol=1e-6)
    assert np.abs(average - raw[-1]).max() > 1e-4


@once
def test_class_weights_change_what_is_trained_on(config):
    """Of ten classes one is drawn, in every epoch; all are tested."""
    weights = 3 * (1e-9,) + (1.0,) + 6 * (1e-9,)
    alone = changed(config, class_weights=weights)
    info = data.info("digits", config.data.data_dir)
    stream = itertools.islice(batches.batches(alone, info, 0, length=4), 8)
    assert {label for _, labels in stream for label in labels} == {3}
    tested = batches.datasets(alone, info)[2].as_numpy_iterator()
    assert {label for _, labels in tested for label in labels} == {*range(10)}


PRESET = {
    "preset": "convnext_iso_s_e8_last2",
    "moe": MoESettings(),
    "model": training.ModelConfig(),
}


@once
def test_a_preset(config):
    large = changed(config, **PRESET)
    other = changed(large, image_size=32, drop_path_rate=0.1)
    made = building.make_model(other, 10)
    assert made.drop_path_rate == 0.1 and made.output_shape == (None, 10)
    assert other.image_size == 32 and large.image_size == 224
    assert resolved(large).convnext.patch_size == 16
    vit = resolved(changed(config, **{**PRESET, "preset": "vit_s16"})).model
    sizes = ("patch_size", "hidden_dim", "num_layers", "num_heads", "mlp_dim")
    found = [getattr(vit, name) for name in sizes]
    assert found == [16, 384, 12, 6, 1536] and vit.pooling == "token"


@once
@pytest.mark.parametrize(
    ("moe", "found"),
    [
        (MoESettings(), (4, "last_2", 2)),
        (MoESettings(num_experts=8), (8, "last_2", 2)),  # As by default.
        (MoESettings(layers="stage", mlp_ratio=4), (4, "stage", 4)),
        (models.MoEConfig(), (8, "last_2", 2)),  # All that is in it.
        (None, None),
    ],
)
def test_settings_over_a_preset(config, moe, found):
    """One by one, whatever their defaults; the result is all explicit."""
    changes = {"preset": "convnext_t_e4_last2_r2", "moe": moe}
    settings = training.ConvNeXtConfig(depths=(1, 1, 3, 1))
    made = resolved(changed(config, **{**PRESET, **changes}, convnext=settings))
    names = ("num_experts", "layers", "mlp_ratio")
    assert moe is None or found == tuple(getattr(made.moe, x) for x in names)
    assert moe is not None or made.moe is None
    assert made.convnext.depths == (1, 1, 3, 1)
    assert made.convnext.dims == (96, 192, 384, 768)
    assert made.convnext.layer_scale_init_value == 1e-6
    assert made.convnext.patch_size == 4
    assert resolved(made) == made


@once
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_dim": 99}, "ConvNeXt has .* model.hidden_dim=99 with preset"),
        ({"preset": "convnext"}, "The preset must be one of"),
        (
            {"preset": "vit_s16", "convnext": training.ConvNeXtConfig()},
            "A ViT has its own sizes. Received: convnext=ConvNeXtConfig",
        ),
        ({"upcycle": True}, "`upcycle` needs a model to start from"),
    ],
)
def test_sizes_of_the_other_family_are_refused(config, changes, words):
    with pytest.raises(ValueError, match=words):
        changed(config, **{**PRESET, **changes})


def test_v_moes_first_bias_and_last_rate(config):
    changes = {"head_bias": -10.0, "final_learning_rate": 1e-5}
    config = changed(config, **changes)
    model = starting_model(config, data.info("digits"))
    assert (np.array(model.get_layer("head").bias) == -10).all()
    rate = building.make_schedule(config, 8 * config.epochs)
    assert float(rate(8 * config.epochs)) == pytest.approx(1e-5)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_rate_falls_until_the_last_step(config, accumulate):
    """Keras counts the steps of an update, too."""
    changes = {"accumulate": accumulate, "epochs": 4, "ema": 0.9}
    config = changed(config, **changes)
    model = starting_model(config, data.info("digits"))
    building.compile_model(model, config, 8 * config.epochs)
    # As one update of the average with the momentum that was asked for.
    optimizer = model.optimizer
    assert optimizer.ema_momentum**accumulate == pytest.approx(0.9)
    rate = building.make_schedule(config, 8 * config.epochs)
    assert float(rate(16)) == pytest.approx(config.optimizer.learning_rate)
    assert 0 < float(rate(31)) < 0.01 * config.optimizer.learning_rate


def test_v_moes_loss_is_a_sum_over_classes():
    labels, logits = np.eye(3, dtype="float32"), np.zeros((3, 3), "float32")
    losses = building.sigmoid_crossentropy(labels, logits)
    np.testing.assert_allclose(losses, 3 * np.log(2) * np.ones(3), rtol=1e-6)


@pytest.mark.backends("torch")
def test_fine_tuning(result, config, tmp_path):
    """Other classes, another resolution, all but the head frozen."""
    start = result.run_dir / "model.keras"
    other = changed(
        config,
        init=str(start),
        freeze="backbone",
        num_classes=12,
        model=dataclasses.replace(config.model, image_size=16),
    )
    with pytest.warns(UserWarning, match="other classes"):
        tuned = training.train(other).model
    assert tuned.output_shape == (None, 12)
    kernel = tuned.get_layer("block_0_moe").experts.hidden_kernel
    before = result.model.get_layer("block_0_moe").experts.hidden_kernel
    assert (kernel.numpy() == before.numpy()).all()
    assert [w.path for w in tuned.trainable_weights] == [
        "head/kernel", "head/bias"
    ]  # fmt: skip


@once
def test_the_head_of_other_classes_starts_anew(result, config, tmp_path):
    """As many classes, by other names."""
    start = tmp_path / "start"
    start.mkdir()
    shutil.copy(result.run_dir / "model.keras", start)
    info = data.info("digits")
    kernel = result.model.get_layer("head").kernel.numpy()
    for names in (list(info.class_names), list("abcdefghij")):
        (start / "classes.json").write_text(json.dumps(names))
        other = changed(config, init=str(start))
        if names[0] == "a":
            with pytest.warns(UserWarning, match="other classes"):
                made = starting_model(other, info)
        else:
            made = starting_model(other, info)
        same = (made.get_layer("head").kernel.numpy() == kernel).all()
        assert same == (names[0] != "a")


@once
def test_frozen_routers(config):
    made = starting_model(
        changed(config, freeze="routers"), data.info("digits")
    )
    frozen = [w.path for w in made.weights if not w.trainable]
    assert frozen == ["block_0_moe/router/gate/kernel"]


@pytest.mark.parametrize("frozen", ["router", "balance", None])
def test_a_frozen_bias_stays(frozen):
    """A balancing router moves its bias without a gradient."""
    router = layers.BiasBalancedRouter(4, 1)
    if frozen:
        (router if frozen == "router" else router.balance).trainable = False
    tokens = np.random.default_rng(0).normal(size=(2, 8, 6))
    router(tokens.astype("float32"), training=True)
    assert (np.array(router.bias) == 0).all() == bool(frozen)


@once
def test_the_architecture_is_that_of_the_file(result, config, tmp_path):
    """Where nothing is set; what is set must be the same."""
    start = str(result.run_dir / "model.keras")
    bare = changed(config, model=PRESET["model"], moe=MoESettings(), init=start)
    made = resolved(bare)
    assert made.image_size == 8 and made.model.hidden_dim == 16
    assert given(made.moe)["layers"] == "every_1"
    assert resolved(made) == made
    folder = resolved(changed(bare, init=str(result.run_dir)))
    assert changed(folder, init=start) == made
    model = starting_model(bare, data.info("digits"))
    for mine, its in zip(model.weights, result.model.weights, strict=True):
        if "seed" not in mine.path:
            np.testing.assert_array_equal(mine, its)
    # The same block by another name, and what no weight depends on.
    moe = MoESettings(layers=[0], noise_std=0.0)
    other = resolved(changed(bare, moe=moe, dropout=0.1))
    assert other.moe.noise_std == 0 and other.model.dropout == 0.1
    for changes, words in (
        ({"hidden_dim": 32}, "hidden_dim=32 for 16. Leave them out"),
        ({"preset": "vit_s16"}, "hidden_dim=384 for 16"),
        ({"convnext": training.ConvNeXtConfig(dims=(3,))}, "dims=.* for None"),
        ({"moe": MoESettings(num_experts=8)}, "num_experts=8 for 4.*--upcycle"),
        ({"moe": None}, "moe.num_experts=None for 4. Leave"),
        ({"moe": MoESettings(router="soft")}, "for 'top_k'. Leave them out.$"),
    ):
        with pytest.raises(ValueError, match=words):
            resolved(changed(bare, **changes))


@once
def test_upcycling(result, config):
    """From 4 experts to 8, with the other weights; and from none."""
    start = str(result.run_dir / "model.keras")
    more = changed(
        config, model=PRESET["model"], init=start, upcycle=True,
        moe=MoESettings(num_experts=8),
    )  # fmt: skip
    model = starting_model(more, data.info("digits"))
    (ours,), (theirs,) = model.moe_layers, result.model.moe_layers
    kernel = np.array(theirs.experts.hidden_kernel)
    found = np.array(ours.experts.hidden_kernel)
    np.testing.assert_array_equal(found, np.concatenate([kernel, kernel]))
    head = model.get_layer("head").kernel
    np.testing.assert_array_equal(head, result.model.get_layer("head").kernel)
    text = training.describe(more)
    assert "upcycle: true" in text and "num_experts: 8" in text
    same = changed(more, moe=MoESettings(num_experts=4))
    with pytest.raises(ValueError, match="has these 4 experts. Set more"):
        resolved(same)


@once
def test_a_description(result, config):
    # A start from other weights changes no cost.
    start = changed(config, init=str(result.run_dir))
    text = training.describe(start)
    assert "name: adamw" in text and "million active per token" in text
    assert "steps: 4 per epoch, 8 in all, 4 of warm-up" in text
    assert "memory, estimated" in text
    text = training.describe(changed(config, batch_size=4096))
    assert [memory(x << 20) for x in (900, 1536)] == ["900 MiB", "1.5 GiB"]
    assert "steps: 0.24 per 1,000 images, in 2 epochs\nnote: a run" in text


@once
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
    other = changed(config, epochs=4, **changes)
    assert building.make_schedule(other, 16).warmup_steps == warmup
    text = training.describe(other)
    assert f"steps: 4 per epoch, 16 in all, {warmup} of warm-up" in text


@once
@pytest.mark.parametrize("do", [training.describe, training.train])
def test_a_warm_up_longer_than_the_run(config, do):
    other = changed(config, warmup=None, warmup_steps=8)
    with pytest.raises(ValueError, match="warmup_steps=8, steps=8. Shorten"):
        do(other)
    assert not pathlib.Path(config.run_dir).exists()


@once
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"init": "nowhere.keras"}, "must exist: a .keras file"),
        ({"expert_shards": 2}, "need a distribution"),
    ],
)
def test_a_description_of_what_cannot_be(config, changes, words):
    with pytest.raises((OSError, ValueError), match=words):
        training.describe(changed(config, **changes))


@once
def test_a_description_where_a_run_is_finished(result, config):
    text = training.describe(changed(config, run_dir=str(result.run_dir)))
    assert re.search("of warm-up\nnote: a run .* holds a finished run", text)


@once
def test_a_description_where_a_run_goes_on(config, tmp_path):
    config = changed(config, run_dir=str(tmp_path))
    with _files.locked(tmp_path):
        assert "note: a run would be refused. A run" in training.describe(
            config
        )
    assert "note: " not in training.describe(config)


@once
def test_a_description_of_a_preset_is_of_its_sizes(config):
    text = training.describe(
        changed(
            config,
            model=training.ModelConfig(
                preset="convnext_t_e4_last2_r2", image_size=32
            ),
            moe=MoESettings(),
        )
    )
    settings, sizes, *_ = text.split("\n\n")
    settings, sizes = yaml.safe_load(settings), yaml.safe_load(sizes)
    assert "hidden_dim" not in settings["model"]
    assert settings["moe"]["mlp_ratio"] == 2
    assert sizes["ConvNeXtMoE"]["dims"] == [96, 192, 384, 768]
    assert sizes["ConvNeXtMoE"]["moe"]["num_experts"] == 4


@once
def test_numbers_of_numpy_are_those_of_python():
    made = [
        training.TrainConfig(
            seed=kind(3),
            epochs=kind(2),
            data=training.DataConfig(batch_size=kind(32)),
            model=training.ModelConfig(
                hidden_dim=kind(32), drop_path_rate={"a": real(0.5)}
            ),
            moe=models.MoEConfig(num_experts=kind(4), layers=layers),
            optimizer=training.OptimizerConfig(learning_rate=real(0.25)),
        )
        for kind, real, layers in (
            (int, float, [1]),
            (np.int64, np.float32, np.array([1])),
        )
    ]
    expected, found = map(run_folder.settings_of, made)
    assert found == expected
    assert type(made[1].seed) is int
    depths = training.ConvNeXtConfig(depths=np.array([1, 2])).depths
    assert list(depths) == [1, 2] and type(depths[0]) is int
