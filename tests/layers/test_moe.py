"""`MoEMLP` against its definition in numpy, for any batch; noise and losses.

Where every backend agrees with one definition to 1e-5, all backends agree with
each other.
"""

import re

import keras
import numpy as np
import pytest
from keras import ops

from keras_vmoe import layers
from keras_vmoe import routing
from tests.gradients import compiled
from tests.gradients import weight_gradients
from tests.harness import first_everywhere
from tests.harness import randomize
from tests.layers.definitions import experts_of
from tests.layers.definitions import gate_kernel_of
from tests.layers.definitions import gelu_tanh
from tests.layers.definitions import moe_slowly
from tests.layers.definitions import softmax
from tests.routing.definitions import global_entropy_slowly
from tests.routing.definitions import gshard_slowly
from tests.routing.definitions import importance_slowly
from tests.routing.definitions import load_slowly
from tests.routing.definitions import local_entropy_slowly
from tests.routing.definitions import z_slowly


def make_layer(images_per_group=2, features=4, **router):
    """A built layer of 3 experts with random weights."""
    router = {"num_selected_experts": 2, "capacity_factor": 0.6, **router}
    layer = layers.MoEMLP(
        num_experts=3,
        hidden_dim=5,
        router=layers.TopKRouter(3, **router),
        images_per_group=images_per_group,
        activation="gelu_tanh",
    )
    layer.build((None, None, features))
    return randomize(layer)


def images_of(*shape, seed=0):
    generator = np.random.default_rng(seed)
    return generator.normal(size=shape).astype("float32")


def expected_of(layer, images, mask=None):
    """`moe_slowly` with a layer's weights and settings."""
    router = layer.router
    out = moe_slowly(
        images.reshape(len(images), -1, images.shape[-1]),
        gate_kernel_of(layer),
        experts_of(layer),
        router.num_selected_experts,
        router.capacity_factor,
        layer.images_per_group,
        router.batch_priority,
        gelu_tanh,
        mask,
    )
    return out.reshape(images.shape)


def assert_same(got, expected):
    got = ops.convert_to_numpy(got)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "images_per_group", "router"),
    [
        # An image is one row of tokens, a map, a stack of maps.
        ((3, 6, 4), 2, {}),
        ((3, 2, 3, 4), 2, {}),
        ((3, 2, 1, 3, 4), 2, {"batch_priority": True}),
        # One token per image; one group for all; one group per image, K = E.
        ((5, 1, 4), 2, {}),
        ((3, 6, 4), None, {"num_selected_experts": 1}),
        ((3, 6, 4), 1, {"num_selected_experts": 3, "batch_priority": True}),
    ],
)
def test_any_middle_axes(shape, images_per_group, router):
    layer = make_layer(images_per_group, **router)
    images = images_of(*shape)
    out = compiled(layer)(images)
    assert tuple(out.shape) == shape
    assert_same(out, expected_of(layer, images))


def test_any_batch_compiled():
    # From one image to two groups and three images more, in the program that
    # `predict` compiles for a batch of unknown size.
    layer = make_layer()
    inputs = keras.Input((6, 4))
    model = keras.Model(inputs, layer(inputs))
    for batch in range(1, 8):
        images = images_of(batch, 6, 4)
        out = model.predict(images, verbose=0, batch_size=batch)
        assert_same(out, expected_of(layer, images))


@pytest.mark.parametrize(
    "batch",
    # Eager JAX compiles each operation for each new shape.
    first_everywhere([5, 1, 2, 3, 4, 6, 7]),
)
def test_any_batch_eager(batch):
    layer = make_layer()
    images = images_of(batch, 6, 4)
    assert_same(layer(images), expected_of(layer, images))


@pytest.mark.slow
@pytest.mark.parametrize("images_per_group", first_everywhere([3, 1, 8]))
def test_any_batch_and_group(images_per_group):
    for batch_priority in (False, True):
        layer = make_layer(images_per_group, batch_priority=batch_priority)
        for batch in range(1, 2 * images_per_group + 4):
            images = images_of(batch, 3, 4)
            out = compiled(layer)(images)
            assert_same(out, expected_of(layer, images))


# Only TensorFlow traces a batch without its size.
@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("images_per_group", [1, 2, 8, "batch"])
def test_dynamic_batch(images_per_group):
    import tensorflow as tf

    layer = make_layer(images_per_group)
    traced = tf.function(
        layer, input_signature=[tf.TensorSpec([None, 6, 4], tf.float32)]
    )
    for batch in (1, 2, 5, 7):
        images = images_of(batch, 6, 4)
        assert_same(traced(images), expected_of(layer, images))
    # A served model must answer an empty request.
    assert traced(images_of(0, 6, 4)).shape == (0, 6, 4)


