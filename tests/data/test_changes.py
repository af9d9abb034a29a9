"""What augmentation does to pixels, against numpy and Keras-CV's layers."""

import keras_cv
import numpy as np
import pytest
import tensorflow as tf

from keras_vmoe.data import changes
from keras_vmoe.data import colors
from keras_vmoe.data import mixing

GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.integers(20, 220, (4, 40, 40, 3), "uint8")
NAMES = (
    "stretch", "equalize", "solarize", "color", "contrast", "brightness",
    "shear_x", "shear_y", "translate_x", "translate_y", "identity",
)  # fmt: skip
OPERATIONS = dict(zip(NAMES, changes.RAND_AUGMENT, strict=True))
COLORS = np.array([0.2989, 0.587, 0.114])  # How tf.image makes gray.
ROUNDING = 0.501


def each(function, images, *arguments):
    """Applies a function to images one by one, as a pipeline does."""
    dataset = tf.data.Dataset.from_tensor_slices(images)
    dataset = dataset.map(lambda image: function(image, *arguments))
    return np.stack(list(dataset.as_numpy_iterator())).astype("float32")


def apply(name, strength, sign, images=IMAGES):
    return each(OPERATIONS[name], images, float(strength * sign))


def blended(other, factor):
    return np.clip(other + factor * (IMAGES - other), 0, 255)


def gray_of(images):
    return np.repeat((images @ COLORS)[..., None], 3, -1)


MEANS = IMAGES.mean(axis=(1, 2), keepdims=True)
OTHERS = {"color": gray_of(IMAGES), "contrast": MEANS, "brightness": 0.0}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(
    ("strength", "sign", "factor"),
    [(1.0, 1, 1.9), (1.0, -1, 0.1), (0.5, -1, 0.55), (2.0, -1, 0.1)],
)
def test_blending_is_from_a_tenth_to_nineteen(name, strength, sign, factor):
    expected = blended(OTHERS[name], factor)
    result = apply(name, strength, sign)
    np.testing.assert_allclose(result, expected, atol=ROUNDING)


@pytest.mark.parametrize("strength", [0.25, 1.0, 2.0])
def test_solarize(strength):
    threshold = 255 * (1 - min(strength, 1))
    expected = np.where(threshold > IMAGES, IMAGES, 255 - IMAGES)
    np.testing.assert_array_equal(apply("solarize", strength, 1), expected)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("name", "axis"), [("x", 2), ("y", 1)])
def test_translations_end_at_45_percent(name, axis, sign):
    shift = sign * 18  # 45% of 40.
    result = apply(f"translate_{name}", 1.0, sign)
    expected = np.roll(IMAGES, shift, axis)
    kept = [slice(None)] * 4
    kept[axis] = slice(18, None) if sign > 0 else slice(None, -18)
    np.testing.assert_array_equal(result[tuple(kept)], expected[tuple(kept)])


@pytest.mark.parametrize(("name", "axis"), [("x", 2), ("y", 1)])
def test_shears_end_at_30_percent(name, axis):
    """A line across the shear moves by 0.3 pixels for each of its own."""
    image = np.zeros((1, 40, 40, 3), "uint8")
    line = [slice(None)] * 4
    line[axis] = 20
    image[tuple(line)] = 255
    result = apply(f"shear_{name}", 1.0, 1, image)[0, ..., 0]
    result = result if axis == 2 else result.T
    rows = np.arange(40)
    places = (result * rows).sum(1) / result.sum(1)
    inside = slice(5, 25)
    slope = np.polyfit(rows[inside], places[inside], 1)[0]
    assert abs(slope) == pytest.approx(0.3, abs=0.02)


def test_stretching_and_equalizing():
    stretched = apply("stretch", 1.0, 1)
    assert stretched.min(axis=(1, 2)).max() == 0
    np.testing.assert_array_equal(stretched.max(axis=(1, 2)), 255)
    equal = apply("equalize", 1.0, 1)
    quarters = np.histogram(equal, 4, (0, 256))[0] / equal.size
    np.testing.assert_allclose(quarters, 0.25, atol=0.03)


# Against Keras-CV.

