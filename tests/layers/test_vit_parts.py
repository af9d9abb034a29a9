"""The parts of a vision transformer, each against numpy."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_vmoe import layers
from keras_vmoe.layers import _blocks
from keras_vmoe.layers import activations
from keras_vmoe.layers import attention
from keras_vmoe.layers import patches
from keras_vmoe.layers import pooling
from keras_vmoe.layers import positions
from keras_vmoe.layers import stochastic
from keras_vmoe.layers.attention import SelfAttention
from keras_vmoe.layers.positions import sincos2d
from tests.gradients import compiled
from tests.harness import randomize
from tests.layers.definitions import attention_slowly
from tests.layers.definitions import float64
from tests.layers.definitions import gelu
from tests.layers.definitions import gelu_tanh
from tests.layers.definitions import layer_norm
from tests.layers.definitions import mlp_slowly
from tests.layers.definitions import patches_slowly

# In the order of `weights`.
ATTENTION = [
    f"{part}/{kind}"
    for part in ("query", "key", "value", "out")
    for kind in ("kernel", "bias")
]
QK_NORM = ["query_ln/scale", "key_ln/scale"]


def random(*shape, seed=0):
    generator = np.random.default_rng(seed)
    return generator.normal(size=shape).astype("float32")


def run(layer, inputs):
    """A layer with random weights, and its compiled output."""
    if not layer.built:
        layer.build(inputs.shape)
    randomize(layer)
    return ops.convert_to_numpy(compiled(layer)(inputs))


def assert_same(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(4, 6), (6, 2)])
def test_patch_embedding(size):
    layer = patches.PatchEmbedding(hidden_dim=8, patch_size=2)
    images = random(2, *size, 3)
    out = run(layer, images)
    kernel, bias = map(float64, layer.projection.weights)
    assert_same(out, patches_slowly(images, kernel, bias))


def test_patch_embedding_starts_as_lecun_normal():
    layer = patches.PatchEmbedding(hidden_dim=64, patch_size=8)
    layer.build((None, 32, 32, 3))
    kernel = float64(layer.projection.kernel)
    assert kernel.std() == pytest.approx((8 * 8 * 3) ** -0.5, rel=0.03)


@pytest.mark.backends("torch")
@pytest.mark.parametrize(
    ("shape", "patch_size", "words"),
    [
        ((None, 30, 32, 3), 4, r"`image_size` must be divisible by "
         r"`patch_size`. Received: image_size=\(30, 32\), patch_size=4. "
         "Resize"),
        ((None, 32, 30, 3), 4, r"image_size=\(32, 30\), patch_size=4"),
        ((None, 32, None, 3), 4, r"must be known. Received: image_size=\(32, "
         r"None\). Set it: `keras.Input"),
    ],
)  # fmt: skip
def test_image_of_broken_patches(shape, patch_size, words):
    with pytest.raises(ValueError, match=words):
        patches.PatchEmbedding(8, patch_size).build(shape)


def test_class_token():
    layer = patches.ClassToken()
    tokens = random(2, 3, 4)
    layer.build(tokens.shape)
    assert not float64(layer.token).any(), "starts at 0"
    layer.token.assign(np.arange(4.0).reshape(1, 1, 4))
    out = ops.convert_to_numpy(layer(tokens))
    assert_same(out[:, 0], np.tile(np.arange(4.0), (2, 1)))
    assert_same(out[:, 1:], tokens)


def test_registers_stand_behind_the_class_token():
    layer = patches.RegisterTokens(2)
    tokens = random(2, 3, 4)
    out = run(layer, tokens)
    registers = np.tile(float64(layer.registers), (2, 1, 1))
    assert_same(out[:, 1:3], registers)
    assert_same(np.delete(out, [1, 2], axis=1), tokens)
    with pytest.raises(ValueError, match="num_registers=0"):
        patches.RegisterTokens(0)


def test_learned_positions():
    layer = positions.LearnedPositions()
    layer.build((None, 50, 64))
    assert float64(layer.embedding).std() == pytest.approx(0.02, rel=0.05)
    layer = positions.LearnedPositions()
    tokens = random(2, 3, 4)
    out = run(layer, tokens)
    assert_same(out, tokens + float64(layer.embedding))
    with pytest.raises(ValueError, match=r"`grid` must have .*\(2, 2\)"):
        positions.LearnedPositions(grid=(2, 2))(tokens)


@pytest.mark.backends("torch")
def test_sincos2d_by_its_formula():
    rows, columns, features = 3, 4, 12
    table = sincos2d(rows, columns, features)
    for y, x in np.ndindex(rows, columns):
        omega = [10000 ** (-i / (features / 4 - 1)) for i in range(3)]
        expected = [np.sin(x * w) for w in omega]
        expected += [np.cos(x * w) for w in omega]
        expected += [np.sin(y * w) for w in omega]
        expected += [np.cos(y * w) for w in omega]
        assert_same(table[y * columns + x], expected)


@pytest.mark.parametrize("class_tokens", [0, 1])
def test_sincos2d_positions_spare_the_class_token(class_tokens):
    layer = positions.SinCos2DPositions(grid=(2, 3))
    tokens = random(2, 6 + class_tokens, 8)
    out = run(layer, tokens)
    assert layer.weights == []
    assert_same(out[:, :class_tokens], tokens[:, :class_tokens])
    expected = tokens[:, class_tokens:] + sincos2d(2, 3, 8)
    assert_same(out[:, class_tokens:], expected)


@pytest.mark.backends("torch")
@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((None, 8, 8), r"A grid of 2 x 3 patches has 6 tokens, or one more "
         r"with a class token. Received: input_shape=\(None, 8, 8\)"),
        ((None, 5, 8), r"Received: input_shape=\(None, 5, 8\)"),
        ((None, 6, 10), "`hidden_dim` to be a multiple of 4, at least 8. "
         "Received: hidden_dim=10"),
        ((None, 6, 4), "Received: hidden_dim=4"),
    ],
)  # fmt: skip
def test_sincos2d_that_does_not_fit(shape, words):
    with pytest.raises(ValueError, match=words):
        positions.SinCos2DPositions(grid=(2, 3)).build(shape)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_self_attention(qk_norm):
    layer = attention.SelfAttention(num_heads=2, qk_norm=qk_norm)
    tokens = random(2, 5, 8)
    out = run(layer, tokens)
    names = ATTENTION + QK_NORM if qk_norm else ATTENTION
    weights = dict(zip(names, map(float64, layer.weights), strict=True))
    assert_same(out, attention_slowly(tokens, tokens, weights))


def test_self_attention_starts_as_glorot_uniform_of_d_to_d():
    layer = attention.SelfAttention(num_heads=8)
    layer.build((None, 5, 64))
    limit = np.sqrt(6 / (64 + 64))
    for name, weight in zip(ATTENTION, layer.weights, strict=True):
        values = float64(weight)
        if name.endswith("bias"):
            assert not values.any()
        else:
            assert values.std() == pytest.approx(limit / 3**0.5, rel=0.03)
            assert np.abs(values).max() <= limit


@pytest.mark.backends("torch")
@pytest.mark.parametrize("num_heads", [3, 0])
def test_heads_that_do_not_divide(num_heads):
    words = (
        "`hidden_dim` must be divisible by `num_heads`. Received: "
        rf"hidden_dim=8, num_heads={num_heads}. Numbers of heads that fit: "
        r"\[1, 2, 4, 8\]"
    )
    with pytest.raises(ValueError, match=words):
        attention.SelfAttention(num_heads).build((None, 5, 8))


@pytest.mark.parametrize(
    ("activation", "slowly"), [("gelu", gelu), ("gelu_tanh", gelu_tanh)]
)
def test_mlp(activation, slowly):
    layer = layers.MLP(hidden_dim=5, activation=activation)
    x = random(2, 3, 4)
    out = run(layer, x)
    assert_same(out, mlp_slowly(x, *map(float64, layer.weights), slowly))
    # The two gelus differ by more than the tolerance.
    other = gelu if slowly is gelu_tanh else gelu_tanh
    values = mlp_slowly(x, *map(float64, layer.weights), other)
    assert np.abs(out - values).max() > 5e-5


def test_token_pooling():
    tokens = random(2, 3, 4)
    assert_same(run(pooling.TokenPooling(), tokens), tokens[:, 0])


def test_attention_pooling():
    layer = pooling.AttentionPooling(num_heads=2, hidden_dim=5)
    tokens = random(2, 6, 8)
    out = run(layer, tokens)
    attention = zip(ATTENTION, layer.attention.weights, strict=True)
    attention = {name: float64(weight) for name, weight in attention}
    probe = np.tile(float64(layer.probe), (2, 1, 1))
    x = attention_slowly(probe, tokens, attention)
    norm = layer_norm(x, float64(layer.norm.gamma), float64(layer.norm.beta))
    mlp = map(float64, layer.mlp.weights)
    expected = x + mlp_slowly(norm, *mlp, gelu_tanh)
    assert_same(out, expected[:, 0])


@pytest.mark.backends("torch")
def test_attention_pooling_with_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="hidden_dim=8, num_heads=3"):
        pooling.AttentionPooling(3, 5).build((None, 6, 8))


def test_layer_scale():
    layer = stochastic.LayerScale(1e-4)
    layer.build((None, 3, 4))
    np.testing.assert_allclose(float64(layer.scale), np.full(4, 1e-4), 1e-6)
    layer.scale.assign([1.0, 2.0, 0.0, -1.0])
    x = random(2, 3, 4)
    assert_same(ops.convert_to_numpy(layer(x)), x * [1.0, 2.0, 0.0, -1.0])


# Stochastic layers.


def test_drop_path_drops_whole_images():
    layer = stochastic.DropPath(0.3, seed=0)
    branch = np.ones((4000, 2, 3), "float32")
    drop = compiled(lambda x: layer(x, training=True), layer)
    out = ops.convert_to_numpy(drop(branch))
    dropped = (out == 0).all(axis=(1, 2))
    kept = np.isclose(out, 1 / 0.7).all(axis=(1, 2))
    assert (dropped | kept).all(), "an image goes or stays as a whole"
    assert dropped.mean() == pytest.approx(0.3, abs=0.03)
    assert out.mean() == pytest.approx(1.0, abs=0.03)
    again = ops.convert_to_numpy(drop(branch))
    assert (again != out).any(), "each step draws anew"
    np.testing.assert_array_equal(layer(branch), branch)


@pytest.mark.backends("torch")
@pytest.mark.parametrize("rate", [1.0, -0.1, 2])
def test_drop_path_rate(rate):
    words = f"at least 0 and below 1. Received: rate={rate}. 0 turns it off"
    with pytest.raises(ValueError, match=words):
        stochastic.DropPath(rate)


def test_dropout():
    layer = stochastic.SeededDropout(0.25, seed=0)
    x = np.ones((100, 100), "float32")
    drop = compiled(lambda x: layer(x, training=True), layer)
    out = ops.convert_to_numpy(drop(x))
    assert set(np.unique(out)) == {0.0, np.float32(1 / 0.75)}
    assert (out == 0).mean() == pytest.approx(0.25, abs=0.02)
    assert (ops.convert_to_numpy(drop(x)) != out).any()
    np.testing.assert_array_equal(layer(x), x)


@pytest.mark.backends("torch")
def test_names_in_files_of_version_0_1_0():
    def load(name, module, config, registered):
        return keras.saving.deserialize_keras_object(
            {
                "class_name": name,
                "module": module,
                "config": config,
                "registered_name": registered,
            }
        )

    config = {"name": "dropout", "rate": 0.1, "noise_shape": None, "seed": 3}
    module = "keras_vmoe.layers.stochastic"
    dropout = load("Dropout", module, config, "keras_vmoe>Dropout")
    assert type(dropout) is stochastic.SeededDropout
    assert config.items() <= dropout.get_config().items()
    name = "keras_vmoe>gelu_tanh"
    assert (
        load("function", "builtins", name, "function") is activations.gelu_tanh
    )


@pytest.mark.parametrize(
    "make", [stochastic.SeededDropout, stochastic.DropPath]
)
def test_seeds_repeat_and_travel_with_the_weights(make, tmp_path):
    # After one step a saved model goes on with the second draw, whatever seed
    # it was made with.
    def model_of(layer):
        inputs = keras.Input((50,))
        return keras.Model(inputs, layer(inputs))

    def drawer(layer):
        draw = compiled(lambda x: layer(x, training=True), layer)
        return lambda: ops.convert_to_numpy(draw(np.ones((30, 50), "float32")))

    first = make(0.5, seed=1)
    model = model_of(first)
    draw = drawer(first)
    one = draw()
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    two = draw()
    assert (one != two).any()
    np.testing.assert_array_equal(drawer(make(0.5, seed=1))(), one)

    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(drawer(loaded.layers[-1])(), two)
    other = model_of(make(0.5, seed=2))
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(drawer(other.layers[-1])(), two)


def test_encoder_block_is_pre_norm():
    x = keras.Input((5, 8))
    mlp = layers.MLP(12, name="block_mlp")
    attention = SelfAttention(2, name="block_attention")
    y = _blocks.encoder_block(x, attention, mlp, name="block")
    model = keras.Model(x, y)
    tokens = random(2, 5, 8)
    out = run(model, tokens)

    def norm(x, part):
        layer = model.get_layer(f"block_{part}_norm")
        assert layer.epsilon == 1e-6
        return layer_norm(x, float64(layer.gamma), float64(layer.beta))

    attention = model.get_layer("block_attention").weights
    attention = dict(zip(ATTENTION, map(float64, attention), strict=True))
    y = norm(tokens, "attention")
    y = tokens + attention_slowly(y, y, attention)
    expected = y + mlp_slowly(norm(y, "mlp"), *map(float64, mlp.weights), gelu)
    assert_same(out, expected)
