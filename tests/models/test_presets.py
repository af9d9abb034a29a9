"""The table of the papers' models: sizes as printed, cost, words."""

import csv
import types

import keras
import numpy as np
import pytest

from keras_vmoe import layers
from keras_vmoe import models
from keras_vmoe import routing
from keras_vmoe.cli import papers
from keras_vmoe.models.costs import without_weights
from keras_vmoe.models.presets import PRESETS
from tests.models.definitions import tiny

# Counts need no backend; PyTorch traces shapes the fastest.
pytestmark = pytest.mark.backends("torch")

MILLION = 1e6
with open(papers.COSTS, newline="") as file:
    COSTS = {row["preset"]: row for row in csv.DictReader(file)}


def count(name):
    preset = PRESETS[name]
    with without_weights():
        model = models.from_preset(name, num_classes=preset.paper_classes)
    cost = models.cost(model)
    found = {x: str(getattr(cost, x)) for x in list(COSTS[name])[1:]}
    assert COSTS[name] == {"preset": name, **found}  # Of `keras-vmoe presets`.
    gates = sum(x.router.gate_layer.count_params() for x in model.moe_layers)
    return preset, cost, gates


def digits(printed):
    return len(printed.partition(".")[2])


def agrees(printed, value, gates):
    """Whether a count is printed; the papers leave gates out, or do not."""
    counts = {value, value - gates}
    return printed in {f"{x / MILLION:.{digits(printed)}f}" for x in counts}


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_printed_is_counted(name):
    """But for rows with a note, which says what is not."""
    preset, cost, gates = count(name)
    checks = {
        "params": preset.paper_params is None
        or agrees(preset.paper_params, cost.params, gates),
        "active": preset.paper_active is None
        or agrees(preset.paper_active, cost.active_params, gates),
        "gflops": preset.paper_gflops is None
        or cost.macs / 1e9 == pytest.approx(float(preset.paper_gflops), 0.02),
    }
    if preset.note is None or preset.model is models.ViTMoE:
        assert checks["params"]
    assert all(checks.values()) != bool(preset.note), checks
    if preset.moe is not None and "soft" not in name:
        assert cost.active_params < cost.params


def test_every_row_of_the_paper_is_there():
    """Those whose figures agree, and those with a note."""
    found = {x.name for x in PRESETS.values() if x.source.startswith("Videau")}
    noted = {name for name in found if PRESETS[name].note}
    printed = {name for name in found if PRESETS[name].paper_params}
    assert len(printed) == 24 and len(noted) == 14


def test_descriptions():
    lines = models.presets()
    assert list(lines) == list(PRESETS)
    for line in lines.values():
        assert "arXiv:" in line


def test_overrides():
    model = models.from_preset(
        "convnext_iso_s_e8_last2",
        image_size=32,
        num_classes=7,
        depths=4,
        moe={"num_experts": 2},
    )
    assert model.output_shape == (None, 7)
    assert model.moe.num_experts == 2 and model.moe.layers == "last_2"
    few = types.MappingProxyType({"capacity_factor": 2.0})
    model = models.from_preset(
        "convnext_t_e4_last2_r2", image_size=32, num_classes=7, moe=few
    )
    assert model.moe.num_experts == 4 and model.moe.capacity_factor == 2.0
    dense = models.from_preset(
        "convnext_iso_s_e8_last2", image_size=32, depths=2, moe=None
    )
    assert dense.moe is None and dense.name == "convnext_iso_s_e8_last2"


def test_an_unknown_preset_lists_the_nearest():
    with pytest.raises(ValueError, match="name='vit_s'. The nearest.*vit_s16"):
        models.from_preset("vit_s")
    with pytest.raises(ValueError, match=r"Received: name='\?'\. Names start"):
        models.from_preset("?")


def test_no_weights_are_hosted():
    with pytest.raises(ValueError, match="Received: load_weights=True. Load"):
        models.from_preset("vit_s16", load_weights=True)


@pytest.mark.parametrize("router", ["soft", "expert_choice"])
def test_another_router(router):
    model = models.from_preset(
        "convnext_t_e4_last2", image_size=64, moe={"router": router},
        depths=(1, 1, 1, 1), dims=(4, 4, 8, 8),
    )  # fmt: skip
    assert len(model.moe_layers) == 2


def test_unknown_arguments():
    with pytest.raises(TypeError, match="num_clases=3. Did you mean 'num_cl"):
        models.from_preset("vit_s16", num_clases=3)
    with pytest.raises(ValueError, match="must be one of `models.presets"):
        models.from_preset(["vit_s16"])


# Cost: the graph against a formula with one term for each part.


def vit_macs(n, d, f, blocks):
    """Multiply-adds of ViT blocks of n tokens."""
    return blocks * (4 * n * d * d + 2 * n * n * d + 2 * n * d * f)


def test_macs_of_a_dense_vit():
    model = tiny(moe=None, representation_size=32)
    n, d, f = 5, 32, 64
    expected = 4 * 48 * d + vit_macs(n, d, f, 4) + d * 32 + 32 * 10
    assert models.cost(model).macs == expected