@pytest.mark.parametrize("images_per_group", [1, 8, "batch"])
def test_an_empty_batch(images_per_group):
    layer = compiled(make_layer(images_per_group))
    assert tuple(layer(images_of(0, 6, 4)).shape) == (0, 6, 4)


def test_an_empty_batch_adds_no_loss():
    layer = make_layer(2, noise_std=1.0)

    def losses(images):
        layer(images, training=True)
        return sum(layer.losses)

    assert float(compiled(losses, layer)(images_of(0, 6, 4))) == 0.0


@pytest.mark.parametrize("images_per_group", [1, 2, 4, "batch"])
def test_masked_tokens_take_no_place(images_per_group):
    # As many tokens as an image has objects, say, filled up with zeros: Keras
    # hands the mask of `Masking` on to the layer, and to those behind it.
    layer = make_layer(images_per_group, batch_priority=True)
    images = images_of(3, 6, 4)
    images[0, 4:], images[2, 1:] = 0, 0
    inputs = keras.Input((6, 4))
    masked = keras.layers.Masking()(inputs)
    model = keras.Model(inputs, layer(masked))
    out = model.predict(images, verbose=0)
    mask = images.any(axis=-1)
    assert_same(out, expected_of(layer, images, mask))
    assert not out[~mask].any()
    assert layer.compute_mask(masked, masked._keras_mask) is masked._keras_mask


def test_xla_compiles_a_partial_group():
    # `jit_compile=True`, which is what a TPU needs, with a batch of 5 images.
    layer = make_layer()
    inputs = keras.Input((6, 4))
    model = keras.Model(inputs, layer(inputs))
    if keras.backend.backend() != "torch":
        model.compile("sgd", "mse", jit_compile=True)
    images = images_of(5, 6, 4)
    out = model.predict(images, verbose=0, batch_size=5)
    assert_same(out, expected_of(layer, images))
    model.compile("sgd", "mse", jit_compile=keras.backend.backend() != "torch")
    assert np.isfinite(model.fit(images, images, verbose=0).history["loss"][0])


@pytest.mark.parametrize(
    ("batch", "capacity_factor", "batch_priority"),
    # A batch below one group of 4 images, 24 tokens. With factor 0.6 a full
    # group gives each of 3 experts 12 places (9.6, rounded up). One image has 6
    # tokens and so 6 places, three images have 18 tokens and 12 places.
    [(1, 0.6, False), (3, 0.6, False), (3, 0.6, True), (3, 0.1, True)],
)
def test_small_batch_is_a_group_filled_up(
    batch, capacity_factor, batch_priority
):
    layer = make_layer(
        4, capacity_factor=capacity_factor, batch_priority=batch_priority
    )
    images = images_of(batch, 6, 4)
    tokens = np.zeros((1, 24, 4), "float32")
    tokens[0, : batch * 6] = images.reshape(-1, 4)
    # Even if what fills the group looked like the surest tokens of all.
    tokens[0, batch * 6 :] = 9.0
    mask = np.arange(24)[None] < batch * 6

    def filled(tokens, mask):
        gates = ops.softmax(layer.router.gate_layer(tokens))
        capacity = routing.capacity(24, 3, 2, capacity_factor)
        plan = routing.top_k_plan(gates, 2, capacity, batch_priority, mask)
        return plan.combine(layer.experts(plan.dispatch(tokens)))

    expected = ops.convert_to_numpy(compiled(filled)(tokens, mask))
    assert_same(
        compiled(layer)(images), expected[0, : batch * 6].reshape(batch, 6, 4)
    )


def test_images_of_other_groups_do_not_matter():
    layer = compiled(make_layer(images_per_group=2))
    images = images_of(5, 6, 4)
    changed = images.copy()
    changed[2:] = images_of(3, 6, 4, seed=1)
    out, other = (ops.convert_to_numpy(layer(x)) for x in (images, changed))
    np.testing.assert_array_equal(out[:2], other[:2])
    assert (out[2:] != other[2:]).any(axis=(1, 2)).all()


def test_a_dropped_token_gets_zero():
    # All tokens are alike, so they choose the same expert, which has room for
    # the first 4 of them.
    layer = make_layer(1, num_selected_experts=1, capacity_factor=0.5)
    out = ops.convert_to_numpy(compiled(layer)(np.ones((1, 12, 4), "float32")))
    assert (out[0, :4] != 0).any(axis=-1).all()
    assert not out[0, 4:].any()


