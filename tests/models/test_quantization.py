"""Keras's `quantize` and `enable_lora`: files, copies, gates, agreement."""

import gc

import keras
import numpy as np
import pytest
from keras import ops

from keras_vmoe import layers
from keras_vmoe import models
from keras_vmoe._keras import all_layers
from keras_vmoe.layers.attention import SelfAttention
from keras_vmoe.layers.pooling import AttentionPooling
from keras_vmoe.layers.weights import part_of
from keras_vmoe.models.base import MoEModel
from tests.layers.definitions import float64
from tests.models.definitions import images_of
from tests.models.definitions import tiny

# Of the largest logit.
TOLERANCE = 0.1


@pytest.fixture(autouse=True)
def little_garbage():
    """Keras collects it for each kernel that it quantizes, 0.2 s each time."""
    gc.freeze()
    yield
    gc.unfreeze()


def vit():
    moe = {"layers": "last_1", "num_experts": 2, "shared_hidden_dim": 8}
    return tiny(moe=moe, num_layers=2, dropout=0.1)


def convnext():
    return models.ConvNeXtMoE(
        depths=[1, 1], dims=[8, 16], num_classes=10, image_size=8, patch_size=4,
        moe={"layers": "last_1", "num_experts": 2},
    )  # fmt: skip


def functional():
    gate = keras.layers.Dense(2, use_bias=False)
    inputs = keras.Input((8, 8, 3))
    x = layers.MLP(16)(keras.layers.Dense(16)(inputs))
    x = layers.MoEMLP(2, 8, layers.TopKRouter(2, 1, gate=gate))(x)
    x = AttentionPooling(2, 8)(ops.reshape(x, (-1, 64, 16)))
    x = SelfAttention(2)(x[:, None])
    return keras.Model(inputs, keras.layers.Dense(10, name="head")(x[:, 0]))


def randomized(model):
    for i, weight in enumerate(model.weights):
        values = np.random.default_rng(i).normal(size=weight.shape)
        weight.assign(0.3 * values.astype("float32"))
    return model


def quantized(make):
    """Before its first call, which needs layers that are built."""
    model = randomized(make())
    model.quantize("int8")
    return model


def logits(model, images=None):
    images = images_of(4) if images is None else images
    return ops.convert_to_numpy(model(images))


def moe_of(model):
    return next(x for x in model.layers if isinstance(x, layers.MoEMLP))


def reloaded(model, folder):
    return models.load(models.save(model, folder / "m.keras"))


def cloned(model, folder):
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    return clone


def configured(model, folder):
    model.save_weights(folder / "m.weights.h5")
    other = type(model).from_config(model.get_config())
    other.load_weights(folder / "m.weights.h5")
    return other


def routed(model, folder):
    return models.set_routing(
        models.set_routing(model, capacity_factor=0.5), capacity_factor=1.05
    )


WAYS = [reloaded, cloned, configured, routed]
each_model = pytest.mark.parametrize(
    "make",
    [
        vit,
        pytest.param(convnext, marks=pytest.mark.backends("torch")),
        pytest.param(
            functional,
            marks=[
                pytest.mark.backends("tensorflow", "torch"),
                # Keras warns of each layer that it leaves as it is.
                pytest.mark.filterwarnings("ignore:Layer .* `quantize` method"),
            ],
        ),
    ],
)


@each_model
def test_a_quantized_model(make, tmp_path):
    """As right as 8 bits are; the same in files and copies."""
    model = randomized(make())
    right, cost = logits(model), models.cost(model).macs
    gate = float64(moe_of(model).router.gate_layer.kernel)
    model = quantized(make)
    assert models.cost(model).macs == cost
    expected = logits(model)
    error = np.abs(expected - right).max() / np.abs(right).max()
    assert 0 < error < TOLERANCE, error
    modes = {x.name: x.quantization_mode for x in all_layers(model)}
    for name in {"hidden", "output", "query", "experts", "head"} & modes.keys():
        assert modes[name] == "int8", name
    routing = [*all_layers(moe_of(model).router)]
    assert not any(x.quantization_mode for x in routing)
    np.testing.assert_array_equal(
        float64(moe_of(model).router.gate_layer.kernel), gate
    )
    for way in WAYS:
        other = way(model, tmp_path)
        np.testing.assert_allclose(logits(other), expected, atol=1e-6)
        dtypes = [[x.dtype for x in each.weights] for each in (model, other)]
        assert dtypes[0] == dtypes[1]
        flags = [[x.trainable for x in each.weights] for each in (model, other)]
        assert flags[0] == flags[1]


@pytest.mark.backends("jax", "torch")
def test_trained_and_frozen(tmp_path):
    """As Keras does: what has no int8 values is trained."""
    model = quantized(vit)
    moe_of(model).router.trainable = False
    model.compile("sgd", "mse", run_eagerly=keras.backend.backend() == "torch")
    bank = moe_of(model).experts
    before = [float64(x) for x in bank.weights]
    frozen = float64(moe_of(model).router.gate_layer.kernel)
    model.fit(images_of(4), np.zeros((4, 10)), verbose=0)
    for weight, value in zip(bank.weights, before, strict=True):
        moved = (float64(weight) != value).any()
        assert moved == ("bias" in weight.name), weight.path
    other = reloaded(model, tmp_path)
    assert not moe_of(other).router.trainable
    np.testing.assert_array_equal(
        float64(moe_of(other).router.gate_layer.kernel), frozen
    )
    np.testing.assert_allclose(logits(other), logits(model), atol=1e-6)


