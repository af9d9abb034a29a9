"""`SwinMoE` and its windows: harness, a slow definition, timm's Swin, words."""

import math

import keras
import numpy as np
import pytest
import torch
from keras import ops

from keras_vmoe import evaluation
from keras_vmoe import inspection
from keras_vmoe import layers
from keras_vmoe import models
from keras_vmoe import routing
from keras_vmoe.layers.windows import MergePatches
from keras_vmoe.layers.windows import WindowAttention
from keras_vmoe.models.presets import PRESETS
from tests.gradients import weight_gradients
from tests.harness import Case
from tests.harness import arguments_of
from tests.harness import check_all
from tests.harness import check_policy
from tests.harness import first_everywhere
from tests.harness import randomize
from tests.layers.definitions import float64
from tests.layers.definitions import gelu
from tests.layers.definitions import layer_norm
from tests.layers.definitions import mlp_slowly
from tests.layers.definitions import moe_layer_slowly
from tests.layers.definitions import softmax
from tests.torchvision_operators import OPERATORS

assert OPERATORS  # Before timm is imported.


def tiny(**arguments):
    """A model of 4 blocks in 2 stages, of 8 x 8 and 4 x 4 positions."""
    arguments = {
        "depths": (2, 2),
        "dims": (8, 12),
        "num_heads": (2, 3),
        "num_classes": 10,
        "window_size": 4,
        "image_size": 16,
        "patch_size": 2,
        "moe": {"layers": "last_2", "num_experts": 3, "images_per_group": 2},
        **arguments,
    }
    return models.SwinMoE(**arguments)


def case(label, shape=(3, 16, 16, 3), features=10, **arguments):
    """A model whose experts are all in use."""
    moe = {"layers": [1], "num_experts": 3, "num_selected_experts": 3,
           "capacity_factor": 1.0, "images_per_group": 2}  # fmt: skip
    arguments = {
        "depths": (2,),
        "dims": (8,),
        "num_heads": (2,),
        "num_classes": 10,
        "window_size": 4,
        "image_size": 16,
        "patch_size": 2,
        "moe": moe,
        **arguments,
    }
    return Case(
        models.SwinMoE, arguments, shape, (shape[0], features), label=label
    )


CASES = [
    case("as it comes"),
    case("dense, wide, two stages, without a head", (2, 12, 20, 3), 12,
         image_size=(12, 20), depths=(1, 1), dims=(8, 12), num_heads=(2, 3),
         pretrained_window_sizes=(6, 3), mlp_ratio=2, drop_path_rate=0.2,
         layer_scale_init_value=0.1, activation="gelu_tanh", moe=None,
         num_classes=None, name="other"),
]  # fmt: skip


@pytest.mark.backends("torch")
def test_no_argument_is_left_out():
    for name, default in arguments_of(models.SwinMoE).items():
        values = [case.arguments.get(name, default) for case in CASES]
        assert any(v != default for v in values), name


@pytest.mark.parametrize("case", first_everywhere(CASES), ids=str)
def test_config_outputs_reload_and_gradients(case, tmp_path):
    check_all(case, tmp_path)


@pytest.mark.backends("tensorflow", "torch")
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy):
    check_policy(CASES[0], policy)


# The definition of the attention: position by position.


