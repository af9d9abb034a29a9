"""What augmentation does to pixels, against definitions in numpy."""

import keras_cv
import numpy as np
import pytest
import tensorflow as tf

from keras_vmoe.data import changes
from keras_vmoe.data import mixing

GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.integers(20, 220, (4, 40, 40, 3)).astype("float32")
NAMES = (
    "stretch", "equalize", "solarize", "color", "contrast", "brightness",
    "shear_x", "shear_y", "translate_x", "translate_y",
)  # fmt: skip
OPERATIONS = dict(
    zip(NAMES, changes.rand_augment_operations(keras_cv.layers), strict=True)
)
COLORS = np.array([0.2989, 0.587, 0.114])  # How tf.image makes grey.


def apply(name, strength, sign):
    shape = (len(IMAGES), 1, 1, 1)
    amount = tf.fill(shape, strength), tf.fill(shape, float(sign))
    return OPERATIONS[name](tf.constant(IMAGES), *amount).numpy()


def blended(other, factor):
    return np.clip(other + factor * (IMAGES - other), 0, 255)


def grey_of(images):
    return np.repeat((images @ COLORS)[..., None], 3, -1)


MEANS = IMAGES.mean(axis=(1, 2), keepdims=True)
OTHERS = {"color": grey_of(IMAGES), "contrast": MEANS, "brightness": 0.0}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(
    ("strength", "sign", "factor"),
    [(1.0, 1, 1.9), (1.0, -1, 0.1), (0.5, -1, 0.55), (2.0, -1, 0.1)],
)
def test_blending_is_from_a_tenth_to_nineteen(name, strength, sign, factor):
    expected = blended(OTHERS[name], factor)
    np.testing.assert_allclose(apply(name, strength, sign), expected, atol=0.1)


@pytest.mark.parametrize("strength", [0.25, 1.0, 2.0])
def test_solarize(strength):
    threshold = 255 * (1 - min(strength, 1))
    expected = np.where(IMAGES < threshold, IMAGES, 255 - IMAGES)
    result = apply("solarize", strength, 1)
    np.testing.assert_allclose(result, expected, atol=1e-3)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("name", "axis"), [("x", 2), ("y", 1)])
def test_translations_end_at_45_percent(name, axis, sign):
    shift = sign * 18  # 45% of 40.
    result = apply(f"translate_{name}", 1.0, sign)
    expected = np.roll(IMAGES, shift, axis)
    kept = [slice(None)] * 4
    kept[axis] = slice(18, None) if sign > 0 else slice(None, -18)
    np.testing.assert_allclose(
        result[tuple(kept)], expected[tuple(kept)], atol=1e-2
    )


@pytest.mark.parametrize(("name", "axis"), [("x", 2), ("y", 1)])
def test_shears_end_at_30_percent(name, axis):
    """A line across the shear moves by 0.3 pixels for each of its own."""
    image = np.zeros((1, 40, 40, 3), "float32")
    line = [slice(None)] * 4
    line[axis] = 20
    image[tuple(line)] = 255
    one = tf.ones((1, 1, 1, 1))
    result = OPERATIONS[f"shear_{name}"](image, one, one).numpy()[0, ..., 0]
    result = result if axis == 2 else result.T
    rows = np.arange(40)
    places = (result * rows).sum(1) / result.sum(1)
    inside = slice(5, 25)
    slope = np.polyfit(rows[inside], places[inside], 1)[0]
    assert abs(slope) == pytest.approx(0.3, abs=0.02)


def test_stretching_and_equalizing():
    stretched = apply("stretch", 1.0, 1)
    assert stretched.min(axis=(1, 2)).max() == 0
    np.testing.assert_allclose(stretched.max(axis=(1, 2)), 255, rtol=1e-5)
    equal = apply("equalize", 1.0, 1)
    quarters = np.histogram(equal, 4, (0, 256))[0] / equal.size
    np.testing.assert_allclose(quarters, 0.25, atol=0.03)


def test_every_image_goes_to_the_operation_of_its_choice():
    operations = [lambda x, y, i=i: x * 0 + i + y for i in range(4)]
    choices, add = np.array([2, 0, 2, 3]), np.array([0.1, 0.2, 0.3, 0.4])
    result = changes.routed(
        operations, choices, tf.constant(IMAGES),
        tf.constant(add.reshape(4, 1, 1, 1), tf.float32),
    )  # fmt: skip
    np.testing.assert_allclose(result[:, 0, 0, 0], choices + add, rtol=1e-6)


def test_the_colour_jitter_ends_at_its_strength():
    """Of flat grey images only brightness is left."""
    flat = tf.fill((400, 2, 2, 3), 100.0)
    jitter = changes.color_jitter(keras_cv.layers, 0.3)
    light = jitter(flat, tf.constant([1, 2], tf.int64)).numpy()[:, 0, 0, 0]
    assert 70 <= light.min() < 73 and 127 < light.max() <= 130
    assert np.mean(light) == pytest.approx(100, abs=3)


def test_rectangles_and_erasing():
    black = tf.zeros((400, 32, 32, 3))
    shape = (400, 1, 1, 1)
    inside = changes.rectangles(
        black, tf.constant([1, 2], tf.int64), tf.fill(shape, 0.5),
        tf.fill(shape, 0.25),
    ).numpy()[..., 0]  # fmt: skip
    heights, widths = inside.any(2).sum(1), inside.any(1).sum(1)
    assert heights.max() == 16 and widths.max() == 8  # Others are cut off.
    assert inside.sum((1, 2)).tolist() == (heights * widths).tolist()
    erased = changes.erase(0.25, black, tf.constant([3, 4], tf.int64)).numpy()
    share = (erased.any(-1)).mean((1, 2))
    assert np.mean(share > 0) == pytest.approx(0.25, abs=0.06)
    assert share.max() < 0.36
    pixels = erased[erased.any(-1)]
    assert 0 <= pixels.min() and pixels.max() <= 255 and pixels.std() > 60


@pytest.mark.parametrize("mix", [mixing.mixup, mixing.cutmix])
def test_shares_of_each_image_are_its_own(mix):
    images = tf.constant(np.arange(200) % 2 * 255.0, tf.float32)
    images = tf.ones((200, 16, 16, 3)) * tf.reshape(images, (-1, 1, 1, 1))
    labels = tf.one_hot(np.arange(200) % 2, 2)
    mixed, mixed_labels = mix(1.0, images, labels, tf.constant([1, 2]))
    grey = mixed.numpy().mean((1, 2, 3)) / 255
    np.testing.assert_allclose(grey, mixed_labels[:, 1], atol=1e-5)
    between = grey[(grey > 0) & (grey < 1)]
    assert len(between) > 60 and between.std() > 0.2
