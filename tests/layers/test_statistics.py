"""What a router remembers of its training steps."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_vmoe import inspection
from keras_vmoe import layers
from tests.gradients import compiled
from tests.harness import randomize
from tests.layers.definitions import gate_kernel_of
from tests.layers.definitions import softmax
from tests.routing.definitions import importance_slowly
from tests.routing.definitions import top_k_slowly


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
    # 1000 steps of a known mean, without the rounding of a running sum.
    layer = layers.TopKRouter(2)
    plan = type(
        "Plan",
        (),
        {
            "dropped_share": lambda self: ops.convert_to_tensor(0.25),
            "load_share": lambda self: ops.convert_to_tensor([0.75, 0.25]),
        },
    )()

    def step(loss):
        layer.statistics.update(plan, loss)
        return loss

    step = compiled(step, layer)
    for i in range(100):
        step(np.float32(i % 2))
    result = layer.statistics.result()
    assert result["auxiliary_loss"] == pytest.approx(0.5, rel=1e-5)
    assert result["dropped_share"] == pytest.approx(0.25, rel=1e-5)
    np.testing.assert_allclose(result["load_share"], [0.75, 0.25], rtol=1e-5)