@pytest.mark.parametrize(
    ("moe", "places"),
    [
        # Capacity 10 * 2 * 1.05 / 4 = 5.25: 8 places for 4 experts, 2 images.
        ({}, 16),
        ({"capacity_factor": "dropless"}, 10),
        ({"images_per_group": "batch", "capacity_factor": 2.0}, 20),
        # Never more places than tokens.
        ({"images_per_group": "batch", "capacity_factor": 16.0}, 20),
        ({"router": "expert_choice", "capacity_factor": 1.0}, 8),
    ],
)
def test_macs_of_moe_layers(moe, places):
    model = tiny(moe=moe)
    n, d, f = 5, 32, 64
    expected = 4 * 48 * d + vit_macs(n, d, f, 4) + d * 10
    expected += 2 * (places * 2 * d * f + n * d * 4 - n * 2 * d * f)
    assert models.cost(model).macs == expected


def test_macs_of_soft_and_shared():
    model = tiny(moe={"router": "soft", "num_slots": 2, "images_per_group": 1,
                      "shared_hidden_dim": 16})  # fmt: skip
    n, d, f, slots = 5, 32, 64, 8
    expected = 4 * 48 * d + vit_macs(n, d, f, 4) + d * 10
    expected += 2 * (
        slots * 2 * d * f  # Experts.
        + 3 * n * d * slots  # Gate, dispatch, combine.
        + n * 2 * d * 16
        - n * 2 * d * f
    )
    cost = models.cost(model)
    assert cost.macs == expected and cost.active_params == cost.params


def test_active_parameters():
    expert = 32 * 64 + 64 + 64 * 32 + 32
    for moe, idle in (
        ({}, 2),
        ({"num_selected_experts": 1}, 3),
        ({"router": "expert_choice", "capacity_factor": 1.0}, 3),
        ({"num_selected_experts": 4}, 0),
    ):
        cost = models.cost(tiny(moe=moe))
        assert cost.params - cost.active_params == 2 * idle * expert


def test_nested_models_and_half_precision():
    inner = tiny(num_classes=None, dtype="mixed_bfloat16")
    images = keras.Input((8, 8, 3))
    outer = keras.Model(images, keras.layers.Dense(3)(inner(images)))
    cost, part = models.cost(outer), models.cost(inner)
    assert cost.macs == part.macs + 32 * 3
    assert cost.params == part.params + 99
    full = models.cost(tiny(num_classes=None))
    assert part.activation_bytes == pytest.approx(
        full.activation_bytes / 2, rel=0.01
    )


def test_a_layer_that_is_not_known_is_named():
    @keras.saving.register_keras_serializable("tests")
    class Mixer(keras.layers.Layer):
        def build(self, shape):
            self.kernel = self.add_weight(shape=(shape[-1], 4))

        def call(self, x):
            return x @ self.kernel

        def compute_output_shape(self, shape):
            return (*shape[:-1], 4)

    inputs = keras.Input((3, 8))
    model = keras.Model(inputs, Mixer(name="mixer")(inputs))
    with pytest.warns(UserWarning, match="'mixer', a Mixer, are not counted"):
        assert models.cost(model).macs == 0


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (layers.MLP(4), "must be a functional or sequential Keras model"),
        (keras.Sequential([keras.layers.Dense(2)]), "functional or sequential"),
    ],
)
def test_models_without_a_graph(model, words):
    with pytest.raises(ValueError, match=words):
        models.cost(model)


def test_unknown_sizes():
    inputs = keras.Input((None, 8))
    model = keras.Model(inputs, keras.layers.Dense(2)(inputs))
    with pytest.raises(ValueError, match="sizes of an image must be known"):
        models.cost(model)


def test_models_without_weights_leave_nothing_behind():
    with without_weights():
        model = tiny()
    # A scope that ends fills what is waiting: that model must not be.
    other = tiny()
    with keras.StatelessScope():
        pass
    assert model.weights[0]._value is None
    images = np.zeros((1, 8, 8, 3), "float32")
    assert np.isfinite(other.predict(images, verbose=0)).all()


def test_sequential_models_and_channels_first():
    plain = keras.Sequential(
        [keras.Input((4, 8)), keras.layers.Dense(3), keras.layers.Dense(2)]
    )
    assert models.cost(plain).macs == 4 * (8 * 3 + 3 * 2)
    inputs = keras.Input((4, 8))
    nested = keras.Model(inputs, plain(inputs))
    assert models.cost(nested).macs == 4 * (8 * 3 + 3 * 2)
    images = keras.Input((3, 8, 8))
    conv = keras.layers.Conv2D(4, 3, data_format="channels_first")
    model = keras.Model(images, conv(images))
    assert models.cost(model).macs == 36 * 9 * 3 * 4


def test_a_router_of_somebodys_own():
    class First(layers.Router):
        def make_plan(self, logits, mask, group_size):
            return routing.top_k_plan(keras.ops.softmax(logits), 1, 4)

    inputs = keras.Input((4, 8))
    moe = layers.MoEMLP(2, 16, First(2))
    assert models.cost(keras.Model(inputs, moe(inputs))).macs > 0
