"""Feature maps, another head, images of another size."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_vmoe import checkpoints
from keras_vmoe import data
from keras_vmoe import models
from tests.harness import first_everywhere
from tests.harness import randomize
from tests.models.definitions import images_of
from tests.models.definitions import tiny

once = pytest.mark.backends("torch")


def convnext(**settings):
    sizes = {"depths": (1, 2), "dims": (4, 8), "image_size": 16}
    moe = {"layers": [2], "num_experts": 2}
    return models.ConvNeXtMoE(
        num_classes=10, **{**sizes, "moe": moe, **settings}
    )


def arrays_of(model):
    return {w.path: ops.convert_to_numpy(w) for w in model.weights}


@pytest.mark.parametrize("before", first_everywhere([3, 0]))
def test_maps_of_a_vit_are_its_tokens(before):
    """Without a class token and registers."""
    more = {"pooling": "token", "num_registers": 2} if before else {}
    model = randomize(tiny(**{"pooling": "gap", "image_size": (8, 12), **more}))
    images = np.random.default_rng(0).normal(size=(2, 8, 12, 3))
    images = images.astype("float32")
    found = models.features(model).predict(images, verbose=0)
    assert list(found) == ["block_0", "block_1", "block_2", "block_3", "output"]
    np.testing.assert_allclose(
        found["output"], model.predict(images, verbose=0), atol=1e-6
    )
    end = model.get_layer("block_2_mlp_add").output
    tokens = keras.Model(model.input, end).predict(images, verbose=0)
    tokens = tokens[:, before:]
    np.testing.assert_array_equal(
        found["block_2"].reshape(tokens.shape), tokens
    )
    assert found["block_2"].shape == (2, 2, 3, tokens.shape[-1])


def test_maps_of_a_convnext_are_its_stages():
    model = randomize(convnext())
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3))
    images = images.astype("float32")
    found = models.features(model).predict(images, verbose=0)
    shapes = {name: x.shape for name, x in found.items()}
    assert shapes == {
        "stage_0": (2, 4, 4, 4), "stage_1": (2, 2, 2, 8), "output": (2, 10),
    }  # fmt: skip
    some = models.features(model, [-1, "block_0"]).predict(images, verbose=0)
    np.testing.assert_array_equal(some["block_2"], found["stage_1"])
    np.testing.assert_array_equal(some["block_0"], found["stage_0"])


def test_a_head_of_ones_own_trains_through_the_maps():
    """The losses of the routers, too."""
    model = randomize(convnext())
    inside = models.features(model, ["stage_0"])
    images = keras.Input((16, 16, 3))
    maps = keras.layers.Conv2D(2, 1)(inside(images)["stage_0"])
    maps = keras.layers.GlobalAveragePooling2D()(maps)
    whole = keras.Model(images, maps + inside(images)["output"][:, :2])
    whole.compile("sgd", "mse")
    before = arrays_of(model)
    x = np.random.default_rng(0).normal(size=(4, 16, 16, 3))
    whole.fit(x.astype("float32"), np.zeros((4, 2)), verbose=0)
    for name, array in arrays_of(model).items():
        assert not np.array_equal(array, before[name]) or "seed" in name, name


@once
def test_blocks_that_are_not_there():
    for model, layer, words in (
        (tiny(), 4, "'block_4'"),
        (tiny(), -5, "'block_-5'"),
        (tiny(), "blok_3", "Did you mean 'block_3'"),
        (tiny(), "stage_0", "must be among"),
        (convnext(), "stage_2", "must be among"),
    ):
        with pytest.raises(ValueError, match=words):
            models.features(model, [layer])
    for change in (
        models.features,
        lambda x: models.with_head(x, 3),
        lambda x: models.with_image_size(x, 8),
    ):
        with pytest.raises(TypeError, match="must be a ViTMoE, a ConvNeXt"):
            change(keras.models.clone_model(tiny()))


@once
@pytest.mark.parametrize("make", [tiny, convnext])
@pytest.mark.parametrize("num_classes", [3, None])
def test_another_head(make, num_classes):
    wanted = data.Preprocessing.imagenet()
    model = randomize(make(preprocessing=wanted))
    model.get_layer("norm").trainable = False
    model.get_layer("head").trainable = False
    found = models.with_head(model, num_classes)
    before = arrays_of(model)
    for name, array in arrays_of(found).items():
        if not name.startswith("head/"):
            np.testing.assert_array_equal(array, before[name], err_msg=name)
    assert found.num_classes == num_classes
    assert found.preprocessing == wanted
    assert not found.get_layer("norm").trainable
    if num_classes is not None:
        assert found.output_shape == (None, 3)
        assert found.get_layer("head").trainable  # It is new.
    again = models.with_head(found, 10)
    assert again.output_shape == (None, 10)
    with pytest.raises(ValueError, match="num_classes=0"):
        models.with_head(model, 0)


@once
def test_another_image_size():
    model = tiny(image_size=(8, 16), pooling="token", num_registers=2)
    randomize(model)
    found = models.with_image_size(model, (12, 8))
    expected, before = arrays_of(model), arrays_of(found)
    table = checkpoints.resize_positions(
        expected.pop("positions/embedding"), (2, 4), (3, 2), 1
    )
    np.testing.assert_array_equal(before.pop("positions/embedding"), table)
    for name, array in before.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    found.predict(images_of(1)[:, :, :8].repeat(2, 1)[:, :12], verbose=0)
    with pytest.raises(ValueError, match="image"):
        models.with_image_size(model, 9)
    other = models.with_image_size(randomize(convnext()), (32, 16))
    assert other.input_shape == (None, 32, 16, 3)


@pytest.mark.backends("tensorflow", "torch")
@pytest.mark.parametrize("router", first_everywhere(["soft", "top_k"]))
def test_a_convnext_for_images_of_any_size(router):
    """The same as one for each size, and trained on several."""
    moe = {"layers": [2], "num_experts": 2, "router": router}
    if router == "soft":
        moe["num_slots"] = 3
    model = randomize(convnext(moe=moe))
    open_model = models.with_image_size(model, None)
    assert open_model.input_shape == (None, None, None, 3)
    generator = np.random.default_rng(0)
    for size in ((16, 16), (32, 16), (8, 24)):
        images = generator.normal(size=(3, *size, 3)).astype("float32")
        fixed = models.with_image_size(open_model, size)
        np.testing.assert_allclose(
            open_model.predict(images, verbose=0),
            fixed.predict(images, verbose=0),
            atol=1e-5,
        )
        maps = models.features(open_model)(images)
        rows, columns = size[0] // 8, size[1] // 8
        assert tuple(maps["stage_1"].shape) == (3, rows, columns, 8)
    open_model.compile("sgd", "mse")
    open_model.fit(images, np.zeros((3, 10)), verbose=0)


@once
def test_what_needs_a_size_says_so():
    model = convnext(image_size=None)
    with pytest.raises(ValueError, match="image_size=None"):
        tiny(image_size=None)
    with pytest.raises(ValueError, match="sizes of an image must be known"):
        models.cost(model)