def test_experts_without_tokens_have_no_gradient():
    # Positive tokens and a gate that dislikes expert 1: it gets no token, so
    # its weights get exactly nothing; the others' weights do.
    layer = make_layer(2, num_selected_experts=1, capacity_factor=3.0)
    kernel = np.zeros((4, 3), "float32")
    kernel[:2, 0], kernel[2:, 2], kernel[:, 1] = 1.0, 1.0, -9.0
    layer.router.gate_layer.kernel.assign(kernel)
    images = ops.convert_to_tensor(np.abs(images_of(2, 6, 4)))
    gradients = weight_gradients(
        layer, lambda: ops.sum(ops.square(layer(images)))
    )
    experts = {k: v for k, v in gradients.items() if "experts/" in k}
    assert len(experts) == 4
    for path, gradient in experts.items():
        assert gradient[0].any() and gradient[2].any(), path
        assert not gradient[1].any(), path


# Noise.


class RecordingRouter(layers.TopKRouter):
    """Keeps the logits that it makes its plans of."""

    def make_plan(self, logits, mask, group_size):
        self.logits = logits
        return super().make_plan(logits, mask, group_size)


def recorder(router, training):
    """The router's logits, compiled, as a function of tokens."""

    def logits(tokens):
        router(tokens, training=training)
        return router.logits

    record = compiled(logits, router)
    return lambda tokens: ops.convert_to_numpy(record(tokens))


def recording_router(**arguments):
    router = RecordingRouter(4, **arguments)
    router.build((None, None, 8))
    return randomize(router)


def test_noise_has_its_size_and_only_in_training():
    router = recording_router(noise_std=2.0, seed=1)
    tokens = images_of(1, 2000, 8)
    clean = recorder(router, training=False)
    noisy = recorder(router, training=True)
    logits = clean(tokens)
    np.testing.assert_array_equal(clean(tokens), logits)
    first = noisy(tokens) - logits
    second = noisy(tokens) - logits
    # 8000 draws of N(0, (2 / 4)^2).
    assert first.std() == pytest.approx(0.5, rel=0.03)
    assert first.mean() == pytest.approx(0.0, abs=0.03)
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.05


def test_a_seed_repeats_its_noise():
    tokens = images_of(1, 6, 8)
    runs = []
    for seed in (1, 1, 2):
        noisy = recorder(recording_router(seed=seed), training=True)
        runs.append([noisy(tokens), noisy(tokens)])
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (runs[0][0] != runs[2][0]).any()


def test_no_noise():
    router = recording_router(noise_std=0.0)
    tokens = images_of(1, 6, 8)
    clean = recorder(router, training=False)(tokens)
    noisy = recorder(router, training=True)(tokens)
    np.testing.assert_array_equal(noisy, clean)


# Auxiliary losses.


def test_losses_in_training_only():
    layer = make_layer()
    images = images_of(2, 6, 4)
    layer(images)
    assert layer.losses == []
    layer(images, training=True)
    assert len(layer.losses) == 1
    layer(images, training=False)
    assert layer.losses == []


def losses_in_training(layer, images):
    """The losses of one compiled training step, and the logits with noise."""

    def step(images):
        layer(images, training=True)
        return list(layer.losses), getattr(layer.router, "logits", 0)

    return compiled(step, layer)(images)


def test_no_loss_without_weights():
    layer = make_layer(importance_loss_weight=0.0, load_loss_weight=0.0)
    added, _ = losses_in_training(layer, images_of(2, 6, 4))
    assert added == []
    assert layer.router.statistics.result()["auxiliary_loss"] == 0.0


WEIGHTS = {
    "importance_loss_weight": 0.5,
    "load_loss_weight": 3.0,
    "gshard_loss_weight": 7.0,
    "z_loss_weight": 11.0,
    "local_entropy_loss_weight": 13.0,
    "global_entropy_loss_weight": 17.0,
    "min_experts": 2.9,
}


