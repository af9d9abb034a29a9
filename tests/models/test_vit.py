"""`ViTMoE`: the harness, its definition in numpy, its size, its names."""

import json

import keras
import numpy as np
import pytest
from keras import ops

from keras_vmoe import layers
from keras_vmoe import models
from keras_vmoe.layers.activations import gelu_tanh
from keras_vmoe.models import MoEConfig
from keras_vmoe.models import ViTMoE
from tests.harness import WITHOUT_GRADIENT
from tests.harness import Case
from tests.harness import arguments_of
from tests.harness import check_all
from tests.harness import check_policy
from tests.harness import first_everywhere
from tests.harness import randomize
from tests.models.definitions import images_of
from tests.models.definitions import tiny
from tests.models.definitions import vit_slowly


def case(label, shape=(3, 8, 8, 3), features=10, **arguments):
    """A model of 1 sparse block, all of whose experts are in use."""
    arguments = {
        "image_size": 8,
        "patch_size": 4,
        "hidden_dim": 32,
        "num_layers": 1,
        "num_heads": 4,
        "mlp_dim": 64,
        "num_classes": 10,
        "moe": {
            "layers": [0],
            "num_experts": 4,
            "num_selected_experts": 4,
            "capacity_factor": 1.0,
            "images_per_group": 2,
        },
        **arguments,
    }
    return Case(ViTMoE, arguments, shape, (shape[0], features), label=label)


CASES = [
    case("as it comes"),
    case(
        "with all flags",
        num_layers=2,
        pooling="map",
        representation_size=32,
        position_embedding="sincos2d",
        dropout=0.1,
        drop_path_rate=0.2,
        layer_scale_init_value=0.1,
        activation="gelu",
        name="other",
    ),
    case("dense, mean of tokens, wide images", (3, 4, 8, 3), pooling="gap",
         image_size=(4, 8), moe=None),
    case("features without a head", features=32, num_classes=None,
         num_registers=2, qk_norm=True),
]  # fmt: skip
each = pytest.mark.parametrize(
    "case", first_everywhere([CASES[1], CASES[0], *CASES[2:]]), ids=str
)


@pytest.mark.backends("torch")
def test_no_argument_is_left_out():
    arguments = arguments_of(ViTMoE)
    del arguments["ensemble_size"]  # See test_ensemble.py.
    for name, default in arguments.items():
        values = [case.arguments.get(name, default) for case in CASES]
        assert any(v != default for v in values), name
    options = {name for case in CASES for name in case.arguments}
    assert options >= {"activation", "drop_path_rate", "layer_scale_init_value"}


@each
def test_config_outputs_reload_and_gradients(case, tmp_path):
    check_all(case, tmp_path)


