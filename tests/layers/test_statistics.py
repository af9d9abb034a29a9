"""What a router remembers of its training steps."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_vmoe import inspection
from keras_vmoe import layers
from keras_vmoe import routing
from tests.gradients import compiled
from tests.harness import first_everywhere
from tests.harness import randomize
from tests.layers.definitions import gate_kernel_of
from tests.layers.definitions import plan_slowly
from tests.layers.definitions import softmax
from tests.routing.definitions import experts_of_images_slowly
from tests.routing.definitions import importance_slowly
from tests.routing.definitions import top_k_slowly
from tests.routing.definitions import z_slowly


@pytest.fixture(scope="module")
def trained():
    """A MoE layer after `fit` over batches of 2, 2 and 1 images, and these.

    With a learning rate of 0 and without noise each step is known.
    """
    keras.utils.set_random_seed(0)
    router = layers.TopKRouter(
        3, num_selected_experts=2, capacity_factor=0.6, noise_std=0.0
    )
    layer = layers.MoEMLP(3, 5, router=router, images_per_group=2)
    inputs = keras.Input((6, 4))
    model = keras.Model(inputs, layer(inputs))
    randomize(model)
    model.compile(keras.optimizers.SGD(0.0), loss="mse")
    images = np.random.default_rng(0).normal(size=(5, 6, 4)).astype("float32")
    model.fit(images, images, batch_size=2, shuffle=False, verbose=0)
    return model, layer, images


def steps_slowly(layer, images):
    """Load share, dropped share and loss of each batch, by definition."""
    steps = []
    for start in (0, 2, 4):
        tokens = images[start : start + 2].reshape(1, -1, 4)
        gates = softmax(tokens @ gate_kernel_of(layer))
        # 2 images of 6 tokens: ceil(12 * 2 * 0.6 / 3) = 5, rounded up to 8. A
        # single image has but 6 tokens, and so 6 places.
        capacity = min(8, tokens.shape[1])
        dispatch, _, load = top_k_slowly(gates, 2, capacity)
        steps.append(
            (
                load[0] / load.sum(),
                1 - dispatch.sum() / load.sum(),
                0.005 * importance_slowly(gates[0]),
            )
        )
    return steps


def test_means_over_the_steps_of_fit(trained):
    _, layer, images = trained
    load, dropped, loss = zip(*steps_slowly(layer, images), strict=True)
    assert max(dropped) > 0, "this test is about dropped choices"
    result = layer.router.statistics.result()
    np.testing.assert_allclose(
        result["load_share"], np.mean(load, axis=0), rtol=1e-5
    )
    assert result["load_share"].sum() == pytest.approx(1.0)
    assert result["dropped_share"] == pytest.approx(np.mean(dropped), rel=1e-5)
    assert result["auxiliary_loss"] == pytest.approx(np.mean(loss), rel=1e-4)


def test_inference_leaves_them_alone(trained):
    model, layer, images = trained
    before = layer.router.statistics.result()
    model.evaluate(images, images, batch_size=2, verbose=0)
    model.predict(images, batch_size=2, verbose=0)
    after = layer.router.statistics.result()
    np.testing.assert_array_equal(after["load_share"], before["load_share"])
    assert after["auxiliary_loss"] == before["auxiliary_loss"]


def test_they_are_no_weights(trained, tmp_path):
    model, layer, _ = trained
    state = layer.router.statistics.state
    assert all(weight is not state for weight in model.weights)
    assert model.count_params() == 4 * 3 + 3 * (4 * 5 + 5 + 5 * 4 + 4)
    # Nor are they saved: a loaded model has seen no step.
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for part in loaded.layers[1:]:
        assert part.router.statistics.result() is None


def test_reset():
    layer = layers.MoEMLP(2, 5, router=layers.TopKRouter(2, noise_std=0.0))
    layer.build((None, 6, 4))
    statistics = layer.router.statistics
    assert statistics.result() is None
    step = compiled(lambda x: layer(x, training=True), layer)
    step(np.ones((1, 6, 4), "float32"))
    # All tokens are alike: one expert gets them all.
    assert sorted(statistics.result()["load_share"]) == [0.0, 1.0]
    statistics.reset()
    assert statistics.result() is None
    step(np.ones((1, 6, 4), "float32"))
    assert sorted(statistics.result()["load_share"]) == [0.0, 1.0]


def test_layers_of_one_name_are_told_apart():
    # Two nested models, each with a layer "moe".
    def tower():
        inputs = keras.Input((6, 4))
        return keras.Model(inputs, layers.MoEMLP(2, 5, name="moe")(inputs))

    inputs = keras.Input((6, 4))
    model = keras.Model(inputs, tower()(inputs) + tower()(inputs))
    model.compile("sgd", "mse")
    model.fit(np.ones((4, 6, 4)), np.ones((4, 6, 4)), verbose=0)
    found = inspection.routing_statistics(model)
    assert list(found) == ["moe", "moe_1"]


def test_padding_does_not_count():
    # 3 images in groups of 2: 6 tokens of filling choose nobody.
    layer = layers.MoEMLP(
        2,
        5,
        router=layers.TopKRouter(2, num_selected_experts=2, noise_std=0.0),
        images_per_group=2,
    )
    layer.build((None, 6, 4))
    step = compiled(lambda x: layer(x, training=True), layer)
    step(np.random.default_rng(0).normal(size=(3, 6, 4)).astype("float32"))
    result = layer.router.statistics.result()
    np.testing.assert_allclose(result["load_share"], [0.5, 0.5])
    assert result["dropped_share"] == 0.0


def test_the_mean_forgets_nothing():
    # 100 steps of a known mean, without the rounding of a running sum.
    layer = layers.TopKRouter(2)
    gates = ops.convert_to_tensor([[[0.5, 0.5]] * 4], "float32")
    # Four tokens of two images; a place for each of the first two.
    plan = routing.top_k_plan(gates, 1, capacity=2)

    def step(loss):
        layer.statistics.update(plan, loss, gates, None, 2)
        return loss

    step = compiled(step, layer)
    for i in range(100):
        step(np.float32(i % 2))
    result = layer.statistics.result()
    assert result["auxiliary_loss"] == pytest.approx(0.5, rel=1e-5)
    assert result["dropped_share"] == pytest.approx(0.5, rel=1e-5)
    assert result["gate_entropy"] == pytest.approx(np.log(2), rel=1e-5)
    assert result["importance_cv2"] == 0.0
    # The first image has one expert of two, the second none.
    assert result["experts_per_image"] == pytest.approx(0.25, rel=1e-5)
    np.testing.assert_allclose(result["load_share"], [1.0, 0.0], rtol=1e-5)


# Every router, every figure, recounted.

ROUTERS = {
    "top-k": (layers.TopKRouter, {"num_selected_experts": 2}),
    "priority": (
        layers.TopKRouter,
        {"batch_priority": True, "capacity_factor": 0.6, "gate": "cosine"},
    ),
    "dropless": (
        layers.TopKRouter,
        {"num_selected_experts": 2, "capacity_factor": "dropless"},
    ),
    "bias balanced": (
        layers.BiasBalancedRouter,
        {"capacity_factor": 0.6, "update_rate": 0.0},
    ),
    "expert choice": (
        layers.ExpertChoiceRouter,
        {"capacity_factor": 0.6, "z_loss_weight": 0.5},
    ),
    "soft": (layers.SoftRouter, {"num_slots": 2}),
}


def softmax_of_slots(logits):
    """What a token gives to each expert: the sum of its slots' shares."""
    flat = logits.reshape(*logits.shape[:2], -1)
    return softmax(flat).reshape(logits.shape).sum(axis=-1)