@pytest.mark.parametrize(
    ("batch", "noise_std"),
    [
        (3, 0.9),
        (3, 0.0),
        pytest.param(1, 0.9, marks=pytest.mark.slow),
        pytest.param(4, 0.9, marks=pytest.mark.slow),
    ],
)
def test_losses_are_weighted_and_averaged_over_groups(batch, noise_std):
    # With noise: importance, z-loss and entropies of the clean logits, load of
    # both, GShard of the noisy ones. Without: no load loss. The partial group
    # of the 3 images counts as one group, its filling not at all.
    router = RecordingRouter(
        3, num_selected_experts=2, noise_std=noise_std, seed=3, **WEIGHTS
    )
    layer = layers.MoEMLP(3, 5, router=router, images_per_group=2)
    layer.build((None, 6, 4))
    images = images_of(batch, 6, 4)
    (loss,), noisy = losses_in_training(layer, images)
    noisy = ops.convert_to_numpy(noisy).astype("float64")

    expected = []
    for g in range(0, batch, 2):
        tokens = images[g : g + 2].reshape(-1, 4)
        clean = tokens @ gate_kernel_of(layer)
        with_noise = noisy[g // 2, : len(tokens)]
        total = 0.5 * importance_slowly(softmax(clean))
        if noise_std:
            total += 3.0 * load_slowly(clean, with_noise, 0.3, 2)
        total += 7.0 * gshard_slowly(softmax(with_noise))
        total += 11.0 * z_slowly(clean)
        total += 13.0 * local_entropy_slowly(softmax(clean))
        total += 17.0 * global_entropy_slowly(softmax(clean), 2.9)
        expected.append(total)
    loss = float(ops.convert_to_numpy(loss))
    assert loss == pytest.approx(np.mean(expected), rel=1e-4)
    reported = layer.router.statistics.result()["auxiliary_loss"]
    assert reported == pytest.approx(loss, rel=1e-6)


# Initial values.


def test_each_expert_starts_as_if_it_were_alone():
    experts = layers.MLPExperts(num_experts=8, hidden_dim=96)
    experts.build((None, 8, None, 48))
    for kernel in (experts.hidden_kernel, experts.output_kernel):
        values = ops.convert_to_numpy(kernel)
        limit = np.sqrt(6 / (48 + 96))
        assert np.abs(values).max() <= limit
        for expert in values:
            # A uniform variable's standard deviation is its limit / sqrt(3).
            assert expert.std() == pytest.approx(limit / np.sqrt(3), rel=0.04)
            assert np.abs(expert).max() > 0.97 * limit
        assert len({float(expert[0, 0]) for expert in values}) == 8
    for bias in (experts.hidden_bias, experts.output_bias):
        assert np.abs(ops.convert_to_numpy(bias)).max() < 1e-5


def test_a_lone_expert_is_the_dense_mlp():
    dense = layers.MLP(hidden_dim=5, activation="gelu_tanh")
    experts = layers.MLPExperts(1, 5, activation="gelu_tanh")
    dense.build((None, 6, 4))
    experts.build((None, 1, None, 4))
    randomize(dense)
    for weight, source in zip(experts.weights, dense.weights, strict=True):
        weight.assign(ops.reshape(source, weight.shape))
    x = images_of(2, 6, 4)
    expected = ops.convert_to_numpy(compiled(dense)(x))
    assert_same(compiled(experts)(x[:, None])[:, 0], expected)


def test_experts_do_not_mix_groups_or_experts():
    experts = layers.MLPExperts(3, 5)
    experts.build((None, 3, None, 4))
    randomize(experts)
    call = compiled(experts)
    buffers = images_of(2, 3, 4, 4)
    out = ops.convert_to_numpy(call(buffers))
    for g, e in np.ndindex(2, 3):
        changed = buffers.copy()
        changed[g, e] += 1.0
        different = ops.convert_to_numpy(call(changed)) != out
        assert different[g, e].all()
        different[g, e] = False
        assert not different.any()


def test_number_of_weights():
    layer = make_layer()
    # Gate D * E; experts E * (D * F + F + F * D + D). Nothing else: seeds and
    # statistics are no weights.
    assert layer.count_params() == 4 * 3 + 3 * (4 * 5 + 5 + 5 * 4 + 4)
    assert len(layer.weights) == 5
    assert len(layer.trainable_weights) == 5


@pytest.mark.slow
@pytest.mark.backends("torch")
def test_torch_compile():
    """Without code generation, for the sake of speed."""
    import torch

    layer = make_layer()
    images = images_of(5, 6, 4)
    step = torch.compile(layer, backend="eager")
    assert_same(step(ops.convert_to_tensor(images)), expected_of(layer, images))


def test_names_read_well():
    names = [layers.MoEMLP(2, 4).name for _ in range(2)]
    assert all(re.fullmatch(r"moe_mlp(_\d+)?", name) for name in names)
    assert names[0] != names[1]
    shared = layers.SharedExpertMoEMLP(2, 4, shared_hidden_dim=4)
    assert shared.name.startswith("shared_expert_moe_mlp")
    assert layers.MoEMLP(2, 4, name="mine").name == "mine"


@pytest.mark.parametrize(
    "name", ["top_k", "bias_balanced", "expert_choice", "soft"]
)
def test_a_router_by_its_name(name):
    layer = layers.MoEMLP(4, 8, router=name)
    assert layer(images_of(2, 6, 4)).shape == (2, 6, 4)
    words = type(layer.router).__name__.lower()
    assert name.replace("_", "") in words