@pytest.mark.backends("torch")
@each_model
def test_lora(make, tmp_path):
    """Also on a quantized model; the experts have none."""
    model = randomized(make()) if make is convnext else quantized(make)
    gate = all_layers(moe_of(model).router)
    denses = [
        x
        for x in all_layers(model)
        if hasattr(x, "enable_lora") and x not in gate
    ]
    for dense in denses:
        dense.enable_lora(2, lora_alpha=3)
        if dense.quantization_mode is None:
            values = np.full(dense.lora_kernel_b.shape, 0.1)
            dense.lora_kernel_b.assign(values)
    assert {"hidden", "head"} <= {x.name for x in denses}
    other = reloaded(model, tmp_path)
    flags = [[x.trainable for x in each.weights] for each in (model, other)]
    assert flags[0] == flags[1]
    np.testing.assert_allclose(logits(other), logits(model), atol=1e-5)
    for one, two in zip(all_layers(model), all_layers(other), strict=True):
        # Keras's own layers keep the rank only.
        if isinstance(model, MoEModel) or one not in model.layers:
            lora = (2, 3) if one in denses else (None, None)
            found = [getattr(two, f"lora_{x}", None) for x in ("rank", "alpha")]
            assert tuple(found) == lora, one.path


@pytest.mark.backends("torch")
def test_other_modes_and_quantizers(tmp_path):
    config = keras.quantizers.Int8QuantizationConfig(
        weight_quantizer=keras.quantizers.AbsMaxQuantizer(
            axis=0, value_range=(-100, 100)
        ),
        activation_quantizer=None,
    )
    model = randomized(vit())
    only = ["head", "experts"]  # Its axis does not fit attention.
    bank = moe_of(model).experts
    right, bias = float64(bank.hidden_kernel), float64(bank.hidden_bias)
    model.quantize(config=config, filters=only)
    kernel = float64(bank.hidden_kernel)
    scale = float64(bank.hidden_kernel_scale)[:, None]
    assert (np.abs(kernel - right * scale) < 0.501).all()
    np.testing.assert_array_equal(float64(bank.hidden_bias), bias)
    assert part_of(bank.hidden_kernel) == "expert"
    np.testing.assert_array_equal(np.abs(kernel).max((0, 1)), 100)
    other = reloaded(model, tmp_path)
    np.testing.assert_allclose(logits(other), logits(model), atol=1e-6)
    assert other.get_layer("head").inputs_quantizer is None

    model = randomized(vit())
    with pytest.warns(UserWarning, match="experts' kernels .* 'int8' only"):
        model.quantize("int4")
    assert moe_of(model).experts.quantization_mode is None
    np.testing.assert_allclose(
        logits(reloaded(model, tmp_path)), logits(model), atol=1e-6
    )


@pytest.mark.backends("torch")
def test_errors():
    bank = layers.MLPExperts(2, 4)
    bank.build((None, 2, None, 4))
    with pytest.raises(NotImplementedError, match="'int8' only. Rec.*'int4'"):
        bank.quantize("int4")
    bank.__class__ = type("OwnBank", (layers.MLPExperts,), {})
    with pytest.raises(NotImplementedError, match="Only .* Received: a OwnB"):
        bank.quantize("int8")
    layer = layers.MoEMLP(2, 4)
    layer.build((None, 3, 4))
    words = r"Received: mode='int8'. Call `layer.experts.quantize\('int8'\)`"
    with pytest.raises(NotImplementedError, match=words):
        layer.quantize("int8")
    with pytest.raises(AttributeError, match="Gates are not quantized"):
        layer.router.gate_layer.quantize("int8")
    dense = tiny(moe=None)
    dense.quantize("int8")
    with pytest.raises(ValueError, match="floating point. Received.*'int8'"):
        models.upcycle(dense, {"num_experts": 2})
    gate = keras.layers.Dense(2, dtype="gptq/4/128_from_float32")
    with pytest.raises(ValueError, match="saved quantized to .*to 'gptq'"):
        layers.TopKRouter(2, gate=gate).get_config()
    layer = layers.MLP(4)
    layer.build((None, 4))
    layer.hidden_dense.dtype_policy = keras.dtype_policies.get(
        "int8_from_float32"
    )
    assert layer.get_config()["parts"]["hidden"]["quantized"]


class OwnBank(layers.MLPExperts):
    """As its base, which Keras cannot know."""


class OwnLayer(layers.MoEMLP):
    def __init__(self, experts=None, **kwargs):
        super().__init__(experts=OwnBank(2, 4, name="experts"), **kwargs)

    def get_config(self):
        return {**super().get_config(), "experts": None}


@pytest.mark.backends("torch")
def test_a_bank_of_another_class():
    layer = OwnLayer(num_experts=2)
    layer.build((None, 3, 4))
    layer.experts.quantize("int8", type_check=False)
    new = OwnLayer.from_config(layer.get_config())
    new.build((None, 3, 4))
    assert new.experts.quantization_mode == "int8"


@pytest.mark.backends("torch")
def test_a_mixed_policy(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = quantized(vit)
    keras.config.set_dtype_policy("float32")
    assert moe_of(model).experts.dtype_policy.name == "int8_from_mixed_bfloat16"
    other = reloaded(model, tmp_path)
    np.testing.assert_array_equal(logits(other), logits(model))
