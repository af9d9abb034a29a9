"""Weight decay by kind of variable, and schedules, against slow definitions."""

import math

import keras
import numpy as np
import pytest
from keras import ops

from keras_vmoe import layers
from keras_vmoe.training import optimizers
from tests.harness import first_everywhere
from tests.harness import randomize
from tests.layers.definitions import float64
from tests.models.definitions import images_of
from tests.models.definitions import tiny

RATE, DECAY, EXPERT_DECAY = 0.1, 0.03, 0.06


def kind(path):
    """What a reader takes a variable for."""
    if "/router/" in path:
        return "gate"
    if "/experts/" in path and path.endswith("kernel"):
        return "expert kernel"
    return "kernel" if path.endswith("kernel") else "other"


def one_step(optimizer, **compile_arguments):
    """Weights before and after a step with these gradients: all ones."""
    model = randomize(tiny(layer_scale_init_value=0.1))
    before = {w.path: float64(w) for w in model.trainable_weights}
    optimizer.build(model.trainable_weights)
    gradients = [ops.ones(w.shape) for w in model.trainable_weights]
    optimizer.apply(gradients, model.trainable_weights)
    return before, {w.path: float64(w) for w in model.trainable_weights}


def adam_slowly(weight):
    """The first step of Adam on gradients of one."""
    return -RATE * 1.0 / (1.0 + 1e-7)


def lamb_slowly(weight):
    """The same direction, with the trust ratio."""
    size, update = np.linalg.norm(weight), math.sqrt(weight.size)
    return -RATE * (size / update if size > 0 else 1.0)


def sgd_slowly(weight):
    return -RATE


@pytest.mark.parametrize("gates", [False, True])
@pytest.mark.parametrize(
    ("make", "slowly"),
    [
        (optimizers.AdamW, adam_slowly),
        (optimizers.Lamb, lamb_slowly),
        (optimizers.SGD, sgd_slowly),
    ],
)
def test_each_variable_decays_by_its_kind(make, slowly, gates):
    optimizer = make(
        RATE,
        weight_decay=DECAY,
        expert_weight_decay=EXPERT_DECAY,
        decay_gates=gates,
    )
    before, after = one_step(optimizer)
    decays = {"kernel": DECAY, "expert kernel": EXPERT_DECAY,
              "gate": DECAY if gates else 0.0, "other": 0.0}  # fmt: skip
    seen = set()
    for path, weight in before.items():
        shrunk = weight * (1 - RATE * decays[kind(path)])
        # Keras decays first: LAMB's trust ratio sees the shrunk weight.
        expected = shrunk + slowly(shrunk)
        np.testing.assert_allclose(
            after[path], expected, rtol=2e-4, atol=2e-5, err_msg=path
        )
        seen.add(kind(path))
    assert seen == set(decays)
    assert optimizer.weight_decay == DECAY


class GatedBank(keras.layers.Layer):
    """Has no kernel by name."""

    def build(self, shape):
        size = (shape[1], shape[3], shape[3])
        self.value = self.add_weight(shape=size, name="value")
        self.shift = self.add_weight(shape=size[:2], name="shift")

    def call(self, buffers):
        return buffers @ self.value + self.shift[:, None]


def test_parts_are_known_whatever_their_names(tmp_path):
    """A router, a gate and a bank of one's own, also from a file."""
    gate = keras.layers.Dense(2, dtype="float32", name="mine")
    router = layers.TopKRouter(2, gate=gate, name="any")
    tokens = keras.Input((4, 8))
    model = keras.Model(
        tokens,
        layers.MoEMLP(2, experts=GatedBank(name="b"), router=router)(tokens),
    )
    model.save(tmp_path / "m.keras")
    custom = {"GatedBank": GatedBank}
    loaded = keras.models.load_model(tmp_path / "m.keras", custom)
    optimizer = optimizers.AdamW(
        RATE, weight_decay=DECAY, expert_weight_decay=EXPERT_DECAY
    )
    all_decayed = optimizers.AdamW(RATE, weight_decay=DECAY, decay_gates=True)
    for layer in (model.layers[1], loaded.layers[1]):
        kernel = layer.router.gate_layer.kernel
        assert optimizer.decay_of(kernel) == 0
        assert all_decayed.decay_of(kernel) == DECAY
        assert optimizer.decay_of(layer.experts.value) == EXPERT_DECAY
        assert all_decayed.decay_of(layer.experts.value) == DECAY
        assert all_decayed.decay_of(layer.experts.shift) == 0


