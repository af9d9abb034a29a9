"""Accumulation, averages, clipping and losses: numbers against definitions."""

import dataclasses

import keras
import numpy as np
import pytest

from keras_vmoe.training import building
from keras_vmoe.training import optimizers
from tests.harness import first_everywhere
from tests.layers.definitions import float64
from tests.models.definitions import images_of
from tests.models.definitions import tiny
from tests.training.small import SMALL
from tests.training.small import changed

RATE = 0.1
LABELS = np.eye(10, dtype="float32")


def small(optimizer):
    """A compiled dense model, always with the same weights."""
    keras.utils.set_random_seed(0)
    model = tiny(moe=None, num_layers=1)
    model.compile(
        optimizer, keras.losses.CategoricalCrossentropy(from_logits=True)
    )
    return model


def fit(model, batch_size, images=8):
    model.fit(
        images_of(images), LABELS[:images], batch_size=batch_size,
        shuffle=False, verbose=0,
    )  # fmt: skip
    return [float64(w) for w in model.trainable_weights]


def assert_close(ours, theirs, **tolerance):
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, **tolerance)


@pytest.mark.parametrize("name", first_everywhere(["lamb", "adamw", "sgd"]))
def test_parts_of_a_batch_add_up_to_the_batch(name):
    """Decay and clipping, too, happen once per update."""
    arguments = {"weight_decay": 0.1, "global_clipnorm": 0.5}
    make = optimizers.OPTIMIZERS[name]
    whole = fit(small(make(RATE, **arguments)), batch_size=8)
    parts = make(RATE, gradient_accumulation_steps=4, **arguments)
    start = [float64(w) for w in small(make(RATE)).trainable_weights]
    got = fit(small(parts), batch_size=2)
    # Adam divides by gradients, however small they are.
    assert_close(got, whole, rtol=1e-4, atol=1e-4 if name == "sgd" else 2e-3)
    moved = max(np.abs(a - b).max() for a, b in zip(whole, start, strict=True))
    assert moved > 1e-3


def test_the_average_of_weights_is_a_moving_one():
    """It starts as the weights behind the first step."""
    optimizer = optimizers.SGD(RATE, use_ema=True, ema_momentum=0.9)
    weights, average = tiny(moe=None, num_layers=1).trainable_weights, None
    optimizer.build(weights)
    for step in range(4):
        gradients = [keras.ops.full(w.shape, step + 1.0) for w in weights]
        optimizer.apply(gradients, weights)
        now = [float64(w) for w in weights]
        average = average or now
        pairs = zip(average, now, strict=True)
        average = [0.9 * before + 0.1 * after for before, after in pairs]
    optimizer.finalize_variable_values(weights)
    assert_close([float64(w) for w in weights], average, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("limit", [0.25, 1e6])
def test_gradients_are_clipped_by_their_norm_in_all(limit):
    start = [float64(w) for w in small("sgd").trainable_weights]
    plain = fit(small(optimizers.SGD(RATE)), batch_size=8)
    steps = [after - b for after, b in zip(plain, start, strict=True)]
    norm = np.sqrt(sum((step**2).sum() for step in steps)) / RATE
    assert 0.25 < norm < 1e6
    clipped = optimizers.SGD(RATE, global_clipnorm=limit)
    expected = [
        before + step * min(1, limit / norm)
        for before, step in zip(start, steps, strict=True)
    ]
    got = fit(small(clipped), batch_size=8)
    assert_close(got, expected, rtol=1e-4, atol=1e-6)


LOGITS = np.random.default_rng(0).normal(0, 3, (6, 10))
TARGETS = np.random.default_rng(1).dirichlet(np.ones(10), 6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_with_smoothed_labels(smoothing):
    mixes = dataclasses.replace(SMALL.data.augmentation, mixup=0.8)
    config = changed(SMALL, label_smoothing=smoothing, augmentation=mixes)
    log_softmax = LOGITS - np.log(np.exp(LOGITS).sum(-1, keepdims=True))
    labels = (1 - smoothing) * TARGETS + smoothing / 10
    expected = -(labels * log_softmax).sum(-1).mean()
    loss = building.make_loss(config)(TARGETS, LOGITS)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_binary_cross_entropies():
    p = 1 / (1 + np.exp(-LOGITS))
    each = -TARGETS * np.log(p) - (1 - TARGETS) * np.log(1 - p)
    config = changed(SMALL, loss="bce")
    mean = float(building.make_loss(config)(TARGETS, LOGITS))
    assert mean == pytest.approx(each.mean(), rel=1e-5)
    config = changed(SMALL, loss="sigmoid")
    sums = building.make_loss(config)(TARGETS, LOGITS)
    np.testing.assert_allclose(float64(sums), each.sum(-1), rtol=1e-5)