CV = keras_cv.layers
RANGE = (0, 255)
# An odd size, and an image that is flat in one channel and black in another.
ODD = GENERATOR.integers(0, 256, (3, 21, 15, 3), "uint8")
ODD[1, ..., 0], ODD[1, ..., 2] = 77, 0


def amounts(amount, images):
    return tf.fill((len(images), 1, 1, 1), tf.constant(amount, tf.float32))


def slow_shear(images, **amounts):
    shear = CV.RandomShear(1.0, 1.0, interpolation="nearest")
    none = {"shear_x": None, "shear_y": None}
    tensors = {k: tf.fill((len(images), 1), v) for k, v in amounts.items()}
    return shear.augment_images(images, none | tensors)


def slow_translation(images, **amounts):
    translate = CV.RandomTranslation(1.0, 1.0, interpolation="nearest")
    shifts = {
        f"{k}_translations": tf.fill((len(images), 1), amounts.get(k, 0.0))
        for k in ("height", "width")
    }
    return translate.augment_images(images, shifts)


# Names, strengths and signs; no shift lies between two pixels.
SLOW = {
    ("stretch", 1.0, 1): CV.AutoContrast(RANGE).augment_images,
    ("equalize", 1.0, 1): CV.Equalization(RANGE).augment_images,
    ("solarize", 0.6, 1): lambda x: CV.Solarization(RANGE).augment_images(
        x, {"additions": 0.0, "thresholds": 102.0}
    ),
    ("color", 0.8, 1): lambda x: tf.clip_by_value(
        CV.RandomColorDegeneration(1.0).augment_images(x, amounts(-0.72, x)),
        *RANGE,
    ),
    ("contrast", 0.8, -1): lambda x: CV.RandomContrast(
        RANGE, 1.0
    ).augment_images(x, amounts(0.28, x)),
    ("shear_x", 0.77, 1): lambda x: slow_shear(x, shear_x=0.231),
    ("shear_x", 2.1, -1): lambda x: slow_shear(x, shear_x=-0.63),
    ("shear_y", 0.77, -1): lambda x: slow_shear(x, shear_y=-0.231),
    ("translate_x", 0.83, 1): lambda x: slow_translation(x, width=0.3735),
    ("translate_y", 2.0, -1): lambda x: slow_translation(x, height=-0.9),
}