def figures_slowly(router, tokens, mask, group_size, images_per_group):
    """All statistics of one step, of `(G, S, D)` tokens and their mask."""
    logits, dispatch, _, load = plan_slowly(router, tokens, group_size, mask)
    is_soft = isinstance(router, layers.SoftRouter)
    gates = softmax_of_slots(logits) if is_soft else softmax(logits)
    importance, z = [], []
    for g in range(len(tokens)):
        importance.append(importance_slowly(gates[g, mask[g]]))
        z.append(0.0 if is_soft else z_slowly(logits[g, mask[g]]))
    dropped, load = 0.0, load.sum(axis=0)
    if isinstance(router, layers.ExpertChoiceRouter):
        served = dispatch.any(axis=(2, 3))
        dropped = (mask & ~served).sum() / mask.sum()
    elif not is_soft:
        dropped = 1 - dispatch.sum() / load.sum()
    used = experts_of_images_slowly(dispatch, images_per_group)
    exists = mask.reshape(len(tokens), images_per_group, -1).any(axis=-1)
    return {
        "auxiliary_loss": (
            getattr(router, "importance_loss_weight", 0) * np.mean(importance)
            + getattr(router, "z_loss_weight", 0) * np.mean(z)
        ),
        "dropped_share": dropped,
        "gate_entropy": -(gates * np.log(gates)).sum(axis=-1)[mask].mean(),
        "importance_cv2": np.mean(importance),
        "experts_per_image": used[exists].mean(),
        "load_share": load / load.sum(),
    }


