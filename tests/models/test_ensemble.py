"""Efficient ensembles: the members, one by one, are V-MoEs of fewer experts."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_vmoe import checkpoints
from keras_vmoe import evaluation
from keras_vmoe import inspection
from keras_vmoe import layers
from keras_vmoe import models
from keras_vmoe.checkpoints.vmoe import vmoe_weights
from keras_vmoe.layers.ensemble import RepeatImages
from keras_vmoe.models.costs import without_weights
from tests.harness import randomize
from tests.layers.definitions import float64
from tests.models.definitions import images_of
from tests.models.definitions import tiny

once = pytest.mark.backends("torch")
LABELS = np.arange(5) % 10


def ensemble(moe=None, **arguments):
    """A model of two members, of which each has two of four experts."""
    moe = {"num_selected_experts": 1, **(moe or {})}
    return tiny(moe=moe, ensemble_size=2, **arguments)


def members_of(model):
    """Two V-MoEs of half of the experts, with the weights of the members."""
    found = []
    for member in range(2):
        part = slice(2 * member, 2 * member + 2)
        config = model.get_config()
        moe = {**config["moe"], "num_experts": 2}
        config |= {"moe": moe, "ensemble_size": None}
        made = type(model).from_config(config)
        ours, theirs = vmoe_weights(model), vmoe_weights(made)
        for name, weight in theirs.items():
            value = float64(ours[name])
            if "Router" in name:
                value = value[:, part]
            elif "/Moe/" in name:
                value = value[part]
            weight.assign(value)
        found.append(made)
    return found


def log_softmax(x):
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


@pytest.mark.backends("torch")
@pytest.mark.parametrize(
    "moe",
    [
        # Experts that are full, and a last group that is not.
        {"capacity_factor": 0.5, "batch_priority": True},
        {"capacity_factor": 0.5, "num_selected_experts": 2},
        {"capacity_factor": "dropless"},
        {"images_per_group": "batch"},
        {"images_per_group": 1},
    ],
)
def test_members_are_smaller_models(moe):
    model, images = randomize(ensemble(moe)), images_of(5)
    expected = np.stack(
        [float64(member(images)) for member in members_of(model)], axis=1
    )
    keras.utils.set_random_seed(0)
    mean = np.log(np.exp(log_softmax(expected)).mean(axis=1))
    np.testing.assert_allclose(float64(model(images)), mean, atol=1e-4)
    noiseless = ensemble({**moe, "noise_std": 0.0, "load_loss_weight": 0.0})
    noiseless.set_weights(model.get_weights())
    single = ops.convert_to_numpy(noiseless(images, training=True))
    np.testing.assert_allclose(single, expected, atol=1e-4)


@once
def test_losses_are_the_members_mean():
    router = layers.EnsembleRouter(
        4, 2, num_selected_experts=2, gshard_loss_weight=0.1,
        z_loss_weight=0.2, local_entropy_loss_weight=0.3,
        global_entropy_loss_weight=0.4,
    )  # fmt: skip
    assert router.noise == 0.5 and router.copies == 2
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(3, 8, 4)).astype("float32")  # 4 images.
    noise = 0.5 * generator.normal(size=logits.shape).astype("float32")
    restricted = router.restrict(ops.convert_to_tensor(logits), 4)
    noisy = restricted + ops.convert_to_tensor(noise)
    found = router.auxiliary_losses(restricted, noisy, None)
    twin = layers.TopKRouter(
        2, num_selected_experts=2, gshard_loss_weight=0.1,
        z_loss_weight=0.2, local_entropy_loss_weight=0.3,
        global_entropy_loss_weight=0.4,
    )  # fmt: skip
    expected = 0
    for member in range(2):
        own = np.repeat(np.arange(4) % 2 == member, 2)
        part = slice(2 * member, 2 * member + 2)
        pair = (logits[:, own, part], (logits + noise)[:, own, part])
        pair = [ops.convert_to_tensor(x) for x in pair]
        losses = twin.auxiliary_losses(*pair, None)
        expected = expected + 0.5 * float64(ops.stack(losses))
    np.testing.assert_allclose(float64(ops.stack(found)), expected, rtol=1e-4)


@pytest.mark.backends("torch")
def test_the_loss_of_training_is_the_members_mean():
    moe = {"noise_std": 0.0, "load_loss_weight": 0.0,
           "importance_loss_weight": 0.0}  # fmt: skip
    model, images = randomize(ensemble(moe)), images_of(5)
    weights = np.arange(1.0, 6.0)
    members = [log_softmax(float64(x(images))) for x in members_of(model)]
    losses = [-x[np.arange(5), LABELS] for x in members]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.0), loss, metrics=["accuracy"])
    found = model.train_on_batch(images, LABELS, sample_weight=weights)
    expected = np.mean(losses, axis=0) @ weights / 5
    assert float(found[0]) == pytest.approx(expected, rel=1e-4)
    mean = np.exp(members).mean(axis=0)
    right = np.mean(mean.argmax(axis=-1) == LABELS)
    assert float(found[1]) == pytest.approx(right)
    # The first member says 0, the second 1, and the ensemble 1.
    logits = np.log([[[0.6, 0.4], [0.1, 0.9]]]).astype("float32")
    model.reset_metrics()
    scores = model.compute_metrics(
        None, ops.ones((1,), "int32"), ops.convert_to_tensor(logits)
    )
    assert float(scores["accuracy"]) == 1.0
    history = model.fit(
        images, LABELS, validation_data=(images, LABELS), verbose=0
    )
    whole = -np.log(mean[np.arange(5), LABELS]).mean()
    assert history.history["val_loss"][0] == pytest.approx(whole, rel=1e-4)


@once
def test_parameters_are_those_of_the_v_moe():
    """The reference's S/32, of which one has its counts."""
    sizes = {"image_size": 224, "patch_size": 32, "hidden_dim": 512,
             "num_layers": 8, "num_heads": 8, "mlp_dim": 2048,
             "num_classes": 1000, "representation_size": 512}  # fmt: skip
    moe = {"layers": "last_2", "num_experts": 8, "num_selected_experts": 1}
    with without_weights():
        model = models.ViTMoE(moe=moe, ensemble_size=2, **sizes)
        plain = models.ViTMoE(moe=moe, **sizes)
    assert model.count_params() == plain.count_params() == 56_999_400


