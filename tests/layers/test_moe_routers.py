"""`MoEMLP` with every router against its definition, and with bad tokens."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_vmoe import layers
from tests.gradients import compiled
from tests.gradients import weight_gradients
from tests.harness import first_everywhere
from tests.harness import randomize
from tests.layers.definitions import float64
from tests.layers.definitions import gelu
from tests.layers.definitions import logits_slowly
from tests.layers.definitions import mlp_slowly
from tests.layers.definitions import moe_layer_slowly
from tests.layers.definitions import plan_slowly
from tests.routing.definitions import z_slowly

ROUTERS = {
    "top-k": (layers.TopKRouter, {"num_selected_experts": 2}),
    "priority, cosine": (
        layers.TopKRouter,
        {"batch_priority": True, "capacity_factor": 0.6, "gate": "cosine"},
    ),
    "dropless": (
        layers.TopKRouter,
        {"num_selected_experts": 2, "capacity_factor": "dropless"},
    ),
    "bias balanced": (
        layers.BiasBalancedRouter,
        {"capacity_factor": 0.6, "batch_priority": True},
    ),
    "bias balanced, dropless": (
        layers.BiasBalancedRouter,
        {
            "num_selected_experts": 2,
            "capacity_factor": "dropless",
            "gate": "l2",
        },
    ),
    "expert choice": (layers.ExpertChoiceRouter, {"capacity_factor": 0.6}),
    "soft": (layers.SoftRouter, {"num_slots": 2}),
}
EACH = pytest.mark.parametrize("name", ROUTERS)
FIRST = pytest.mark.parametrize("name", first_everywhere(ROUTERS))


def make_layer(name, images_per_group=2, layer=layers.MoEMLP, **settings):
    """A built layer of 3 experts with random weights, the bias too."""
    router, arguments = ROUTERS[name]
    if name == "soft":
        images_per_group = 1
    router = router(3, **{**arguments, **settings})
    layer = layer(3, 5, router=router, images_per_group=images_per_group)
    layer.build((None, 6, 4))
    return randomize(layer)


def shared_layer(*args, **kwargs):
    return layers.SharedExpertMoEMLP(*args, shared_hidden_dim=7, **kwargs)


def images_of(*shape, seed=0):
    generator = np.random.default_rng(seed)
    return generator.normal(size=shape).astype("float32")


def assert_same(got, expected):
    got = ops.convert_to_numpy(got)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "batch",
    [1, 3, 4] + [pytest.param(n, marks=pytest.mark.slow) for n in (2, 5, 6, 7)],
)
@EACH
def test_any_batch(name, batch):
    layer, images = make_layer(name), images_of(batch, 6, 4)
    assert_same(compiled(layer)(images), moe_layer_slowly(layer, images))


@pytest.mark.slow
@pytest.mark.parametrize(
    "images_per_group", first_everywhere([3, 1, 8, "batch"])
)
@EACH
def test_any_group(name, images_per_group):
    layer = make_layer(name, images_per_group)
    for batch in (1, 2, 4, 7):
        images = images_of(batch, 6, 4)
        assert_same(compiled(layer)(images), moe_layer_slowly(layer, images))


@pytest.mark.parametrize("name", first_everywhere(ROUTERS))
def test_eager_and_a_feature_map(name):
    layer, images = make_layer(name), images_of(3, 2, 3, 4)
    expected = moe_layer_slowly(layer, images.reshape(3, 6, 4))
    assert_same(layer(images), expected.reshape(images.shape))


@pytest.mark.parametrize("images_per_group", [2, "batch"])
@EACH
def test_masked_tokens(name, images_per_group):
    layer = make_layer(name, images_per_group)
    images, mask = images_of(3, 6, 4), np.ones((3, 6), bool)
    mask[0, 4:], mask[2, 1:] = False, False
    out = compiled(lambda x, mask: layer(x, mask=mask))(images, mask)
    assert_same(out, moe_layer_slowly(layer, images, mask))
    assert not ops.convert_to_numpy(out)[~mask].any()


@pytest.mark.backends("tensorflow", "torch")
@EACH
def test_an_image_of_masked_tokens_only(name):
    layer = make_layer(name, images_per_group=1)
    images, mask = images_of(2, 6, 4), np.ones((2, 6), bool)
    mask[1] = False
    out = compiled(lambda x, mask: layer(x, mask=mask))(images, mask)
    assert_same(out, moe_layer_slowly(layer, images, mask))
    images = ops.convert_to_tensor(images)
    gradients = weight_gradients(
        layer,
        lambda: ops.sum(ops.square(layer(images, mask=mask, training=True))),
    )
    for path, gradient in gradients.items():
        assert np.isfinite(gradient).all(), path


@EACH
def test_an_empty_batch(name):
    layer = make_layer(name)
    call = compiled(lambda x: layer(x, training=True), layer)
    assert tuple(call(images_of(0, 6, 4)).shape) == (0, 6, 4)


# JAX compiles every fit. For TensorFlow one router of each selection.
@pytest.mark.backends("tensorflow", "torch")
@pytest.mark.parametrize(
    "name",
    [
        x
        if x in ("priority, cosine", "expert choice", "soft")
        else pytest.param(x, marks=pytest.mark.backends("torch"))
        for x in ROUTERS
    ],
)
def test_jit_compile_and_one_step_of_fit(name):
    layer = make_layer(name)
    inputs = keras.Input((6, 4))
    model = keras.Model(inputs, layer(inputs))
    jit = keras.backend.backend() != "torch"
    model.compile("sgd", "mse", jit_compile=jit)
    images = images_of(3, 6, 4)
    out = model.predict(images, verbose=0)
    assert_same(out, moe_layer_slowly(layer, images))
    loss = model.fit(images, images, verbose=0).history["loss"][0]
    assert np.isfinite(loss)
    assert all(np.isfinite(float64(w)).all() for w in model.weights)


# Only TensorFlow traces a batch without its size.
@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("images_per_group", [2, "batch"])
@EACH
def test_dynamic_batch(name, images_per_group):
    import tensorflow as tf

    layer = make_layer(name, images_per_group)
    traced = tf.function(
        layer, input_signature=[tf.TensorSpec([None, 6, 4], tf.float32)]
    )
    for batch in (1, 2, 5):
        images = images_of(batch, 6, 4)
        assert_same(traced(images), moe_layer_slowly(layer, images))
    assert traced(images_of(0, 6, 4)).shape == (0, 6, 4)


def test_soft_routes_each_image_alone():
    layer = compiled(make_layer("soft"))
    images = images_of(3, 6, 4)
    changed = images.copy()
    changed[1:] += 1.0
    out, other = (ops.convert_to_numpy(layer(x)) for x in (images, changed))
    np.testing.assert_array_equal(out[0], other[0])
    assert layers.MoEMLP(3, 5, layers.SoftRouter(3)).images_per_group == 1


def test_soft_counts_its_slots_from_the_tokens_of_an_image():
    layer = layers.MoEMLP(3, 5, layers.SoftRouter(3, capacity_factor=0.5))
    layer.build((None, 4, 6, 8))
    # 24 tokens, 0.5 * 24 / 3 slots.
    assert tuple(layer.router.gate_layer.mu.shape) == (8, 3, 4)


@pytest.mark.parametrize(
    ("small", "large"),
    [
        # All for one expert: capacity 3 * S / 3.
        ({"capacity_factor": "dropless"}, {"capacity_factor": 3.0}),
        (
            {"capacity_factor": "dropless", "num_selected_experts": 1},
            {"capacity_factor": 99.0, "num_selected_experts": 1},
        ),
    ],
)
def test_dropless_is_a_large_capacity_factor(small, large):
    dropless, roomy = make_layer("top-k", **small), make_layer("top-k", **large)
    images = images_of(5, 6, 4)
    probe = ops.convert_to_tensor(images_of(5, 6, 4, seed=1))
    expected = ops.convert_to_numpy(compiled(roomy)(images))
    assert_same(compiled(dropless)(images), expected)
    gradients = [
        weight_gradients(
            layer, lambda layer=layer: ops.sum(layer(images) * probe)
        ).values()
        for layer in (dropless, roomy)
    ]
    for got, expected in zip(*gradients, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


# The shared expert.


@EACH
def test_a_shared_expert_adds_an_mlp_of_all_tokens(name):
    layer = make_layer(name, layer=shared_layer)
    images, mask = images_of(3, 6, 4), np.ones((3, 6), bool)
    mask[0, 4:] = False
    shared = layer.shared_expert
    weights = [float64(weight) for weight in shared.weights]
    assert [w.shape for w in weights] == [(4, 7), (7,), (7, 4), (4,)]
    expected = moe_layer_slowly(layer, images, mask)
    # Masked tokens, too: what is behind them may look at them.
    expected += mlp_slowly(images, *weights, gelu)
    out = compiled(lambda x, mask: layer(x, mask=mask))(images, mask)
    assert_same(out, expected)


@pytest.mark.parametrize("size", [0, -1, 2.5])
def test_bad_shared_expert(size):
    words = f"`shared_hidden_dim` must be an integer.*Received: .*={size}"
    with pytest.raises(ValueError, match=words):
        layers.SharedExpertMoEMLP(3, 5, shared_hidden_dim=size)


# Noise, seeds and losses.


@FIRST
def test_a_seed_repeats_its_noise(name):
    images, runs = images_of(2, 6, 4), []
    for seed in (1, 1, 2):
        layer = make_layer(name, seed=seed, noise_std=3.0)
        step = compiled(lambda x, layer=layer: layer(x, training=True), layer)
        runs.append([ops.convert_to_numpy(step(images)) for _ in range(2)])
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (runs[0][0] != runs[2][0]).any()
    assert (runs[0][0] != runs[0][1]).any()


@pytest.mark.parametrize("name", ["expert choice", "soft"])
def test_no_noise_in_inference_nor_without(name):
    images = images_of(2, 6, 4)
    noisy = make_layer(name, noise_std=3.0, seed=1)
    clean = make_layer(name, noise_std=0.0)
    expected = ops.convert_to_numpy(compiled(clean)(images))
    np.testing.assert_array_equal(
        ops.convert_to_numpy(compiled(noisy)(images)), expected
    )
    step = compiled(lambda x: clean(x, training=True), clean)
    assert_same(step(images), expected)


def test_soft_has_no_noise_by_default():
    assert layers.SoftRouter(3).noise_std == 0.0
    assert layers.ExpertChoiceRouter(3).noise_std == 1.0


def losses_of(layer, images):
    def step(images):
        layer(images, training=True)
        return list(layer.losses)

    losses = compiled(step, layer)(images)
    return [float(ops.convert_to_numpy(loss)) for loss in losses]


def test_auxiliary_losses():
    images = images_of(4, 6, 4)
    for name in ("bias balanced", "expert choice", "soft"):
        assert losses_of(make_layer(name), images) == []
    layer = make_layer("expert choice", z_loss_weight=0.5)
    logits = logits_slowly(layer.router.gate_layer, images.reshape(2, 12, 4))
    expected = 0.5 * np.mean([z_slowly(group) for group in logits])
    assert losses_of(layer, images) == [pytest.approx(expected, rel=1e-5)]


# Balancing by a bias: Wang et al., algorithm 1.


def test_the_bias_moves_by_the_sign_of_what_is_missing():
    layer = make_layer("bias balanced", noise_std=0.0, update_rate=0.125)
    bias = np.zeros(3)
    layer.router.bias.assign(bias)
    step = compiled(lambda x: layer(x, training=True), layer)
    moved = set()
    for seed in range(4):
        images = images_of(4, 6, 4, seed=seed)
        tokens = images.reshape(2, 12, 4)
        *_, load = plan_slowly(layer.router, tokens, 12, np.ones((2, 12), bool))
        load = load.sum(axis=0)
        bias = bias + 0.125 * np.sign(load.mean() - load)
        step(images)
        np.testing.assert_allclose(float64(layer.router.bias), bias)
        moved |= set(np.sign(load.mean() - load))
    assert moved >= {-1.0, 1.0}


def test_the_bias_stays_in_inference_and_when_the_load_is_even():
    layer = make_layer("bias balanced", noise_std=0.0)
    before = float64(layer.router.bias)
    compiled(layer, layer)(images_of(4, 6, 4))
    np.testing.assert_array_equal(float64(layer.router.bias), before)
    # Every token takes every expert: an even load.
    layer = make_layer(
        "bias balanced", num_selected_experts=3, capacity_factor=1.0
    )
    before = float64(layer.router.bias)
    step = compiled(lambda x: layer(x, training=True), layer)
    step(images_of(4, 6, 4))
    np.testing.assert_allclose(float64(layer.router.bias), before, atol=1e-9)


def test_the_bias_selects_and_does_not_weigh():
    router = layers.BiasBalancedRouter(3, capacity_factor=3.0)
    router.build((None, None, 4))
    router.bias.assign([0.0, 0.0, 9.0])
    tokens = images_of(1, 6, 4)

    def call(tokens):
        plan = router(tokens)
        return plan.load, plan.weight, ops.softmax(router.gate_layer(tokens))

    load, weight, gates = map(ops.convert_to_numpy, compiled(call)(tokens))
    assert load.tolist() == [[0, 0, 6]]
    np.testing.assert_allclose(weight[..., 0], gates[..., 2], rtol=1e-6)
    gradients = weight_gradients(
        router, lambda: ops.sum(router(ops.convert_to_tensor(tokens)).weight)
    )
    assert len(gradients) == 1, "the bias has no gradient"


def test_the_bias_balances_and_is_saved(tmp_path):
    # All tokens want the same expert, until its bias has fallen.
    layer = layers.MoEMLP(
        3,
        5,
        layers.BiasBalancedRouter(3, 0.05, noise_std=0.0, capacity_factor=3.0),
    )
    inputs = keras.Input((6, 4))
    model = keras.Model(inputs, layer(inputs))
    randomize(model)
    layer.router.bias.assign(np.zeros(3))
    layer.router.gate_layer.kernel.assign([[1.0, 0, 0]] * 4)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    images = np.abs(images_of(4, 6, 4))
    model.fit(images, images, epochs=2, verbose=0)
    first = layer.router.statistics.result()["load_share"]
    model.fit(images, images, epochs=20, verbose=0)
    layer.router.statistics.reset()
    model.fit(images, images, epochs=5, verbose=0)
    last = layer.router.statistics.result()["load_share"]
    assert first[0] == 1.0 and last[0] < 0.8, (first, last)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(
        float64(loaded.layers[1].router.bias), float64(layer.router.bias)
    )
    np.testing.assert_array_equal(
        loaded.predict(images, verbose=0), model.predict(images, verbose=0)
    )


# Bad tokens.


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@FIRST
def test_a_bad_token_spoils_its_image_only(name, value):
    layer = make_layer(name, batch_priority=True) if name == "top-k" else (
        make_layer(name)
    )  # fmt: skip
    images = images_of(5, 6, 4)
    bad = images.copy()
    bad[1, 2] = value
    call = compiled(lambda x: (layer(x), *indices_of(layer, x)))
    expected, *_ = call(images)
    expected = ops.convert_to_numpy(expected)
    out, *indices = map(ops.convert_to_numpy, call(bad))
    assert np.isfinite(out[[0, 2, 3, 4]]).all()
    np.testing.assert_allclose(out[2:], expected[2:], rtol=1e-5, atol=1e-6)
    if name != "expert choice":  # There nobody need choose the token.
        assert not np.isfinite(out[1, 2]).any()
    # The layer stands on a residual branch.
    assert not np.isfinite(bad[1] + out[1]).all()
    for index, largest in zip(indices[::2], indices[1::2], strict=True):
        assert index.min() >= 0 and index.max() <= largest


def indices_of(layer, images):
    """All indices of a plan of two groups, each with the largest allowed."""
    tokens = ops.reshape(images[:4], (2, 12, 4))
    if isinstance(layer.router, layers.SoftRouter):
        return []
    plan = layer.router(tokens)
    if isinstance(layer.router, layers.ExpertChoiceRouter):
        return [plan.token, ops.convert_to_tensor(12)]
    pairs = []
    if hasattr(plan, "sparse"):
        pairs = [plan.block_expert, ops.convert_to_tensor(2)]
        plan = plan.sparse
    _, experts, places = plan.choice.shape
    choices = plan.slot.shape[1] * plan.slot.shape[2]
    return [
        *pairs,
        plan.choice,
        ops.convert_to_tensor(choices),
        plan.slot,
        ops.convert_to_tensor(experts * places),
    ]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@EACH
def test_a_bad_token_does_not_crash_a_training_step(name, value):
    layer, images = make_layer(name), images_of(3, 6, 4)
    images[1, 2] = value
    step = compiled(lambda x: layer(x, training=True), layer)
    out = ops.convert_to_numpy(step(images))
    assert np.isfinite(out[[0, 2]]).all()
    if hasattr(layer.router, "bias"):
        assert np.isfinite(float64(layer.router.bias)).all()
    load = layer.router.statistics.result()["load_share"]
    if name != "soft":
        assert np.isfinite(load).all()


# Words.


@pytest.mark.parametrize(
    ("router", "arguments", "words"),
    [
        ("ExpertChoiceRouter", {"num_selected_experts": 2},
         "ExpertChoiceRouter has no `num_selected_experts`. Received: "
         "num_selected_experts=2. Leave it out, or use a TopKRouter"),
        ("ExpertChoiceRouter", {"num_slots": 2},
         "no `num_slots`. Received: num_slots=2. .* use a SoftRouter"),
        ("TopKRouter", {"num_slots": 2}, "TopKRouter has no `num_slots`"),
        ("BiasBalancedRouter", {"num_slots": 2},
         "BiasBalancedRouter has no `num_slots`"),
        ("ExpertChoiceRouter", {"batch_priority": True},
         "no `batch_priority`. Received: batch_priority=True"),
        ("ExpertChoiceRouter", {"importance_loss_weight": 0.1},
         "no `importance_loss_weight`"),
        ("ExpertChoiceRouter", {"capacity_factor": "dropless"},
         "cannot be dropless. Received: capacity_factor='dropless'. Set a"),
        ("ExpertChoiceRouter", {"capacity_factor": 0.0},
         "`capacity_factor` must be positive: with 0 every expert has a "
         "capacity of 0.*Received: capacity_factor=0.0"),
        ("ExpertChoiceRouter", {"capacity_factor": float("nan")},
         "capacity_factor=nan"),
        ("ExpertChoiceRouter", {"z_loss_weight": -1.0}, "z_loss_weight=-1.0"),
        ("ExpertChoiceRouter", {"gate": "cosin"}, "Did you mean 'cosine'"),
        ("ExpertChoiceRouter", {"num_experts": 0}, "num_experts=0"),
        ("TopKRouter", {"capacity_factor": "dropless", "batch_priority": True},
         "none needs priority. Received: capacity_factor='dropless' and "
         "batch_priority=True"),
        ("TopKRouter", {"capacity_factor": 0}, "capacity_factor=0"),
        ("BiasBalancedRouter", {"update_rate": -0.1},
         "`update_rate` must be a finite number and not negative. Received: "
         "update_rate=-0.1"),
        ("SoftRouter", {"num_selected_experts": 2},
         "SoftRouter has no `num_selected_experts`"),
        ("SoftRouter", {"gate": "cosine"}, "must be a `SoftGate`"),
        ("SoftRouter", {"z_loss_weight": 0.1}, "no `z_loss_weight`"),
        ("SoftRouter", {"num_slots": 0}, "num_slots=0"),
        ("SoftRouter", {"num_slots": 2, "capacity_factor": 2.0},
         "num_slots=2 together with capacity_factor=2.0. Leave one"),
        ("TopKRouter", {"batch_priority": "no"},
         "must be True or False. Received: batch_priority='no'"),
        ("SoftRouter", {"capacity_factor": 0.0}, "capacity_factor=0.0"),
        ("SoftRouter", {"noise_std": -1.0}, "noise_std=-1.0"),
        ("SoftRouter", {"num_experts": 0}, "num_experts=0"),
    ],
)  # fmt: skip
def test_bad_router(router, arguments, words):
    with pytest.raises(ValueError, match=words):
        getattr(layers, router)(**{"num_experts": 4, **arguments})


@pytest.mark.backends("torch")
def test_bools_of_numpy():
    router = layers.TopKRouter(4, batch_priority=np.bool_(True))
    assert router.get_config()["batch_priority"] is True


@pytest.mark.parametrize("images_per_group", [2, "batch"])
def test_soft_takes_no_groups(images_per_group):
    words = f"routes each image alone. Received: .*={images_per_group!r}"
    with pytest.raises(ValueError, match=words):
        layers.MoEMLP(
            4, 8, layers.SoftRouter(4), images_per_group=images_per_group
        )


def test_soft_needs_the_number_of_tokens():
    layer = layers.MoEMLP(4, 8, layers.SoftRouter(4))
    with pytest.raises(ValueError, match="which must be known.*`num_slots`"):
        layer(keras.Input((None, 8)))
    layer = layers.MoEMLP(4, 8, layers.SoftRouter(4, num_slots=1))
    assert layer(keras.Input((None, 8))).shape == (None, None, 8)


def test_projection_larger_than_the_tokens():
    gate = layers.CosineGate(4, projection_dim=9)
    layer = layers.MoEMLP(4, 8, layers.TopKRouter(4, gate=gate))
    with pytest.raises(ValueError, match="projection_dim=9 for 8 features"):
        layer(keras.Input((6, 8)))
