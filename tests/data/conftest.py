"""Tiny TFDS datasets, written once, and a cache that is not the user's."""

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

NUM_CLASSES = 5


def write(folder, name, image, images, labels=None, num_shards=1, label=None):
    """Writes arrays as a TFDS dataset, in their order, 3/4 of them as train."""
    features = {"image": image}
    if labels is not None:
        label = label or tfds.features.ClassLabel(num_classes=NUM_CLASSES)
        features["label"] = label
    examples = []
    for i in range(len(images)):
        example = {"image": images[i]}
        if labels is not None:
            example["label"] = int(labels[i])
        examples.append((i, example))
    cut = 3 * len(images) // 4
    tfds.dataset_builders.store_as_tfds_dataset(
        name=name,
        version="1.0.0",
        features=tfds.features.FeaturesDict(features),
        split_datasets={"train": examples[:cut], "test": examples[cut:]},
        data_dir=folder,
        disable_shuffling=True,
        download_config=tfds.download.DownloadConfig(num_shards=num_shards),
    )


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """The cache folder of the session, where `digits` is written once."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def gray_images():
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (48, 28, 28, 1), "uint8")


@pytest.fixture(scope="session")
def color_images():
    """Images whose sizes differ."""
    generator = np.random.default_rng(1)
    return [
        generator.integers(0, 256, (6 + i, 12 - i, 3), "uint8")
        for i in range(8)
    ]


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory, gray_images, color_images):
    """A folder of datasets; `labels` are `i % 5` in the order of the files."""
    folder = tmp_path_factory.mktemp("datasets")
    image = tfds.features.Image
    integer = tfds.features.Tensor(shape=(), dtype=np.int64)
    labels = np.arange(48) % NUM_CLASSES
    few = gray_images[:8]
    gray = image(shape=(28, 28, 1))
    tensor = tfds.features.Tensor(shape=(28, 28, 1), dtype=np.float32)

    write(folder, "gray", gray, gray_images, labels, num_shards=3)
    write(folder, "color", image(), color_images, labels)
    deep = image(shape=(28, 28, 1), dtype=np.uint16, encoding_format="png")
    write(folder, "deep", deep, few.astype("uint16") * 257, labels)
    floats = image(shape=(28, 28, 1), dtype=np.float32)
    unit = few.astype("float32") / 255
    write(folder, "floats", floats, unit, labels)
    write(folder, "tensors", tensor, unit, labels)
    write(folder, "too_bright", tensor, unit * 255, labels)
    write(folder, "unlabeled", gray, few)
    wrong = np.array([0, 1, 2, 12, 3, 4, -1, 0])  # 12 in train, -1 in test.
    write(folder, "wrong_labels", gray, few, wrong, label=integer)
    # Files longer than the 16 examples that TFDS by default takes in turn.
    numbers = np.arange(160, dtype="uint8").reshape(160, 1, 1, 1)
    pixel = image(shape=(1, 1, 1))
    write(folder, "long", pixel, numbers, numbers.ravel() % 5, num_shards=3)
    text = tfds.features.Text()
    write(folder, "text", text, ["a", "b", "c", "d"], labels)
    return folder


@pytest.fixture
def in_tf_data():
    """Applies a function to one image inside `tf.data`, shape unknown."""

    def apply(function, image):
        image = tf.convert_to_tensor(image)
        signature = tf.TensorSpec([None, None, image.shape[-1]], image.dtype)
        dataset = tf.data.Dataset.from_generator(
            lambda: [image], output_signature=signature
        )
        return next(iter(dataset.map(function)))

    return apply
