"""`robustness` on tiny data sets of the schemas that TFDS gives the real ones.

The model is a fixed one: an image's first pixel is the class that it predicts.
"""

import keras
import numpy as np
import pytest
import tensorflow_datasets as tfds
from keras import ops

from keras_vmoe import cli
from keras_vmoe import data
from keras_vmoe import evaluation
from keras_vmoe import models
from keras_vmoe.evaluation import imagenet
from keras_vmoe.evaluation import imagenet_sets

pytestmark = pytest.mark.backends("torch")  # Nothing depends on it.


def image_of(*classes):
    """An image that is predicted to be the first class, then the second."""
    image = np.zeros((2, 2, 3), "uint8")
    for i, c in enumerate(classes):
        image[0, i, :2] = divmod(c, 256)
    return image


class FirstPixel(keras.layers.Layer):
    def call(self, images):
        pixels = images[:, 0, :, 0] * 256 + images[:, 0, :, 1]
        classes = ops.cast(ops.round(pixels), "int32")
        first, second = (ops.one_hot(classes[:, i], 1000) for i in (0, 1))
        return 2 * first + second


@pytest.fixture(scope="module")
def model():
    inputs = keras.Input((2, 2, 3))
    model = keras.Model(inputs, FirstPixel()(inputs))
    model.preprocessing = data.Preprocessing(mean=0.0, std=1.0)
    return model