@pytest.mark.parametrize(
    ("case", "policy"),
    [
        (CASES[0], "mixed_bfloat16"),
        (CASES[0], "mixed_float16"),
        pytest.param(CASES[1], "mixed_bfloat16", marks=pytest.mark.slow),
        pytest.param(CASES[1], "mixed_float16", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_mixed_precision(case, policy):
    check_policy(case, policy)


@pytest.mark.backends("torch")
def test_mixed_precision_reaches_every_layer_but_head_and_gates():
    model = tiny(dtype="mixed_bfloat16")
    for layer in model.layers:
        if layer.name == "head":
            assert layer.compute_dtype == "float32"
        elif not isinstance(layer, keras.layers.InputLayer):
            assert layer.compute_dtype == "bfloat16", layer.name
    assert model.output.dtype == "float32"
    twin = ViTMoE.from_config(model.get_config())
    assert twin.get_layer("block_3_moe").experts.compute_dtype == "bfloat16"
    assert twin.get_layer("block_3_moe").router.compute_dtype == "bfloat16"


# The definition.


@pytest.fixture(scope="module")
def model():
    """A tiny model with random weights, capacity short, BPR on."""
    moe = {"capacity_factor": 0.5, "batch_priority": True}
    return randomize(tiny(moe=moe, representation_size=32))


SLOW = [pytest.param(n, marks=pytest.mark.slow) for n in (2, 4, 5, 6)]


@pytest.mark.parametrize("batch", [1, 3, 7, *SLOW])
def test_any_batch_agrees_with_the_definition(model, batch):
    # From one image to two groups of 2 and three more.
    images = images_of(batch)
    logits = model.predict(images, batch_size=batch, verbose=0)
    expected = vit_slowly(model, images)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits / scale, expected / scale, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("batch", first_everywhere([3, 1, 2, 4, 5, 6, 7]))
def test_any_batch_eager(model, batch):
    images = images_of(batch)
    expected = vit_slowly(model, images)
    scale = np.abs(expected).max()
    logits = ops.convert_to_numpy(model(images))
    np.testing.assert_allclose(logits / scale, expected / scale, atol=1e-5)


# Size: a formula with one term for each block.


def number_of_weights(
    *, tokens, patch, features, hidden, blocks, experts, classes
):
    """`experts` has one entry per block: 0 is a dense MLP."""
    embedding = patch * patch * 3 * features + features
    positions = features + tokens * features  # And the class token.
    norm = 2 * features
    attention = 4 * (features * features + features)
    mlp = features * hidden + hidden + hidden * features + features
    total = embedding + positions
    for e in experts:
        total += norm + attention + norm + max(1, e) * mlp + features * e
    assert len(experts) == blocks
    return total + norm + features * classes + classes


@pytest.mark.backends("torch")
@pytest.mark.parametrize(
    ("moe", "experts"),
    [
        (None, [0, 0, 0, 0]),
        ({}, [0, 4, 0, 4]),
        ({"layers": [0], "num_experts": 2}, [2, 0, 0, 0]),
    ],
)
def test_number_of_weights(moe, experts):
    model = tiny(moe=moe)
    expected = number_of_weights(
        tokens=5, patch=4, features=32, hidden=64, blocks=4,
        experts=experts, classes=10,
    )  # fmt: skip
    assert model.count_params() == expected


@pytest.mark.backends("torch")
def test_vit_b16_has_the_size_of_the_paper():
    # 86.6 million: Dosovitskiy et al., 2021, table 1 ("86M"). A shape is all
    # that is needed for a count.
    count = number_of_weights(
        tokens=197, patch=16, features=768, hidden=3072, blocks=12,
        experts=[0] * 12, classes=1000,
    )  # fmt: skip
    assert count == 86_567_656


# Names and parts.


@pytest.mark.backends("torch")
def test_the_dense_twin_shares_all_but_the_experts():
    sparse, dense = tiny(), tiny(moe=None)
    names = [layer.name for layer in dense.layers]
    assert [layer.name for layer in sparse.layers] == [
        name.replace("_mlp", "_moe")
        if name in ("block_1_mlp", "block_3_mlp")
        else name
        for name in names
    ]
    assert dense.moe_layers == [] and dense.moe is None
    assert [layer.name for layer in sparse.moe_layers] == [
        "block_1_moe",
        "block_3_moe",
    ]


@pytest.mark.backends("torch")
def test_experts_may_be_narrower_than_the_mlps():
    model = tiny(moe={"hidden_dim": 16})
    assert tuple(
        model.get_layer("block_3_moe").experts.hidden_kernel.shape
    ) == (
        4,
        32,
        16,
    )
    assert model.get_layer("block_2_mlp").hidden_dim == 64


@pytest.mark.backends("torch")
def test_summary_shows_the_blocks():
    lines = []
    tiny().summary(print_fn=lines.append, line_length=120)
    text = "\n".join(lines)
    for name in ("embedding", "positions", "block_0_attention", "block_0_mlp",
                 "block_3_moe", "block_3_mlp_add", "norm", "head"):  # fmt: skip
        assert name in text


def test_features_by_name(model):
    taps = [model.get_layer(f"block_{i}_mlp_add").output for i in (0, 3)]
    features = keras.Model(model.input, taps)
    first, last = features.predict(images_of(3), verbose=0)
    assert first.shape == last.shape == (3, 5, 32)
    rest = keras.Sequential(
        [model.get_layer(n) for n in ("norm", "pooling", "pre_logits", "head")]
    )
    np.testing.assert_allclose(
        ops.convert_to_numpy(rest(last)),
        model.predict(images_of(3), verbose=0),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.backends("torch")
def test_defaults_are_those_of_v_moe():
    model = tiny()
    for layer in model.layers:
        if isinstance(layer, keras.layers.LayerNormalization):
            assert layer.epsilon == 1e-6
        if isinstance(layer, layers.MLP | layers.MoEMLP):
            mlp = getattr(layer, "experts", layer)
            assert mlp.activation is gelu_tanh
    assert not ops.convert_to_numpy(model.get_layer("head").kernel).any()
    router = model.get_layer("block_3_moe").router
    assert (router.num_selected_experts, router.capacity_factor) == (2, 1.05)
    assert (router.batch_priority, router.noise_std) == (False, 1.0)
    weights = (router.importance_loss_weight, router.load_loss_weight)
    assert weights == (0.005, 0.005)
    assert router.gshard_loss_weight == router.z_loss_weight == 0.0
    assert MoEConfig().images_per_group == 8


@pytest.mark.backends("torch")
def test_drop_path_rises_from_block_to_block():
    model = tiny(drop_path_rate=0.3)
    names = [layer.name for layer in model.layers]
    assert "block_0_attention_drop" not in names
    for i in (1, 2, 3):
        for part in ("attention", "mlp"):
            rate = model.get_layer(f"block_{i}_{part}_drop").rate
            assert rate == pytest.approx(0.1 * i)


@pytest.mark.backends("torch")
def test_routing_settings_reach_every_router():
    settings = {
        "num_selected_experts": 1,
        "capacity_factor": 1.5,
        "batch_priority": True,
        "noise_std": 0.5,
    }
    for layer in tiny(moe={**settings, "images_per_group": 3}).moe_layers:
        for name, value in settings.items():
            assert getattr(layer.router, name) == value
        assert layer.images_per_group == 3


@pytest.mark.backends("torch")
def test_a_router_object_is_copied_for_each_layer():
    router = layers.TopKRouter(
        3, num_selected_experts=2, z_loss_weight=0.1, seed=5
    )
    model = tiny(moe={"layers": "every_2", "num_experts": 3, "router": router})
    routers = [layer.router for layer in model.moe_layers]
    assert len({id(r) for r in [*routers, router]}) == 3
    assert all(r.z_loss_weight == 0.1 for r in routers)
    twin = ViTMoE.from_config(model.get_config())
    assert all(layer.router.z_loss_weight == 0.1 for layer in twin.moe_layers)


@pytest.mark.backends("torch")
def test_two_models_do_not_share_a_mutable_config():
    moe = {"layers": [1], "num_experts": 4}
    model = tiny(moe=moe)
    config = model.get_config()
    config["moe"]["num_experts"] = 99
    assert moe == {"layers": [1], "num_experts": 4}
    assert model.get_config()["moe"]["num_experts"] == 4


# Words.


@pytest.mark.backends("torch")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"pooling": "cls"}, r"`pooling` must be one of \['token', 'gap', "
         r"'map'\]. Received: pooling='cls'"),
        ({"position_embedding": "sin"}, "Received: position_embedding='sin'."),
        ({"image_size": 10}, "`image_size` must be divisible by `patch_size`. "
         r"Received: image_size=\(10, 10\), patch_size=4"),
        ({"image_size": (8, 9)}, r"image_size=\(8, 9\), patch_size=4"),
        ({"num_heads": 5}, "`hidden_dim` must be divisible by `num_heads`. "
         "Received: hidden_dim=32, num_heads=5. Numbers of heads that fit: "),
        ({"pooling": "map", "num_heads": 3}, "hidden_dim=32, num_heads=3"),
        ({"moe": {"layers": [4]}}, r"from 0 to 3.*Received: layers=\[4\]"),
        ({"moe": {"layers": "lats_2"}}, "'last_2'.*Received: layers='lats_2'"),
        ({"moe": {"num_expert": 4}}, r"`moe` takes the keys \['layers', "
         r"'num_experts', .*Received: num_expert=4. Did you mean "
         r"'num_experts'\?"),
        ({"moe": {"zzz": 4}}, r"Received: zzz=4.$"),
        ({"moe": {"router": "topk"}}, r"`router` must be one of \[.*'top_k'.*"
         r"\] or a router object. Received: router='topk'"),
        ({"moe": {"num_selected_experts": 9}}, "num_selected_experts=9 with "
         "num_experts=4"),
        ({"moe": {"num_experts": 0}}, "Received: num_experts=0"),
        ({"moe": {"capacity_factor": -1.0}}, "capacity_factor=-1.0"),
        ({"moe": {"noise_std": -1.0}}, "noise_std=-1.0"),
        ({"moe": {"images_per_group": 0}}, "images_per_group=0"),
        ({"moe": {"hidden_dim": -4}}, "Received: hidden_dim=-4"),
        ({"moe": {"router": layers.TopKRouter(3)}},
         "router.num_experts=3 and num_experts=4"),
        ({"moe": {"router": layers.TopKRouter(4, name="mine"),
                  "capacity_factor": 2.0}},
         "has its own settings. Received: router=mine together with "
         "capacity_factor=2.0. Set these on the router"),
        ({"dropout": 1.5}, "1.5"),
        ({"drop_path_rate": 1.5}, "drop_path_rate=1.5"),
        ({"drop_path_rate": -0.5}, "drop_path_rate=-0.5"),
        ({"hidden_dim": 36, "num_heads": 2, "position_embedding": "sincos2d",
          "moe": None, "image_size": 8, "patch_size": 3}, "patch_size=3"),
        ({"hidden_dim": 6, "num_heads": 2, "position_embedding": "sincos2d"},
         "multiple of 4, at least 8. Received: hidden_dim=6"),
    ],
)  # fmt: skip
def test_bad_input(arguments, words):
    with pytest.raises(ValueError, match=words):
        tiny(**arguments)


