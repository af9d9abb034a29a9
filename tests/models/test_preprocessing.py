"""What a model knows of its images, and the datasets that it refuses."""

import keras
import numpy as np
import pytest

from keras_vmoe import checkpoints
from keras_vmoe import data
from keras_vmoe import models
from tests.golden.models import FOLDER
from tests.models.definitions import tiny

pytestmark = pytest.mark.backends("torch")
IMAGENET = data.Preprocessing.imagenet(test_crop=0.875)


def convnext(**settings):
    sizes = {"depths": (1, 1), "dims": (4, 8), "image_size": 8}
    return models.ConvNeXtMoE(num_classes=10, **sizes, **settings)


@pytest.mark.parametrize("make", [tiny, convnext])
def test_it_is_kept(make, tmp_path):
    assert make().preprocessing == data.Preprocessing()
    assert make(channels=4).preprocessing.channels == 4
    moe = {"layers": [0], "num_experts": 2}
    model = make(moe=moe, preprocessing=IMAGENET)
    for other in (
        models.load(models.save(model, tmp_path / "m.keras")),
        type(model).from_config(model.get_config()),
        models.set_routing(model, capacity_factor=2.0),
        models.upcycle(make(moe=None, preprocessing=IMAGENET), moe),
    ):
        assert other.preprocessing == IMAGENET
    model.preprocessing = {"mean": 0, "std": 255}
    assert model.preprocessing == data.Preprocessing(0, 255)
    with pytest.raises(ValueError, match="channels=1 for 3"):
        model.preprocessing = data.Preprocessing(channels=1)
    with pytest.raises(ValueError, match="channels=3 for 4"):
        make(channels=4, preprocessing=IMAGENET)


def test_presets_take_one():
    with models.costs.without_weights():
        model = models.from_preset("vit_s16", preprocessing=IMAGENET)
    assert model.preprocessing == IMAGENET


def test_datasets_of_other_models_are_refused():
    model = tiny(moe=None, num_layers=1, preprocessing=IMAGENET)
    model.compile("sgd", "sparse_categorical_crossentropy")
    reads = {"name": "digits", "split": "test[:8]", "image_size": 8}
    reads |= {"batch_size": 4, "training": False}
    wrong = data.load(**reads)
    right = data.load(**reads, preprocessing=model.preprocessing)
    assert wrong.preprocessing == data.Preprocessing()
    words = r"mean=127.5 for \(123.675, .*, std=127.5 for .*=model.preproc"
    for see in (
        lambda: model.fit(wrong, verbose=0),
        lambda: model.fit(right, validation_data=wrong, verbose=0),
        lambda: model.evaluate(wrong, verbose=0),
        lambda: model.predict(wrong, verbose=0),
    ):
        with pytest.raises(ValueError, match=words):
            see()
    model.fit(right, validation_data=right, shuffle=False, verbose=0)
    other = data.load(**reads).map(lambda x, y: (x, y))
    other.preprocessing = "of the user's own"
    model.evaluate(other, verbose=0)
    # The crop of evaluation is the user's choice.
    cropped = data.load(
        **reads, preprocessing=model.preprocessing, test_crop=0.5
    )
    model.evaluate(cropped, verbose=0)


def test_a_model_that_takes_pixels_does_not_warn_of_them():
    model = tiny(moe=None, preprocessing=data.Preprocessing(0, 1))
    model.predict(np.full((2, 8, 8, 3), 255, "uint8"), verbose=0)
    model.predict(np.full((2, 8, 8, 3), 255.0), verbose=0)
    assert model._warns_of_pixels  # A warning is an error in these tests.


def test_loaders_set_it(tmp_path):
    arrays = checkpoints.read(FOLDER / "vit_checkpoint" / "ckpt_1")
    model = models.ViTMoE(
        **checkpoints.vmoe_config(arrays), preprocessing=IMAGENET
    )
    checkpoints.load_vmoe(model, arrays)
    assert model.preprocessing == data.Preprocessing(test_crop=0.875)
    source = tiny(moe=None, preprocessing=IMAGENET)
    source.save(tmp_path / "m.keras")
    source.save_weights(tmp_path / "m.weights.h5")
    for name, expected in (
        ("m.keras", IMAGENET), ("m.weights.h5", data.Preprocessing()),
    ):  # fmt: skip
        model = checkpoints.load(tiny(moe=None), tmp_path / name)
        assert model.preprocessing == expected


def test_a_keras_application_brings_its_own():
    """That of its layer, or of ImageNet, with which it was trained."""
    own = keras.layers.Normalization(mean=[1, 2, 3], variance=[4, 9, 16])
    for layers, expected in (
        ([], IMAGENET),
        ([own], data.Preprocessing((1, 2, 3), (2, 3, 4), test_crop=0.875)),
    ):
        images = keras.Input((8, 8, 3))
        x = images
        for layer in layers:
            x = layer(x)
        found = checkpoints.keras_applications._normalization(
            keras.Model(images, x)
        )
        wanted = data.Preprocessing.of({**found, "test_crop": 0.875})
        assert wanted == expected