def attention_slowly(layer, x, weights):
    """What each position gets; `weights` are those of the layer, in order."""
    qkv_kernel, qkv_bias, out_kernel, out_bias, *of_bias = weights
    batch, height, width, features = x.shape
    side = min(layer.window_size, height, width)
    is_small = min(height, width) <= layer.window_size
    step = side // 2 if layer.shift and not is_small else 0
    rows, columns = (-(-n // side) * side for n in (height, width))
    padded = np.zeros((batch, rows, columns, features))
    padded[:, :height, :width] = x
    heads, size = layer.num_heads, features // layer.num_heads
    qkv = padded @ qkv_kernel + qkv_bias
    query, key, value = qkv.reshape(
        batch, rows, columns, 3, heads, size
    ).transpose(3, 0, 4, 1, 2, 5)
    out = np.zeros((batch, height, width, heads, size))
    corner = (layer.pretrained_window_size or side) - 1

    def place(i, length):
        """Window, place in it, and whether it was rolled around."""
        moved = (i - step) % length
        return moved // side, moved % side, moved >= length - step

    def log(offset):
        offset = 8 * offset / max(1, corner)
        return math.copysign(math.log2(abs(offset) + 1) / 3, offset)

    for i in range(height):
        for j in range(width):
            mine = place(i, rows), place(j, columns)
            seen, offsets = [], []
            for k in range(rows):
                for m in range(columns):
                    other = place(k, rows), place(m, columns)
                    pairs = list(zip(mine, other, strict=True))
                    if all(a[::2] == b[::2] for a, b in pairs):
                        seen.append((k, m))
                        offsets.append([log(a[1] - b[1]) for a, b in pairs])
            hidden = np.maximum(offsets @ of_bias[0] + of_bias[1], 0)
            bias = (hidden @ of_bias[2]).T  # (heads, seen)
            at = tuple(np.transpose(seen))
            keys, values = (z[:, :, *at] for z in (key, value))
            scores = np.einsum("bhd,bhnd->bhn", query[:, :, i, j], keys)
            shares = softmax(scores / math.sqrt(size) + bias)
            out[:, i, j] = np.einsum("bhn,bhnd->bhd", shares, values)
    return out.reshape(batch, height, width, features) @ out_kernel + out_bias


@pytest.mark.parametrize(
    "case",
    first_everywhere(
        [
            ((6, 9), {"shift": True, "pretrained_window_size": 6}),  # Filled.
            ((6, 7), {"shift": True, "window_size": 3}),
            ((8, 8), {"shift": True}),
            ((8, 4), {"shift": True}),  # Not shifted: one window is enough.
            ((3, 8), {}),  # Windows of three.
            ((1, 1), {}),
        ]
    ),
)
def test_the_definition_of_the_attention(case):
    grid, options = case
    layer = WindowAttention(2, **{"window_size": 4, **options})
    generator = np.random.default_rng(0)
    x = generator.normal(size=(2, *grid, 6)).astype("float32")
    layer.build(x.shape)
    randomize(layer)
    weights = [float64(w) for w in layer.weights]
    expected = attention_slowly(layer, float64(x), weights)
    outputs = ops.convert_to_numpy(layer(x))
    np.testing.assert_allclose(outputs, expected, atol=2e-5)
    # The gradient along one direction of all weights, by small differences.
    probe = generator.normal(size=expected.shape).astype("float32")
    found = weight_gradients(
        layer, lambda: ops.sum(ops.multiply(layer(x), probe))
    )
    along = [generator.normal(size=w.shape) for w in weights]

    def moved(step):
        new = [w + step * d for w, d in zip(weights, along, strict=True)]
        return (attention_slowly(layer, float64(x), new) * probe).sum()

    slope = (moved(1e-7) - moved(-1e-7)) / 2e-7  # Few kinks between.
    parts = [g * d for g, d in zip(found.values(), along, strict=True)]
    ours, size = sum(x.sum() for x in parts), sum(abs(x).sum() for x in parts)
    assert ours == pytest.approx(slope, abs=1e-5 * size)


def swin_slowly(model, images):
    """Logits, block by block; of the attention the definition above."""

    def weights(name):
        return [float64(w) for w in model.get_layer(name).weights]

    def norm(x, name):
        return layer_norm(x, *weights(name), epsilon=1e-5)

    kernel, bias = weights("stem")
    side, block = len(kernel), 0
    batch, height, width, channels = images.shape
    x = float64(images).reshape(
        batch, height // side, side, width // side, side, channels
    )
    x = norm(np.einsum("bhiwjc,ijcf->bhwf", x, kernel) + bias, "stem_norm")
    for stage, depth in enumerate(model.depths):
        if stage:
            quarters = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
            x = norm(np.concatenate(quarters, -1), f"downsample_{stage}_norm")
            x = x @ weights(f"downsample_{stage}")[0]
        for _ in range(depth):
            layer = model.get_layer(f"block_{block}_attention")
            y = norm(x, f"block_{block}_attention_norm")
            x = x + attention_slowly(layer, y, weights(layer.name))
            y = norm(x, f"block_{block}_mlp_norm")
            x = x + mlps_slowly(model, block, y)
            block += 1
    kernel, bias = weights("head")
    return norm(x, "norm").mean(axis=(1, 2)) @ kernel + bias


def mlps_slowly(model, block, x):
    for layer in model.moe_layers:
        if layer.name == f"block_{block}_moe":
            tokens = x.reshape(len(x), -1, x.shape[-1])
            return moe_layer_slowly(layer, tokens).reshape(x.shape)
    hidden, bias, output = (
        float64(w) for w in model.get_layer(f"block_{block}_mlp").weights
    )
    return mlp_slowly(x, hidden, bias, output, gelu)


@pytest.mark.backends("tensorflow", "torch")
def test_the_definition_of_the_model():
    model = randomize(tiny())
    images = np.random.default_rng(0).normal(size=(3, 16, 16, 3))
    images = images.astype("float32")
    expected = swin_slowly(model, images)
    logits = ops.convert_to_numpy(model(images))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits / scale, expected / scale, atol=2e-5)


# timm's Swin, whose position bias is a table: without either the models agree.


@pytest.mark.backends("torch")
@pytest.mark.parametrize("side", [48, 32])
def test_logits_of_timm(side):
    """At 48 pixels the second stage is filled up; timm rolls maps before."""
    from timm.models.swin_transformer import SwinTransformer

    sizes = {"depths": (2, 1), "num_heads": (2, 4)}
    theirs = SwinTransformer(
        side, 4, embed_dim=16, window_size=4, num_classes=7, **sizes
    ).eval()
    torch.manual_seed(0)
    state = theirs.state_dict()
    for name, x in state.items():
        if "bias_table" in name or name.endswith("fc2.bias"):
            x.zero_()
        elif x.is_floating_point() and "mask" not in name:
            x.normal_(std=0.3)
    theirs.load_state_dict(state)
    ours = models.SwinMoE(
        dims=(16, 32), num_classes=7, window_size=4, image_size=side, **sizes
    )
    for layer in ours.layers:
        assign(layer, {k: x.numpy() for k, x in state.items()})
    images = np.random.default_rng(0).normal(size=(2, side, side, 3))
    images = images.astype("float32")
    with torch.no_grad():
        expected = theirs(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
    logits = ops.convert_to_numpy(ours(images))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits / scale, expected / scale, atol=1e-4)


def assign(layer, state):
    """The weights of timm's layer of the same place."""
    start, _, part = layer.name.partition("_")
    prefix = {"stem": "patch_embed.proj", "stem_norm": "patch_embed.norm",
              "norm": "norm", "head": "head.fc",
              "downsample_1": "layers.1.downsample.reduction",
              "downsample_1_norm": "layers.1.downsample.norm"}  # fmt: skip
    name = prefix.get(layer.name)
    if start == "block":
        number, _, part = part.partition("_")
        block = f"layers.{int(number) // 2}.blocks.{int(number) % 2}"
        name = f"{block}." + {
            "attention_norm": "norm1", "mlp_norm": "norm2",
        }.get(part, part)  # fmt: skip
    if part == "attention":
        parts = [f"{block}.attn.qkv", f"{block}.attn.proj"]
    elif part == "mlp":
        parts = [f"{block}.mlp.fc1", f"{block}.mlp.fc2"]
    else:
        parts = [name]
    arrays = [
        state[f"{part}.{kind}"]
        for part in parts
        for kind in ("weight", "bias")
        if f"{part}.{kind}" in state
    ]
    for weight, x in zip(layer.weights, arrays, strict=False):
        axes = (2, 3, 1, 0) if x.ndim == 4 else None
        weight.assign(x.transpose(axes))
    for weight in layer.weights[len(arrays) :]:
        weight.assign(np.zeros(weight.shape))


@pytest.mark.backends("torch")
def test_every_second_block_of_a_stage_is_shifted():
    sizes = {"dims": (4, 4), "num_heads": (1, 1), "moe": None}
    model = tiny(depths=(1, 3), **sizes)
    shifts = [model.get_layer(f"block_{i}_attention").shift for i in range(4)]
    assert shifts == [False, False, True, False]


# What the other mechanisms make of it.


@pytest.mark.backends("torch")
@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("swin_s_192", "65.76"), ("swin_s_192_e8", "173.26"),
        ("swin_s_192_e16", "296.11"), ("swin_s_192_e32", "541.81"),
        ("swin_b_192", "109.28"), ("swin_b_192_e8", "300.33"),
        ("swin_b_192_e16", "518.66"), ("swin_b_192_e32", "955.31"),
    ],
)  # fmt: skip
def test_parameters_of_the_presets(name, millions):
    with models.costs.without_weights():
        model = models.from_preset(name)
    assert f"{model.count_params() / 1e6:.2f}" == millions
    assert PRESETS[name].num_classes == 21_841
    if model.moe is not None:
        names = [layer.name for layer in model.moe_layers]
        blocks = [*range(5, 22, 2), 23]
        assert names == [f"block_{i}_moe" for i in blocks]
        router = model.moe_layers[0].router
        assert router.batch_priority and router.num_selected_experts == 1
        assert (router.capacity_factor, router.noise_std) == (1.25, 1.0)
        losses = router.importance_loss_weight, router.load_loss_weight
        assert losses == (0.005, 0.005) and not router.renormalize
        assert model.moe_layers[0].experts.dropout == 0.1
        assert model.get_layer("block_0_mlp").dropout == 0


