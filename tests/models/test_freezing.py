"""What is frozen stays frozen: in files, clones, other routings, experts."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_vmoe import layers
from keras_vmoe import models
from keras_vmoe.layers.attention import SelfAttention
from keras_vmoe.layers.pooling import AttentionPooling
from tests.models.definitions import images_of
from tests.models.definitions import tiny

MOE = {"layers": "last_1", "num_experts": 2}


def vit():
    return tiny(moe=MOE)


def convnext():
    return models.ConvNeXtMoE(
        depths=[1, 1], dims=[8, 16], num_classes=3, image_size=8, patch_size=4,
        moe=MOE,
    )  # fmt: skip


def functional():
    router = layers.BiasBalancedRouter(2, name="mine")
    inputs = keras.Input((4, 8))
    x = layers.MoEMLP(2, 8, router)(layers.MLP(4)(inputs))
    x = SelfAttention(2)(AttentionPooling(2, 8)(x)[:, None])
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(x))


def moe_of(model):
    return next(x for x in model.layers if isinstance(x, layers.MoEMLP))


def all_but_head(model):
    for layer in model.layers:
        layer.trainable = layer.name == "head"


def router(model):
    moe_of(model).router.trainable = False


def gate(model):
    moe_of(model).router.gate_layer.trainable = False


def experts(model):
    moe_of(model).experts.trainable = False


def all_but_router(model):
    moe_of(model).trainable = False
    moe_of(model).router.trainable = True


def everything(model):
    model.trainable = False


FREEZE = [all_but_head, router, gate, experts, all_but_router, everything]


def reloaded(model, folder):
    return models.load(models.save(model, folder / "m.keras"))


def cloned(model, folder):
    return keras.models.clone_model(model)


def routed(model, folder):
    return models.set_routing(model, capacity_factor=2.0)


def configured(model, folder):
    return type(model).from_config(model.get_config())


@pytest.mark.backends("torch")
@pytest.mark.parametrize("way", [reloaded, cloned, routed, configured])
@pytest.mark.parametrize("freeze", FREEZE)
@pytest.mark.parametrize("make", [vit, convnext, functional])
def test_frozen_parts_stay_frozen(make, freeze, way, tmp_path):
    model = make()
    before = len(model.trainable_weights)
    freeze(model)
    assert len(model.trainable_weights) < before
    other = way(model, tmp_path)
    flags = [[x.trainable for x in each.weights] for each in (model, other)]
    assert flags[0] == flags[1]
    for one, two in zip(model.layers, other.layers, strict=True):
        is_input = isinstance(one, keras.layers.InputLayer)
        assert one.trainable == two.trainable or is_input
    assert len(other.trainable_weights) == len(model.trainable_weights)


@pytest.mark.backends("torch")
@pytest.mark.parametrize("router", ["top_k", "bias_balanced"])
def test_a_layer_that_is_made_frozen(router, tmp_path):
    """It is as after `trainable = False`, with what is thawed in it."""
    inputs = keras.Input((4, 8))
    layer = layers.SharedExpertMoEMLP(
        2, 8, shared_hidden_dim=4, router=router, trainable=False
    )
    model = keras.Model(inputs, layer(inputs))
    for each in (model, reloaded(model, tmp_path), routed(model, tmp_path)):
        each(np.ones((2, 4, 8), "float32"), training=True)
        assert not each.trainable_weights and not each.losses
        biases = [x for x in each.weights if x.path.endswith("balance/bias")]
        assert len(biases) == (router == "bias_balanced")
        assert not any(ops.convert_to_numpy(x).any() for x in biases)
    router = layers.TopKRouter(2)
    layer = layers.MoEMLP(2, 8, router, trainable=False)
    router.trainable = True
    new = layers.MoEMLP.from_config(layer.get_config())  # Not built.
    assert new.router.trainable and not new.experts.trainable
    model = keras.Model(inputs, layer(inputs))
    for each in (model, reloaded(model, tmp_path), routed(model, tmp_path)):
        assert len(each.trainable_weights) == 1
    assert router.trainable and not layer.experts.trainable


@pytest.mark.backends("torch")
def test_parts_inside_of_layers_of_a_functional_model(tmp_path):
    inputs = keras.Input((4, 8))
    moe = layers.SharedExpertMoEMLP(2, 8, shared_hidden_dim=4)
    mlp, attention = layers.MLP(4), SelfAttention(2)
    model = keras.Model(inputs, attention(mlp(moe(inputs))))
    before = len(model.trainable_weights)
    mlp.hidden_dense.trainable = False
    moe.shared_expert.hidden_dense.trainable = False
    attention.attention.trainable = False
    for each in (model, reloaded(model, tmp_path), cloned(model, tmp_path)):
        assert len(each.trainable_weights) == before - 12
    each.get_layer(mlp.name).hidden_dense.trainable = True
    assert len(cloned(each, tmp_path).trainable_weights) == before - 10


def test_parts_inside_of_a_dense_layer(tmp_path):
    model = vit()
    model.get_layer("block_0_mlp").hidden_dense.trainable = False
    model = reloaded(model, tmp_path)
    mlp = model.get_layer("block_0_mlp")
    assert not mlp.hidden_dense.trainable and mlp.output_dense.trainable


@pytest.mark.backends("jax", "torch")
def test_a_run_goes_on_as_it_was(tmp_path):
    model = vit()
    all_but_head(model)
    model.compile("adam", "mse")
    images = images_of(4)
    targets = np.zeros((4, model.num_classes))
    model.fit(images, targets, verbose=0)
    other = reloaded(model, tmp_path)
    assert int(other.optimizer.iterations) == 1
    before = [ops.convert_to_numpy(x) for x in other.non_trainable_weights]
    for each in (model, other):
        each.fit(images, targets, verbose=0)
    for frozen, value in zip(other.non_trainable_weights, before, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(frozen), value)
    for one, two in zip(model.weights, other.weights, strict=True):
        np.testing.assert_allclose(
            ops.convert_to_numpy(one), ops.convert_to_numpy(two), atol=1e-6
        )


def test_a_frozen_balance_bias_stays_as_it_is(tmp_path):
    model = functional()
    moe_of(model).router.trainable = False
    model.compile("sgd", "mse")
    model = reloaded(model, tmp_path)
    x = np.random.default_rng(0).normal(size=(8, 4, 8)).astype("float32")
    model.fit(x, np.zeros((8, 1, 3)), verbose=0)
    assert not ops.convert_to_numpy(moe_of(model).router.bias).any()


def test_upcycling_keeps_what_the_dense_model_has_frozen():
    dense = tiny(moe=None)
    all_but_head(dense)
    dense.get_layer("block_3_mlp").trainable = True
    sparse = models.upcycle(dense, MOE)
    assert sparse.get_layer("block_3_moe").trainable
    assert not sparse.get_layer("block_0_mlp").trainable
    dense.get_layer("block_0_attention").trainable = True
    dense.get_layer("block_0_attention").attention.trainable = False
    dense.get_layer("block_3_mlp").trainable = False
    sparse = models.upcycle(dense, MOE)
    assert not sparse.get_layer("block_0_attention").attention.trainable
    moe = sparse.get_layer("block_3_moe")
    assert moe.router.trainable_weights
    assert not moe.experts.trainable_weights
    frozen = tiny(moe=None)
    frozen.trainable = False
    assert not models.upcycle(frozen, MOE).trainable_weights
