"""`upcycle`: MoE models that start from dense ones."""

import types

import keras
import numpy as np
import pytest

from keras_vmoe import models
from tests.harness import first_everywhere
from tests.harness import randomize
from tests.layers.definitions import float64
from tests.models.definitions import tiny


def dense(kind="vit"):
    """A dense model with random weights, and images for it."""
    if kind == "vit":
        model, size = tiny(moe=None, pooling="gap"), 8
    else:
        size = 16
        model = models.ConvNeXtMoE(
            depths=(1, 3), dims=(8, 12), num_classes=10, image_size=size
        )
    generator = np.random.default_rng(0)
    images = generator.normal(size=(3, size, size, 3)).astype("float32")
    return randomize(model), images


def predict(model, images):
    return keras.ops.convert_to_numpy(model(images))


KINDS = pytest.mark.parametrize("kind", first_everywhere(["vit", "convnext"]))


@KINDS
@pytest.mark.parametrize("k", first_everywhere([2, 1]))
def test_the_function_is_kept(kind, k):
    model, images = dense(kind)
    moe = {"layers": [1, 3], "num_experts": 4, "num_selected_experts": k}
    sparse = models.upcycle(model, moe, preserve_outputs=True)
    assert type(sparse) is type(model) and len(sparse.moe_layers) == 2
    expected = predict(model, images)
    # Weights of a token that sum to 1, and equal experts.
    np.testing.assert_allclose(
        predict(sparse, images), expected, rtol=2e-5, atol=2e-5
    )
    # It is a model of its own.
    sparse.get_layer("head").bias.assign_add(np.ones(10, "float32"))
    np.testing.assert_array_equal(predict(model, images), expected)


def test_all_experts_of_all_tokens_keep_it_too():
    # K = E: the gates of a token sum to 1 as they are.
    model, images = dense()
    moe = {"layers": [1], "num_experts": 4, "num_selected_experts": 4}
    sparse = models.upcycle(model, {**moe, "capacity_factor": 1.0})
    np.testing.assert_allclose(
        predict(sparse, images), predict(model, images), rtol=1e-4, atol=1e-5
    )


def test_renormalised_gates_with_room_for_all():
    model, images = dense()
    moe = {"layers": [1], "num_experts": 4, "num_selected_experts": 1,
           "renormalize": True, "capacity_factor": 4.0}  # fmt: skip
    sparse = models.upcycle(model, moe)
    np.testing.assert_allclose(
        predict(sparse, images), predict(model, images), rtol=1e-5, atol=1e-5
    )


@pytest.mark.backends("torch")
def test_frozen_layers_stay_frozen():
    model, _ = dense()
    model.get_layer("block_0_mlp").trainable = False
    sparse = models.upcycle(model, {"layers": [1], "num_experts": 2})
    assert not sparse.get_layer("block_0_mlp").trainable
    assert sparse.get_layer("block_2_mlp").trainable


def test_plain_gates_change_the_function():
    model, images = dense()
    sparse = models.upcycle(model, {"layers": [1], "num_experts": 4})
    assert np.abs(predict(sparse, images) - predict(model, images)).max() > 0.01


@pytest.mark.backends("torch")
def test_experts_are_copies_and_noise_is_theirs():
    model, _ = dense()
    moe = {"layers": [3], "num_experts": 4}
    kernel = float64(model.get_layer("block_3_mlp").hidden_dense.kernel)
    plain, noisy, again, other = (
        float64(
            models.upcycle(model, moe, noise_std=std, seed=seed)
            .get_layer("block_3_moe")
            .experts.hidden_kernel
        )
        for std, seed in ((0.0, 0), (0.1, 0), (0.1, 0), (0.1, 1))
    )
    for expert in plain:
        np.testing.assert_array_equal(expert, kernel)
    noise = (noisy - kernel) / kernel.std()
    assert noise.std() == pytest.approx(0.1, rel=0.05)
    assert np.abs(noise[0] - noise[1]).max() > 0.01
    np.testing.assert_array_equal(noisy, again)
    assert (noisy != other).any()


@KINDS
def test_gradients_reach_all_experts(kind):
    """One step from a model as it starts, but for its head, which is zeros."""
    if kind == "vit":
        model, size = tiny(moe=None, pooling="gap"), 8
    else:
        size = 16
        model = models.ConvNeXtMoE(
            depths=(1, 3), dims=(8, 12), num_classes=10, image_size=size,
            layer_scale_init_value=0.1,
        )  # fmt: skip
    randomize(model.get_layer("head"))
    generator = np.random.default_rng(0)
    images = generator.normal(size=(24, size, size, 3)).astype("float32")
    moe = {"layers": [3], "num_experts": 8, "num_selected_experts": 2}
    sparse = models.upcycle(model, moe, preserve_outputs=True)
    assert sparse.moe.capacity_factor == "dropless"
    experts = sparse.get_layer("block_3_moe").experts
    before = float64(experts.output_kernel)
    sparse.compile(keras.optimizers.SGD(1.0), "mse")
    sparse.fit(images, np.ones((24, 10)), batch_size=24, verbose=0)
    moved = float64(experts.output_kernel) - before
    for expert in moved:
        assert np.abs(expert).max() > 0


@pytest.mark.backends("torch")
@pytest.mark.parametrize(
    ("moe", "arguments", "words"),
    [
        ({"hidden_dim": 32}, {}, "Received: 32 for the experts of "
         "'block_1_moe' and 64 in 'block_1_mlp'"),
        ({"capacity_factor": 1.05}, {"preserve_outputs": True},
         "together with capacity_factor=1.05"),
        ({"router": "soft"}, {"preserve_outputs": True}, "router='soft'"),
        ({"renormalize": False}, {"preserve_outputs": True},
         "renormalize=False"),
        ({"shared_hidden_dim": 8}, {"preserve_outputs": True},
         "shared_hidden_dim=8"),
        ({}, {"preserve_outputs": True, "noise_std": 0.1}, "noise_std=0.1"),
        ({}, {"noise_std": -1.0}, "noise_std=-1.0"),
    ],
)  # fmt: skip
def test_bad_arguments(moe, arguments, words):
    moe = {"layers": [1], "num_experts": 4, **moe}
    with pytest.raises(ValueError, match=words):
        models.upcycle(tiny(moe=None), moe, **arguments)


@pytest.mark.backends("torch")
def test_only_our_models():
    with pytest.raises(
        ValueError, match="must be a ViTMoE, ConvNeXtMoE or SwinMoE"
    ):
        models.upcycle(keras.Sequential(), {"num_experts": 2})
    with pytest.raises(ValueError, match="is for a dense model"):
        models.upcycle(tiny(), {"num_experts": 8}, preserve_outputs=True)


@pytest.mark.backends("torch")
def test_experts_become_more_experts():
    """The sum over the copies of an expert is what it was."""
    model = randomize(tiny(moe={"capacity_factor": "dropless"}))
    images = dense()[1]
    twice = {"num_experts": 8, "num_selected_experts": 4}
    more = models.upcycle(model, types.MappingProxyType(twice))
    assert [x.num_experts for x in more.moe_layers] == [8, 8]
    assert more.moe.capacity_factor == "dropless"
    np.testing.assert_allclose(
        predict(more, images), predict(model, images), rtol=1e-4, atol=1e-5
    )
    for moe, words in (
        ({"num_experts": 6}, "num_experts=6 with a TopKRouter for 4"),
        ({"layers": [1]}, "leaves out the experts of block 3"),
        ({"num_experts": 4}, "must add experts or change them"),
    ):
        with pytest.raises(ValueError, match=words):
            models.upcycle(model, moe)