def write(folder, name, split, examples, label="label", names=None):
    """Of pairs (image, label) or triples with ReaL's labels."""
    dataset, _, config = name.partition("/")
    names = names or imagenet_sets.wordnet_ids()
    features = {
        "image": tfds.features.Image(shape=(2, 2, 3), encoding_format="png"),
        label: tfds.features.ClassLabel(names=names),
    }
    if label == "original_label":
        features["real_label"] = tfds.features.Sequence(
            tfds.features.ClassLabel(names=names)
        )
    keys = list(features)
    tfds.dataset_builders.store_as_tfds_dataset(
        name=dataset,
        config=config or None,
        version="1.0.0",
        features=tfds.features.FeaturesDict(features),
        split_datasets={
            split: [
                (i, dict(zip(keys, example, strict=True)))
                for i, example in enumerate(examples)
            ]
        },
        data_dir=folder,
        disable_shuffling=True,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    write(
        folder, "imagenet2012_real", "validation",
        [(image_of(5), 5, [5]), (image_of(5), 5, [6, 7]),
         (image_of(5), 5, []), (image_of(7), 5, [6, 7])],
        "original_label",
    )  # fmt: skip
    write(
        folder, "imagenet_v2/matched-frequency", "test",
        [(image_of(300), 300), (image_of(301), 300)],
    )  # fmt: skip
    # 0 is no class of ImageNet-A, 6 and 11 are.
    write(
        folder, "imagenet_a", "test",
        [(image_of(0, 6), 6), (image_of(6, 0), 6), (image_of(11, 6), 6)],
    )  # fmt: skip
    return folder


def test_scores_by_hand(folder, model):
    found = evaluation.robustness(model, folder, batch_size=2)
    assert list(found.scores) == ["ReaL", "V2", "A"]
    real, v2, a = found.scores.values()
    assert (real.num_images, real.accuracy) == (3, pytest.approx(2 / 3))
    assert (v2.num_images, v2.accuracy, v2.all_classes) == (2, 0.5, None)
    assert a.accuracy == pytest.approx(2 / 3)
    assert a.all_classes == pytest.approx(1 / 3)
    assert found.corruption_error is None
    assert {"ImageNet", "R", "C fog 1"} <= set(found.absent)
    table = imagenet_sets.robustness_table(found, "vit_s16")
    assert "paper, 21k" in table and "19.8" in table and "38.9" in table
    assert "linear probe 81.7, full head (0-shot) 44.2" in table
    assert "66.7" in table and "33.3" in table
    assert "not prepared: ImageNet, V2 threshold" in table
    assert "75 of C's 75" in table


def test_a_head_of_more_classes(folder, model):
    ids = imagenet_sets.wordnet_ids()
    # Class 300 is missing; a class that is none of ImageNet's is the best.
    names = ["n99999999", *(x for x in ids if x != ids[300])]
    x = model.output
    other = 3 * ops.cast(x[:, 11:12] > 1, "float32")
    parts = [other, x[:, :300], x[:, 301:]]
    wide = keras.Model(model.input, ops.concatenate(parts, axis=-1))
    wide.preprocessing = model.preprocessing
    with pytest.warns(UserWarning, match="lacks 1 of ImageNet's 1000 classes"):
        found = evaluation.robustness(wide, folder, class_names=names)
    with pytest.raises(ValueError, match="1000 names, 1 of them different"):
        evaluation.robustness(wide, folder, class_names=names[:1] * 1000)
    assert found.scores["V2"].accuracy == 0, "300 cannot be predicted"
    a = found.scores["A"]
    assert a.accuracy == pytest.approx(2 / 3)
    assert a.full_head == pytest.approx(1 / 3), "6 alone is best of all"
    with pytest.raises(ValueError, match="1000 classes, 2 class_names"):
        evaluation.robustness(model, folder, class_names=["a", "b"])


def test_mean_corruption_error_of_all_sets(tmp_path, model):
    for i, name in enumerate(imagenet.ALEXNET_ERROR):
        for severity in range(1, 6):
            # One of two images is right, of the first corruption none.
            wrong = image_of(1 if i else 2)
            examples = [(image_of(2), 1), (wrong, 1)]
            dataset = f"imagenet2012_corrupted/{name}_{severity}"
            write(tmp_path, dataset, "validation", examples)
    found = evaluation.robustness(model, tmp_path)
    errors = [[1.0] * 5] + [[0.5] * 5] * 14
    errors = dict(zip(imagenet.ALEXNET_ERROR, errors, strict=True))
    expected = imagenet.mean_corruption_error(errors)
    assert found.corruption_error == pytest.approx(expected)
    table = imagenet_sets.robustness_table(found)
    assert f"{100 * expected:.1f}" in table
    assert "C gaussian_noise, 5 of 5              10         0.0" in table
    assert "of 1000" not in table and "full head" not in table


def test_what_is_measured_is_kept(folder, model):
    """A model that gives NaN for the last set."""
    x = model.output
    spoiled = keras.Model(
        model.input, x + ops.where(x[:, 11:12] > 1, float("nan"), 0.0)
    )
    spoiled.preprocessing = model.preprocessing
    seen = []
    with pytest.raises(ValueError, match="Logits must be finite"):
        evaluation.robustness(
            spoiled, folder, on_score=lambda name, score: seen.append(name)
        )
    assert seen == ["ReaL", "V2"]


def test_labels_that_are_not_imagenets(tmp_path, model):
    write(tmp_path, "imagenet_r", "test", [(image_of(1), 1)],
          names=[f"class {i}" for i in range(1000)])  # fmt: skip
    words = "must be ImageNet's 1000 WordNet ids.*imagenet_r with 1000 classes"
    with pytest.raises(ValueError, match=words):
        evaluation.robustness(model, tmp_path)


def test_nothing_is_prepared(tmp_path, model):
    with pytest.raises(
        ValueError, match="must be prepared. Received: data_dir"
    ):
        evaluation.robustness(model, tmp_path)


def test_the_command(folder, tmp_path, capsys):
    model = models.ConvNeXtMoE((1,), (8,), num_classes=1000, image_size=32)
    path = tmp_path / "model.keras"
    models.save(model, path)
    table = tmp_path / "table.csv"
    arguments = ["robustness", str(path), f"--data_dir={folder}"]
    assert cli.main([*arguments, "--preset=vit_b17"]) == 1
    assert "The nearest names: vit_b16" in capsys.readouterr().err
    arguments += ["--preset=vit_b16", f"--csv={table}"]
    assert cli.main(arguments) == 0
    assert "56.0" in capsys.readouterr().out, "ImageNet-A in the paper"
    assert table.read_text().count("\n") == 4


def test_images_that_are_of_no_class_of_their_set(tmp_path, model):
    write(tmp_path, "imagenet_a", "test", [(image_of(0), 0), (image_of(6), 6)])
    with pytest.warns(UserWarning, match="1 images of classes .* such as 0"):
        found = evaluation.robustness(model, tmp_path)
    assert found.scores["A"].accuracy == 0.5
