"""RandAugment and random erasing against TensorFlow's Model Garden.

Runs where the extra `model-garden` is installed (3 GB).
"""

import numpy as np
import pytest
import tensorflow as tf

from keras_vmoe.data import changes

pytest.importorskip("official", reason="tf-models-official is not installed")
augment = pytest.importorskip("official.vision.ops.augment")

SIDE = 40
NAMES = (
    "stretch", "equalize", "solarize", "color", "contrast", "brightness",
    "shear_x", "shear_y", "translate_x", "translate_y",
)  # fmt: skip
IMAGE = np.random.default_rng(0).integers(20, 220, (SIDE, SIDE, 3), "uint8")
OPERATIONS = dict(zip(NAMES, changes.rand_augment_operations(), strict=False))
LEVELS = augment.level_to_arg(cutout_const=40, translate_const=100)
EMPTY = tf.constant([255, 0, 255], tf.uint8)  # Is never seen.


def ours(name, strength, sign):
    image = OPERATIONS[name](tf.constant(IMAGE), strength, sign)
    return image.numpy().astype("float32")


@pytest.mark.parametrize("name", ["stretch", "equalize"])
def test_operations_without_a_strength(name):
    change = {"stretch": augment.autocontrast, "equalize": augment.equalize}
    theirs = change[name](tf.constant(IMAGE)).numpy()
    np.testing.assert_allclose(ours(name, 0.5, 1.0), theirs, atol=1.01)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", ["color", "brightness"])
def test_blending(name, sign):
    """Not contrast: the Garden blends with the number of pixels / 256."""
    factor = 1 + changes.ENHANCEMENT * 0.5 * sign
    theirs = getattr(augment, name)(tf.constant(IMAGE), factor).numpy()
    # Whole numbers there: of grey before it is scaled, and of the result.
    np.testing.assert_allclose(ours(name, 0.5, sign), theirs, atol=2)


def test_solarizing():
    theirs = augment.solarize(tf.constant(IMAGE), 128).numpy()
    np.testing.assert_array_equal(ours("solarize", 0.5, 1.0), theirs)


@pytest.mark.parametrize("name", ["shear_x", "shear_y", "translate_x",
                                  "translate_y"])  # fmt: skip
def test_moving(name):
    """The nearest pixels, mirrored behind the edge, in one of two directions.

    Where a shear falls between two pixels either may be the nearest.
    """
    end = changes.SHEAR
    if name.startswith("translate"):
        end = changes.TRANSLATION * SIDE  # 9 pixels at half the strength.
    theirs = getattr(augment, name)(tf.constant(IMAGE), end * 0.5, EMPTY)
    same = [
        (ours(name, 0.5, sign) == theirs.numpy()).all(-1).mean()
        for sign in (1.0, -1.0)
    ]
    assert max(same) > 0.97 and min(same) < 0.5


def test_the_ends_of_the_ranges():
    for name in ("Color", "Contrast", "Brightness"):
        assert LEVELS[name](10.0)[0] == pytest.approx(1 + changes.ENHANCEMENT)
        assert LEVELS[name](0.0)[0] == pytest.approx(1 - changes.ENHANCEMENT)
    shear = abs(float(LEVELS["ShearX"](10.0)[0]))
    assert shear == pytest.approx(changes.SHEAR)
    # Its 100 pixels are of images of 224, AutoAugment's 150 of 331.
    shift = abs(float(LEVELS["TranslateX"](10.0)[0])) / 224
    assert shift == pytest.approx(changes.TRANSLATION, abs=0.01)
    assert LEVELS["Solarize"](10.0)[0] == 256


def test_what_is_erased():
    erasing = augment.RandomErasing()
    area = (erasing._min_area, erasing._max_area)
    assert area == pytest.approx(changes.ERASED_AREA)
    ratios = (erasing._min_log_aspect, erasing._max_log_aspect)
    end = np.log(changes.ERASED_RATIO)
    assert ratios == pytest.approx((end, -end))