@once
def test_cost():
    """What comes from the first block with experts on, twice."""
    model, plain = ensemble(), tiny(moe={"num_selected_experts": 1})
    first = tiny(moe=None, num_layers=1, num_classes=None)
    single = models.cost(first).macs
    both, one = models.cost(model).macs, models.cost(plain).macs
    # But the gates have all experts, of which a member uses its own.
    assert both == pytest.approx(2 * one - single, rel=0.01)


@once
def test_saved_dialled_and_looked_at(tmp_path):
    model, images = randomize(ensemble()), images_of(4)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    outputs = float64(model(images))
    np.testing.assert_array_equal(float64(loaded(images)), outputs)
    dial = models.set_routing(model, num_selected_experts=2, images_per_group=1)
    assert dial.ensemble_size == 2
    alone = np.concatenate([float64(dial(images[i : i + 1])) for i in range(4)])
    np.testing.assert_allclose(alone, float64(dial(images)), atol=1e-5)
    batch = [(images, LABELS[:4])]
    found = evaluation.measure(model, batch)
    assert found.loss == pytest.approx(
        -log_softmax(outputs)[np.arange(4), LABELS[:4]].mean(), rel=1e-4
    )
    features, _ = evaluation.extract_features(model, batch)
    assert features.shape == (4, 2 * model.hidden_dim)
    headless = models.with_head(model, None)
    np.testing.assert_allclose(float64(headless(images)), features, atol=1e-5)
    with pytest.raises(ValueError, match="an ensemble of 2 members"):
        inspection.inspect(model, batch)


@pytest.mark.backends("jax")
def test_several_devices_measure_as_one():
    """Tokens behind the first experts have two rows for each image."""
    model, batch = randomize(ensemble()), [(images_of(5), LABELS)]
    expected = evaluation.measure(model, batch)
    devices = keras.distribution.list_devices()[:2]
    with keras.distribution.DataParallel(devices=devices).scope():
        found = evaluation.measure(randomize(ensemble()), batch)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    for name, routing in expected.routing.items():
        for key, value in routing.items():
            np.testing.assert_allclose(
                found.routing[name][key], value, atol=1e-6
            )


@once
def test_a_checkpoint_of_the_reference():
    model = randomize(ensemble())
    arrays = {k: float64(w) for k, w in vmoe_weights(model).items()}
    for name, x in arrays.items():
        if "Router" in name:
            arrays[name] = x.reshape(-1, 2, 2)
    config = checkpoints.vmoe_config(arrays)
    assert config["ensemble_size"] == 2 and config["moe"]["num_experts"] == 4
    other = checkpoints.load_vmoe(ensemble(), arrays)
    images = images_of(2)
    np.testing.assert_array_equal(
        float64(other(images)), float64(model(images))
    )
    with pytest.raises(ValueError, match="Set ensemble_size=2"):
        checkpoints.load_vmoe(tiny(moe={"num_selected_experts": 1}), arrays)


@once
@pytest.mark.parametrize(
    ("moe", "size", "words"),
    [
        ({"num_experts": 3}, 2, "must divide `num_experts`"),
        ({"num_selected_experts": 3}, 2, "num_selected_experts=3 with 2 exp"),
        ({"router": "soft"}, 2, "ensemble_size=2 with router='soft'"),
        (None, 2, "ensemble_size=2 with moe=None"),
        ({}, 1, "ensemble_size=1"),
        ({"min_experts": 3}, 2, "each member's. Received: min_experts=3 of 2"),
    ],
)
def test_bad_arguments(moe, size, words):
    with pytest.raises(ValueError, match=words):
        tiny(moe=moe, ensemble_size=size)


@once
def test_ablations_stay_within_the_members():
    batch = images_of(5), LABELS
    rows = evaluation.ablate(randomize(ensemble()), [batch])
    numbers = [row["change"] for row in rows if "K=" in row["change"]]
    assert numbers == ["K=1", "K=2"], "each member has two experts"


@once
def test_a_group_without_all_copies():
    router = layers.EnsembleRouter(4, 2)
    tokens = ops.ones((1, 8, 3))
    with pytest.raises(ValueError, match="2 of each. Received: images_per_gr"):
        router(tokens, images_per_group=1)


@once
def test_a_functional_model_of_ones_own():
    inputs = keras.Input((4, 8))
    router = layers.EnsembleRouter(4, 2)
    layer = layers.MoEMLP(4, 16, router=router, images_per_group=2)
    outputs = layer(RepeatImages(2)(inputs))
    model = keras.Model(inputs, outputs)
    assert model(np.ones((3, 4, 8), "float32")).shape == (6, 4, 8)