class CalledGate(keras.layers.Layer):
    """Makes its weights in its first call, as it has no `build`."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(2)

    def call(self, tokens):
        return self.dense(tokens)


class CalledBank(keras.layers.Layer):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.EinsumDense("gecd,edf->gecf", (2, None, 8))

    def call(self, buffers):
        return self.dense(buffers)

    def compute_output_shape(self, input_shape):
        return input_shape


class OwnRouter(layers.TopKRouter):
    def build(self, input_shape):
        super().build(input_shape)
        self.own = self.add_weight(name="kernel", shape=(8, 2))


@pytest.mark.backends("torch")
def test_weights_that_are_made_late_are_known():
    router = OwnRouter(2, gate=CalledGate())
    layer = layers.MoEMLP(2, experts=CalledBank(), router=router)
    layer.build((None, 4, 8))
    optimizer = optimizers.AdamW(
        RATE, weight_decay=DECAY, expert_weight_decay=EXPERT_DECAY
    )
    assert optimizer.decay_of(router.own) == 0
    assert optimizer.decay_of(router.gate_layer.dense.kernel) == 0
    assert optimizer.decay_of(layer.experts.dense.kernel) == EXPERT_DECAY


def test_a_configuration_of_version_0_1_0():
    config = optimizers.AdamW(RATE).get_config()
    del config["decay_positions"]
    config["decayed"] = ["kernel$", "positions/embedding$"]
    assert optimizers.AdamW.from_config(config).decay_positions


def test_one_decay_for_all_and_for_positions():
    optimizer = optimizers.AdamW(RATE, weight_decay=DECAY)
    model = tiny()
    expert = model.get_layer("block_3_moe").experts.hidden_kernel
    positions = model.get_layer("positions").embedding
    assert optimizer.decay_of(expert) == DECAY
    assert optimizer.decay_of(positions) == 0
    optimizer = optimizers.AdamW(RATE, weight_decay=DECAY, decay_positions=True)
    assert optimizer.decay_of(positions) == DECAY


@pytest.mark.parametrize("name", first_everywhere(["lamb", "adamw", "sgd"]))
def test_fit_and_reload(name, tmp_path):
    schedule = optimizers.WarmUp(0.01, steps=10, warmup_steps=2)
    optimizer = optimizers.OPTIMIZERS[name](
        schedule,
        weight_decay=DECAY,
        expert_weight_decay=EXPERT_DECAY,
        global_clipnorm=1.0,
        use_ema=True,
        gradient_accumulation_steps=2,
    )
    model = tiny(num_layers=1, moe={"layers": [0]})
    model.compile(optimizer, "mse")
    images, targets = images_of(8), np.ones((8, 10))
    model.fit(images, targets, batch_size=2, epochs=2, verbose=0)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    config, twin = optimizer.get_config(), loaded.optimizer.get_config()
    assert type(loaded.optimizer) is type(optimizer)
    assert {**twin, "learning_rate": 0} == {**config, "learning_rate": 0}
    for mine, theirs in zip(
        optimizer.variables, loaded.optimizer.variables, strict=True
    ):
        np.testing.assert_array_equal(float64(mine), float64(theirs))


class Seen(optimizers.SGD):
    """Notes what Keras calls of what is private in it."""

    def _apply_weight_decay(self, variables):
        self.seen = [*getattr(self, "seen", ()), "decay"]
        super()._apply_weight_decay(variables)

    def _clip_gradients(self, grads):
        self.seen = [*getattr(self, "seen", ()), "clip"]
        return super()._clip_gradients(grads)


def test_keras_clips_and_decays_where_we_do_otherwise():
    """Fails when Keras renames these methods, or calls them no more."""
    weight = keras.Variable(ops.ones((2,)), name="kernel")
    optimizer = Seen(RATE, weight_decay=DECAY, global_clipnorm=1e-9)
    optimizer.apply([ops.ones((2,))], [weight])
    assert optimizer.seen == ["clip", "decay"]
    # Nothing of the gradient, clipped to almost nothing, but the decay.
    expected = np.full(2, 1 - RATE * DECAY)
    np.testing.assert_allclose(float64(weight), expected, rtol=1e-6)


def test_bad_decay():
    with pytest.raises(ValueError, match="expert_weight_decay=-1"):
        optimizers.AdamW(0.1, expert_weight_decay=-1)


# Schedules.


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("decay", optimizers.DECAYS)
def test_schedule(decay, warmup):
    steps, peak, end = 20, 0.5, 0.1
    schedule = optimizers.WarmUp(peak, steps, warmup, decay, end)
    for step in range(steps + 3):
        done = min(1.0, max(0.0, (step - warmup) / (steps - warmup)))
        expected = {
            "cosine": end + (peak - end) * (1 + math.cos(math.pi * done)) / 2,
            "linear": end + (peak - end) * (1 - done),
            "rsqrt": peak * math.sqrt(max(1, warmup) / max(step, warmup, 1)),
            "constant": peak,
        }[decay]
        if step < warmup:
            expected = peak * (step + 1) / warmup
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"decay": "cosin"}, "must be one of .*decay='cosin'"),
        ({"peak": 0}, "peak=0"),
        ({"end": -1}, "end=-1"),
        ({"warmup_steps": 20}, "warmup_steps=20, steps=20"),
    ],
)
def test_bad_schedules(arguments, words):
    with pytest.raises(ValueError, match=words):
        optimizers.WarmUp(**{"peak": 0.1, "steps": 20, **arguments})