def in_groups(images, mask, images_per_group):
    """Groups, filled up with masked images where there are several."""
    size = min(images_per_group or len(images), len(images))
    while len(images) % size:
        images = np.concatenate([images, np.zeros_like(images[:1])])
        mask = np.concatenate([mask, np.zeros_like(mask[:1])])
    shape = (len(images) // size, size * images.shape[1])
    return images.reshape(*shape, -1), mask.reshape(shape), size


@pytest.mark.parametrize("masked", first_everywhere([True, False]))
@pytest.mark.parametrize("name", ROUTERS)
def test_every_figure_of_every_router(name, masked):
    # 3 images in groups of 2: a partial group. Then 1 image: a small one.
    router, settings = ROUTERS[name]
    router = router(3, **{"noise_std": 0.0, **settings})
    images_per_group = 1 if name == "soft" else 2
    layer = layers.MoEMLP(3, 5, router, images_per_group=images_per_group)
    layer.build((None, 6, 4))
    randomize(layer)
    generator = np.random.default_rng(0)
    images = generator.normal(size=(4, 6, 4)).astype("float32")
    mask = np.ones((4, 6), bool)
    if masked:
        mask[0, 4:], mask[2, 1:], mask[3, 0] = False, False, False

    def step(images, mask=None):
        return layer(images, mask=mask, training=True)

    step, steps = compiled(step, layer), []
    for part in (slice(0, 3), slice(3, 4)):
        step(*((images[part], mask[part]) if masked else (images[part],)))
        tokens, kept, size = in_groups(
            images[part], mask[part], images_per_group
        )
        full = 6 * images_per_group
        steps.append(figures_slowly(router, tokens, kept, full, size))
    result = layer.router.statistics.result()
    assert set(result) == set(steps[0])
    for figure, value in result.items():
        expected = np.mean([step[figure] for step in steps], axis=0)
        np.testing.assert_allclose(
            value, expected, rtol=1e-4, atol=1e-6, err_msg=figure
        )


@pytest.mark.parametrize("name", ROUTERS)
def test_an_empty_batch_leaves_the_means_finite(name):
    router, settings = ROUTERS[name]
    layer = layers.MoEMLP(3, 5, router(3, **settings))
    layer.build((None, 6, 4))
    step = compiled(lambda x: layer(x, training=True), layer)
    for batch in (0, 1):
        step(np.ones((batch, 6, 4), "float32"))
    for figure, value in layer.router.statistics.result().items():
        assert np.isfinite(value).all(), figure