@pytest.mark.backends("torch")
def test_presets_of_224_pixels_go_on_from_those_of_192():
    with models.costs.without_weights():
        small = models.from_preset("swin_s_192")
        large = models.from_preset("swin_s_224", num_classes=21_841)
    assert small.count_params() == large.count_params()
    sides = [large.get_layer(f"block_{i}_attention") for i in (0, 23)]
    assert [x.windows.side for x in sides] == [14, 7]
    assert [x.pretrained_window_size for x in sides] == [12, 6]


@pytest.mark.backends("torch")
def test_cost():
    """By hand: 4 blocks, their windows, experts with 1.05 of room."""
    model = tiny()
    macs = 64 * 12 * 8 + 16 * 32 * 12 + 12 * 10  # Stem, merging, head.
    for size, d, windows in ((64, 8, 4), (16, 12, 1)):
        attention = size * 4 * d * d + 2 * windows * 16 * 16 * d
        gate = size * d * 3
        slots = 3 * routing.capacity(2 * size, 3, 1, 1.05) / 2
        macs += 2 * attention + size * 8 * d * d + gate + slots * 8 * d * d
    assert models.cost(model).macs == round(macs)


@pytest.mark.backends("torch")
def test_upcycled_it_has_the_dense_outputs():
    dense = randomize(tiny(moe=None))
    moe = {"layers": "last_2", "num_experts": 3}
    sparse = models.upcycle(dense, moe, preserve_outputs=True)
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3))
    np.testing.assert_allclose(
        sparse.predict(images, verbose=0),
        dense.predict(images, verbose=0),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.backends("torch")
def test_the_dial_inspection_and_maps():
    model = randomize(tiny())
    dial = models.set_routing(model, num_selected_experts=2)
    assert type(dial) is models.SwinMoE
    assert all(a is b for a, b in zip(model.weights, dial.weights, strict=True))
    images = np.random.default_rng(0).normal(size=(4, 16, 16, 3))
    batch = images.astype("float32"), np.arange(4)
    found = inspection.inspect(dial, [batch], num_examples=1)
    assert [x.grid for x in found.layers.values()] == [(8, 8), (4, 4)]
    maps = models.features(model, ["stage_0", "block_2", -1])
    shapes = {k: x.shape[1:] for k, x in maps(batch[0]).items()}
    assert shapes == {"stage_0": (8, 8, 8), "block_2": (4, 4, 12),
                      "block_3": (4, 4, 12), "output": (10,)}  # fmt: skip
    rows = evaluation.ablate(model, [batch])
    assert len(rows) == 1 + 2 * (3 + 1) + 3


@pytest.mark.backends("torch")
def test_images_of_another_size_and_another_head():
    model = randomize(tiny())
    other = models.with_image_size(model, (20, 32))
    assert other.input_shape == (None, 20, 32, 3)
    attention = [x.get_layer("block_0_attention") for x in (model, other)]
    for mine, theirs in zip(*(x.weights for x in attention), strict=True):
        np.testing.assert_array_equal(float64(mine), float64(theirs))
    assert models.with_head(model, 3).output_shape == (None, 3)
    # A window of 4 becomes one of 6: an offset keeps its position bias.
    larger = models.with_image_size(tiny(window_size=6), 24)
    assert tuple(larger.pretrained_window_sizes) == (6, 4)
    layer = larger.get_layer("block_2_attention")
    assert layer.windows.side == 6 and layer.pretrained_window_size == 4


@pytest.mark.backends("torch")
def test_remat_trains_as_without():
    images = np.random.default_rng(0).normal(size=(4, 16, 16, 3))
    losses = []
    for remat in (False, True):
        keras.utils.set_random_seed(0)
        model = tiny(remat=remat)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.1), loss)
        history = model.fit(images, np.arange(4), epochs=2, verbose=0)
        losses.append(history.history["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.backends("torch")
def test_position_biases_are_not_decayed():
    from keras_vmoe import training

    optimizer = training.optimizers.AdamW(weight_decay=0.1)
    layer = tiny().get_layer("block_0_attention")
    decayed = {w.path.split("attention/")[1]: optimizer.decay_of(w) > 0
               for w in layer.weights}  # fmt: skip
    assert decayed == {
        "query_key_value/kernel": True, "query_key_value/bias": False,
        "output/kernel": True, "output/bias": False,
        "bias_hidden/kernel": False, "bias_hidden/bias": False,
        "bias_output/kernel": False,
    }  # fmt: skip


# Words.


@pytest.mark.backends("torch")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"depths": (2,)}, r"`depths`, `dims`, `num_heads` must be equally "
         r"many integers of at least 1. Received: depths=.2.*, dims="),
        ({"num_heads": (3, 3)}, "divisible by `num_heads`. Received: 8 "
         "features, num_heads=3"),
        ({"image_size": 15}, "divisible by `patch_size`"),
        ({"window_size": 0}, "window_size=0"),
        ({"pretrained_window_sizes": (4, 0)}, "pretrained_window_sizes=.4, 0"),
        ({"mlp_ratio": 0}, "mlp_ratio=0"),
        ({"moe": {"layers": "last_3"}}, "layers='last_3' with depths"),
        ({"moe": {"dropout": 2}}, "dropout=2"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        tiny(**arguments)


@pytest.mark.backends("torch")
def test_maps_of_unknown_size():
    x = keras.Input((None, 8, 6))
    with pytest.raises(ValueError, match="height and width of the feature map"):
        WindowAttention(2, 4)(x)


@pytest.mark.backends("torch")
def test_a_side_that_is_odd_is_filled_up():
    x = np.arange(6.0).reshape(1, 3, 2, 1)
    out = ops.convert_to_numpy(MergePatches()(x))
    np.testing.assert_array_equal(out, [[[[0, 2, 1, 3]], [[4, 0, 5, 0]]]])


@pytest.mark.backends("torch")
def test_a_bank_without_output_bias():
    bank = layers.MLPExperts(3, 5, use_output_bias=False)
    bank.build((None, 3, None, 4))
    assert [w.name for w in bank.weights] == [
        "hidden_kernel", "hidden_bias", "output_kernel",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="use_output_bias"):
        layers.MLP(5, use_output_bias="no")