@pytest.mark.parametrize("images", [IMAGES, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("case", SLOW, ids=lambda case: case[0])
def test_pixels_are_those_of_keras_cv(case, images):
    expected = SLOW[case](tf.constant(images, tf.float32))
    result = apply(*case, images)
    np.testing.assert_allclose(result, expected, atol=ROUNDING)


def test_the_color_jitter_is_that_of_keras_cv():
    """As long as nothing is clipped on the way."""
    images = IMAGES // 4 + 60
    light, contrast, color = 1.2, 0.8, 1.25
    expected = CV.RandomContrast(RANGE, 1.0).augment_images(
        tf.constant(images, tf.float32) * light, amounts(contrast, images)
    )
    expected = CV.RandomColorDegeneration(1.0).augment_images(
        expected, amounts(1 - color, images)
    )
    result = each(colors.jittered, images, light, contrast, color)
    np.testing.assert_allclose(result, expected, atol=ROUNDING)


@pytest.mark.parametrize("images", [IMAGES, ODD], ids=["even", "odd"])
def test_gray_is_that_of_tensorflow(images):
    gray, solar, _ = changes.three_augment_operations(CV)
    expected = CV.Grayscale(output_channels=3).augment_images(
        tf.constant(images, tf.float32)
    )
    np.testing.assert_allclose(each(gray, images, 0.5), expected, atol=ROUNDING)
    expected = np.where(images < 128, images, 255 - images)
    np.testing.assert_array_equal(each(solar, images, 0.5), expected)


# What the numbers from 0 to 1 say.


def test_each_operation_is_equally_likely():
    operations = [lambda x, y, i=i: x * 0 + i + y for i in range(4)]
    image = tf.zeros((2, 2, 3))
    chances = [0.0, 0.24, 0.26, 0.49, 0.51, 0.74, 0.76, 0.9999999]
    results = [
        float(changes.chosen(operations, x, image, 0.5)[0, 0, 0])
        for x in map(tf.constant, chances)
    ]
    assert results == [0.5, 0.5, 1.5, 1.5, 2.5, 2.5, 3.5, 3.5]


def test_rand_augment_takes_its_strength_from_a_normal_distribution():
    """A change of brightness: 0.9 times the strength, up or down."""
    image = tf.fill((2, 2, 3), tf.constant(100, tf.uint8))
    chance = tf.constant(5.5 / 11)
    for number, deviations in ((0.5, 0), (0.8413, 1), (0.0228, -2)):
        for sign in (1, -1):
            number_of_sign = tf.constant(0.75 if sign > 0 else 0.25)
            result = changes.rand_augment(
                0.5, image, chance, tf.constant(number), number_of_sign
            )
            factor = 1 + sign * 0.9 * (0.5 + 0.05 * deviations)
            assert int(result[0, 0, 0]) == pytest.approx(100 * factor, abs=0.6)


@pytest.mark.parametrize(("number", "gray"), [(0.0, 70), (0.5, 100), (1, 130)])
def test_the_color_jitter_ends_at_its_strength(number, gray):
    """Of flat gray images only brightness is left."""
    flat = tf.fill((3, 3, 3), tf.constant(100, tf.uint8))
    numbers = (tf.constant(x, tf.float32) for x in (number, 0.3, 0.9))
    result = changes.color_jitter(0.3, flat, *numbers).numpy()
    np.testing.assert_array_equal(result, gray)


@pytest.mark.parametrize(
    ("center", "share", "ends"),
    [
        (0.5, 0.5, (8, 24)),
        (0.5, 0.25, (12, 20)),
        (0.0, 0.5, (0, 8)),
        (1.0, 0.5, (24, 32)),
        (0.3, 0.0, (10, 10)),
        (0.5, 1.5, (0, 32)),
    ],
)
def test_spans_are_cut_off_at_the_edge(center, share, ends):
    result = changes.span(tf.constant([center]), share, 32)
    assert [int(x[0]) for x in result] == list(ends)


def test_a_rectangle_of_a_quarter_of_the_images_is_erased():
    black = tf.zeros((32, 24, 3), tf.uint8)
    shares = []
    for numbers in GENERATOR.random((300, 5), "float32"):
        erased, kept = (
            changes.erase(0.25, black, *map(tf.constant, (chance, *numbers)))
            for chance in (0.2499, 0.25)
        )
        assert not kept.numpy().any()
        inside = erased.numpy().any(-1)
        rows, columns = inside.any(1).sum(), inside.any(0).sum()
        assert inside.sum() >= 0.9 * rows * columns  # Noise may be black.
        shares.append(inside.mean())
    assert max(shares) < 0.36 and np.mean(shares) > 0.08


def test_erased_pixels_are_noise():
    gray = tf.fill((64, 64, 3), tf.constant(9, tf.uint8))
    chance, *rest = (tf.constant(x) for x in (0.0, 0.99, 0.5, 0.5, 0.5))
    results = [
        changes.erase(1.0, gray, chance, *rest, tf.constant(x)).numpy()
        for x in (0.3, 0.3, 0.4)
    ]
    np.testing.assert_array_equal(results[0], results[1])
    assert (results[0] != results[2]).any()
    pixels = results[0][(results[0] != 9).all(-1)]
    assert len(pixels) == pytest.approx(64 * 64 / 3, rel=0.1)
    assert pixels.std() > 60 and abs(pixels.mean() - 127.5) < 5


@pytest.mark.parametrize("mix", [mixing.mixup, mixing.cutmix])
def test_shares_of_each_image_are_its_own(mix):
    images = tf.constant(np.arange(200) % 2 * 255.0, tf.float32)
    images = tf.ones((200, 16, 16, 3)) * tf.reshape(images, (-1, 1, 1, 1))
    labels = tf.one_hot(np.arange(200) % 2, 2)
    mixed, mixed_labels = mix(1.0, images, labels, tf.constant([1, 2]))
    gray = mixed.numpy().mean((1, 2, 3)) / 255
    np.testing.assert_allclose(gray, mixed_labels[:, 1], atol=1e-5)
    between = gray[(gray > 0) & (gray < 1)]
    assert len(between) > 60 and between.std() > 0.2
