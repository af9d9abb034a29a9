"""`ConvNeXtMoE`: the harness, its definition in numpy, placement, words."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_vmoe import layers
from keras_vmoe.layers import _blocks
from keras_vmoe.models import ConvNeXtMoE
from keras_vmoe.models import set_routing
from keras_vmoe.models.placement import stage_blocks
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


def tiny(**arguments):
    """A model of 4 blocks in 2 stages; 3 experts in the last of each."""
    arguments = {
        "depths": (2, 2),
        "dims": (8, 12),
        "num_classes": 10,
        "image_size": 16,
        "moe": {"layers": "stage", "num_experts": 3, "images_per_group": 2},
        **arguments,
    }
    return ConvNeXtMoE(**arguments)


def case(label, shape=(3, 16, 16, 3), features=10, **arguments):
    """A model whose experts are all in use."""
    arguments = {
        "depths": (1, 1),
        "dims": (8, 12),
        "num_classes": 10,
        "image_size": 16,
        "moe": {
            "layers": [1],
            "num_experts": 3,
            "num_selected_experts": 3,
            "capacity_factor": 1.0,
            "images_per_group": 2,
            "mlp_ratio": 2,
        },
        **arguments,
    }
    return Case(
        ConvNeXtMoE, arguments, shape, (shape[0], features), label=label
    )


CASES = [
    case("as it comes"),
    case(
        "isotropic, with all flags",
        depths=2,
        dims=12,
        isotropic=True,
        patch_size=8,
        mlp_ratio=3,
        drop_path_rate=0.2,
        layer_scale_init_value=None,
        activation="gelu_tanh",
        name="other",
    ),
    case("dense, wide, without a head", (3, 8, 16, 3), 12, image_size=(8, 16),
         moe=None, num_classes=None),
]  # fmt: skip
each = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.mark.backends("torch")
def test_no_argument_is_left_out():
    for name, default in arguments_of(ConvNeXtMoE).items():
        values = [case.arguments.get(name, default) for case in CASES]
        assert name == "dtype" or any(v != default for v in values), name


@each
def test_config_outputs_reload_and_gradients(case, tmp_path):
    check_all(case, tmp_path)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy):
    check_policy(CASES[0], policy)


# The definition.


def convolve_slowly(x, kernel, bias, stride):
    """A convolution without overlap, `(B, H, W, C)` and `(k, k, C, F)`."""
    batch, height, width, channels = x.shape
    shape = (batch, height // stride, stride, width // stride, stride, channels)
    return np.einsum("bhiwjc,ijcf->bhwf", x.reshape(shape), kernel) + bias


def depthwise_slowly(x, kernel, bias):
    """Every channel by its own 7 x 7 kernel `(7, 7, C, 1)`, zeros around."""
    padded = np.pad(x, ((0, 0), (3, 3), (3, 3), (0, 0)))
    _, height, width, _ = x.shape
    out = np.zeros_like(x)
    for i in range(7):
        for j in range(7):
            window = padded[:, i : i + height, j : j + width]
            out += window * kernel[i, j, :, 0]
    return out + bias


def convnext_slowly(model, images):
    """Logits of a model, block by block."""

    def weights(name):
        return [float64(w) for w in model.get_layer(name).weights]

    names = {layer.name for layer in model.layers}
    kernel, bias = weights("stem")
    x = convolve_slowly(float64(images), kernel, bias, len(kernel))
    if not model.isotropic:
        x = layer_norm(x, *weights("stem_norm"))
    block = 0
    depths = (model.depths,) if model.isotropic else model.depths
    for stage, depth in enumerate(depths):
        if stage:
            x = layer_norm(x, *weights(f"downsample_{stage}_norm"))
            x = convolve_slowly(x, *weights(f"downsample_{stage}"), 2)
        for _ in range(depth):
            y = depthwise_slowly(x, *weights(f"block_{block}_conv"))
            y = layer_norm(y, *weights(f"block_{block}_norm"))
            y = branch_slowly(model, block, y)
            if f"block_{block}_scale" in names:
                y = y * weights(f"block_{block}_scale")[0]
            x = x + y
            block += 1
    x = layer_norm(x.mean(axis=(1, 2)), *weights("norm"))
    kernel, bias = weights("head")
    return x @ kernel + bias


def branch_slowly(model, block, x):
    names = {layer.name for layer in model.layers}
    if f"block_{block}_moe" in names:
        moe = model.get_layer(f"block_{block}_moe")
        batch, height, width, features = x.shape
        tokens = x.reshape(batch, height * width, features)
        return moe_layer_slowly(moe, tokens).reshape(x.shape)
    mlp = model.get_layer(f"block_{block}_mlp")
    return mlp_slowly(x, *(float64(w) for w in mlp.weights), gelu)


@pytest.mark.parametrize("batch", first_everywhere([3, 1]))
@pytest.mark.parametrize("isotropic", first_everywhere([False, True]))
def test_the_definition(isotropic, batch):
    sizes = {
        "depths": 2,
        "dims": 12,
        "patch_size": 4,
        "layer_scale_init_value": None,
    }
    moe = {"num_experts": 3, "layers": [1], "images_per_group": 2,
           "capacity_factor": 0.7, "batch_priority": True}  # fmt: skip
    model = tiny(isotropic=isotropic, moe=moe, **(sizes if isotropic else {}))
    randomize(model)
    generator = np.random.default_rng(0)
    images = generator.normal(size=(batch, 16, 16, 3)).astype("float32")
    logits = ops.convert_to_numpy(model(images))
    expected = convnext_slowly(model, images)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits / scale, expected / scale, atol=2e-5)


# Parts and names.


@pytest.mark.backends("torch")
def test_names():
    names = [layer.name for layer in tiny(drop_path_rate=0.1).layers]
    assert names[:3] == ["images", "stem", "stem_norm"]
    assert names[-3:] == ["pooling", "norm", "head"]
    block = [name for name in names if name.startswith("block_3")]
    parts = ["conv", "norm", "moe", "scale", "drop", "add"]
    assert block == [f"block_3_{part}" for part in parts]
    assert "downsample_1" in names and "block_0_mlp" in names


@pytest.mark.backends("torch")
def test_experts_and_k():
    model = tiny(moe={"layers": [3], "num_experts": 3, "mlp_ratio": 2})
    (moe,) = model.moe_layers
    assert moe.hidden_dim == 24 and moe.router.num_selected_experts == 1
    model = tiny(moe={"layers": [3], "num_experts": 3,
                      "num_selected_experts": 2})  # fmt: skip
    assert model.moe_layers[0].router.num_selected_experts == 2
    assert model.moe_layers[0].hidden_dim == 48


@pytest.mark.parametrize(
    "router", first_everywhere(["bias_balanced", "soft", "expert_choice"])
)
def test_every_router(router):
    moe = {"layers": [3], "num_experts": 2, "router": router}
    model = randomize(tiny(moe=moe))
    images = np.random.default_rng(0).normal(size=(3, 16, 16, 3))
    assert np.isfinite(ops.convert_to_numpy(model(images))).all()


def test_the_dial():
    model = tiny()
    dial = set_routing(model, num_selected_experts=2)
    assert type(dial) is ConvNeXtMoE and dial.moe.num_selected_experts == 2
    for mine, theirs in zip(model.weights, dial.weights, strict=True):
        assert mine is theirs


def test_a_training_step():
    model = tiny(drop_path_rate=0.1)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss)
    images = np.random.default_rng(0).normal(size=(4, 16, 16, 3))
    history = model.fit(images, np.arange(4), epochs=2, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    assert len(model.losses) == 0 or ops.ndim(model.losses[0]) == 0


@pytest.mark.backends("torch")
@pytest.mark.parametrize(
    ("placement", "depths", "blocks"),
    [
        # ConvNeXt-T: stages end at blocks 2, 5, 14 and 17.
        ("stage", (3, 3, 9, 3), (2, 5, 14, 17)),
        ("last_2", (3, 3, 9, 3), (14, 17)),
        ("last_3", (3, 3, 9, 3), (10, 14, 17)),
        ("every_2", (3, 3, 9, 3), (1, 3, 5, 7, 9, 11, 13, 15, 17)),
        ("last_3", (3, 3, 27, 3), (19, 32, 35)),
        # One stage: as in a ViT.
        ("last_2", (18,), (15, 17)),
        ("last_3", (18,), (13, 15, 17)),
        ("last_1", (3, 3, 9, 3), (17,)),
        ("stage", (18,), (17,)),
        ([0, 5], (3, 3), (0, 5)),
    ],
)
def test_placement(placement, depths, blocks):
    assert stage_blocks(placement, depths) == blocks


# Words.


@pytest.mark.backends("torch")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"depths": (1, 2, 3)}, r"equally many integers of at least 1. "
         r"Received: depths=\(1, 2, 3\), dims=\(8, 12\)"),
        ({"depths": (1, 0)}, r"depths=\(1, 0\)"),
        ({"isotropic": True}, "one stage. Received: depths=.2, 2."),
        ({"image_size": 20}, "divisible by 8, the stride of the last stage. "
         "Received: image_size=20"),
        ({"mlp_ratio": 0}, "mlp_ratio=0"),
        ({"drop_path_rate": 1.0}, "drop_path_rate=1.0"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"drop_path_rate": "0.1"}, "drop_path_rate='0.1'"),
        ({"layer_scale_init_value": -1}, "layer_scale_init_value=-1"),
        ({"depths": None}, "depths=.None"),
        ({"moe": {"mlp_ratio": "2"}}, "mlp_ratio='2'"),
        ({"moe": {"layers": "last_3"}}, r"one of \['last_1', 'last_2'\], "
         r"'stage'.*layers='last_3' with depths=\[2, 2\]"),
        ({"moe": {"layers": "stages"}}, "'stage' or a list"),
        ({"moe": {"layers": "last_9"}}, "layers='last_9' with depths"),
        ({"moe": {"mlp_ratio": 2, "hidden_dim": 8}},
         "hidden_dim=8 together with mlp_ratio=2"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        tiny(**arguments)


@pytest.mark.backends("torch")
def test_block_takes_any_mlp():
    x = keras.Input((4, 4, 8))
    y = _blocks.convnext_block(
        x, layers.MoEMLP(2, 8), "block", layer_scale_init_value=None
    )
    assert y.shape == (None, 4, 4, 8)


@pytest.mark.backends("torch")
def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="drop_pth=0.1. Did you mean 'drop_p"):
        tiny(drop_pth=0.1)


@pytest.mark.backends("torch")
def test_arrays_as_sizes_can_be_saved(tmp_path):
    model = tiny(depths=np.array([1, 1]), dims=np.array([8, 8]), moe=None)
    model.save(tmp_path / "m.keras")
    assert keras.saving.load_model(tmp_path / "m.keras").depths == [1, 1]


@pytest.mark.backends("torch")
def test_images_of_any_number_of_channels():
    model = tiny(channels=1)
    assert model(np.zeros((2, 16, 16, 1), "float32")).shape == (2, 10)
    assert type(model).from_config(model.get_config()).channels == 1