@pytest.mark.backends("torch")
@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_any_number_of_channels(channels):
    model = tiny(channels=channels)
    images = np.ones((2, 8, 8, channels), "float32")
    assert model(images).shape == (2, 10)
    again = type(model).from_config(model.get_config())
    assert again.input_shape == (None, 8, 8, channels)


@pytest.mark.backends("torch")
def test_configs_of_version_0_1():
    config = tiny(drop_path_rate=0.2, layer_scale_init_value=0.1).get_config()
    config["drop_path"] = config.pop("drop_path_rate")
    config["layer_scale"] = config.pop("layer_scale_init_value")
    del config["channels"]
    model = ViTMoE.from_config(config)
    assert model.drop_path_rate == 0.2
    assert model.layer_scale_init_value == 0.1
    assert model.input_shape == (None, 8, 8, 3)


def test_images_of_another_size(model):
    with pytest.raises(ValueError, match="8"):
        model(np.zeros((1, 12, 12, 3), "float32"))


@pytest.mark.backends("torch")
def test_the_weights_of_experts_are_reached_by_name():
    paths = {weight.path for weight in tiny().weights}
    for path in ("block_3_moe/experts/hidden_kernel",
                 "block_3_moe/router/gate/kernel",
                 "block_0_mlp/hidden/kernel"):  # fmt: skip
        assert any(p.endswith(path) for p in paths), path
    assert any(p.endswith(WITHOUT_GRADIENT) for p in paths)


@pytest.mark.backends("torch")
@pytest.mark.parametrize("family", ["vit", "convnext"])
def test_integers_of_numpy(family):
    """`num_classes=labels.max() + 1`, in any argument; files hold them."""
    integer = np.int64
    moe = dict(
        layers=np.array([1]), num_experts=integer(2), hidden_dim=integer(8),
        images_per_group=integer(4), num_selected_experts=integer(1),
    )  # fmt: skip
    if family == "vit":
        sizes = map(integer, (8, 4, 8, 2, 2, 8, 3))
        model = models.ViTMoE(*sizes, representation_size=integer(8), moe=moe)
    else:
        model = models.ConvNeXtMoE(
            np.array([1, 1]), np.array([8, 16]), integer(3), moe=moe,
            image_size=(integer(16), 16), patch_size=integer(4),
            channels=integer(3),
        )  # fmt: skip
    config = json.loads(json.dumps(model.get_config()))
    assert type(model).from_config(config).count_params() > 0


def test_a_pipeline_of_images_of_another_size(model):
    """Whose sizes nobody knows beforehand."""
    import tensorflow as tf

    images = np.zeros((2, 12, 12, 3), "float32")
    dataset = tf.data.Dataset.from_generator(
        lambda: [images], output_signature=tf.TensorSpec([None] * 4)
    )
    with pytest.raises(Exception, match="12, ?12, ?3"):
        model.predict(dataset, verbose=0)
