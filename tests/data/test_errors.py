"""Bad input: what each error says, and that it says it early."""

import os
import shutil
import socket

import pytest
import tensorflow as tf

from keras_vmoe import data
from keras_vmoe.data import tensorflow_runtime
from keras_vmoe.data.sources import prepared_datasets

DATASETS = [
    "color:1.0.0",
    "deep:1.0.0",
    "floats:1.0.0",
    "gray:1.0.0",
    "long:1.0.0",
    "tensors:1.0.0",
    "text:1.0.0",
    "too_bright:1.0.0",
    "unlabeled:1.0.0",
    "wrong_labels:1.0.0",
]


def load(data_dir, name="gray", split="train", **options):
    arguments = {"image_size": 8, "batch_size": 4, "training": False}
    return data.load(name, split, data_dir=data_dir, **{**arguments, **options})


def message_of(error, function, *args, **kwargs):
    """Calls a function that must fail, and returns what it says."""
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    return str(caught.value)


@pytest.fixture
def copy(data_dir, tmp_path):
    """A folder with its own copy of the dataset `gray`, to be broken."""
    shutil.copytree(data_dir / "gray", tmp_path / "gray")
    return tmp_path


@pytest.mark.parametrize("function", [load, lambda d, name: data.info(name, d)])
def test_unknown_dataset(data_dir, function):
    text = message_of(ValueError, function, str(data_dir), name="cifar1O")
    assert 'must be "digits" or one known to TFDS' in text
    assert f"Received: name='cifar1O', data_dir={str(data_dir)!r}" in text
    assert f"Prepared in [{str(data_dir)!r}]: {DATASETS}" in text
    assert "'cifar10'" in text.split("Did you mean ")[1]
    assert "tfds.builder(name, data_dir=...).download_and_prepare()" in text


@pytest.mark.parametrize(
    "name, nearest", [("graay", "gray"), ("digts", "digits")]
)
def test_unknown_dataset_near_one_of_ours(data_dir, name, nearest):
    text = message_of(ValueError, load, data_dir, name=name)
    assert repr(nearest) in text.split("Did you mean ")[1]


@pytest.mark.parametrize("name", ["a b", "", "hub:gray", 3, None])
def test_name_that_is_none(data_dir, name):
    text = message_of(ValueError, load, data_dir, name=name)
    assert f"Received: name={name!r}" in text


def test_known_dataset_that_is_not_prepared(data_dir):
    text = message_of(ValueError, load, str(data_dir), name="mnist")
    assert "must be prepared before it is loaded" in text
    assert "Received: name='mnist'" in text
    command = (
        "import tensorflow_datasets as tfds; tfds.builder('mnist', "
        f"data_dir={str(data_dir)!r}).download_and_prepare()"
    )
    assert command in text
    assert not (data_dir / "mnist").exists()


def test_version_that_is_not_prepared(data_dir):
    text = message_of(ValueError, load, data_dir, name="gray:2.0.0")
    assert "Received: name='gray:2.0.0'" in text
    assert "'gray:1.0.0'" in text


@pytest.mark.parametrize(
    "split", ["trian", "train[:99]", "train[", "", None, ["train"], "all[:3]"]
)
def test_unknown_split(data_dir, split):
    text = message_of(ValueError, load, data_dir, split=split)
    assert "must be made of the splits test (12), train (36)" in text
    assert f"Received: split={split!r} of name='gray'" in text


@pytest.mark.parametrize("name", ["unlabeled", "text"])
@pytest.mark.parametrize("function", [load, lambda d, name: data.info(name, d)])
def test_dataset_without_image_and_label(data_dir, name, function):
    text = message_of(ValueError, function, data_dir, name=name)
    assert "must have an image (H, W, channels) and an integer label" in text
    keys = ["image"] if name == "unlabeled" else ["image", "label"]
    assert f"Received: name={name!r} with features {keys}" in text
    assert "Prepare it with such features" in text


# The data folder


def test_data_dir_that_does_not_exist(tmp_path):
    path = str(tmp_path / "nowhere")
    text = message_of(FileNotFoundError, load, path)
    assert "`data_dir` must be a readable folder" in text
    assert f"Received: data_dir={path!r} (No such file" in text
    assert "Check its spelling" in text


def test_data_dir_that_is_a_file(tmp_path):
    path = tmp_path / "file"
    path.touch()
    text = message_of(NotADirectoryError, load, path)
    assert f"Received: data_dir={str(path)!r} (Not a directory)" in text


def test_data_dir_that_may_not_be_read(tmp_path, monkeypatch):
    # By a patch: for root, who runs many containers, all is readable.
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "listdir", refuse)
    text = message_of(PermissionError, load, tmp_path)
    assert f"Received: data_dir={str(tmp_path)!r} (Permission denied)" in text
    assert "permissions" in text


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("content", [None, "", "{", '{"name": 3}'])
def test_description_that_is_broken(copy, file, content):
    path = copy / "gray" / "1.0.0" / file
    path.unlink() if content is None else path.write_text(content)
    text = message_of(OSError, load, copy)
    assert "must be complete and readable" in text
    assert f"Received: name='gray', data_dir={str(copy)!r}" in text
    assert f"Delete the folder {str(copy / 'gray')!r} and prepare" in text


def shards(folder, split):
    return sorted((folder / "gray" / "1.0.0").glob(f"gray-{split}.*"))


def test_file_that_is_missing(copy):
    path = shards(copy, "train")[1]
    path.unlink()
    text = message_of(OSError, load, copy)
    assert "must be complete and readable" in text
    assert f"Received: path={str(path)!r} (the file is missing)" in text
    assert f"Delete the folder {str(path.parent)!r}" in text


def test_record_that_is_truncated(copy):
    path = shards(copy, "train")[1]
    path.write_bytes(path.read_bytes()[:-1])
    text = message_of(OSError, load, copy)
    reason = "11 whole records instead of 12"
    assert f"Received: path={str(path)!r} ({reason})" in text
    assert "prepare the dataset again" in text


def test_whole_records_that_are_missing(copy):
    first, second, _ = shards(copy, "train")
    second.write_bytes(b"")
    text = message_of(OSError, load, copy)
    assert f"path={str(second)!r} (0 whole records instead of 12)" in text
    assert str(first) not in text


def test_only_the_split_that_is_read_has_to_be_whole(copy):
    shards(copy, "train")[0].unlink()
    assert len(load(copy, split="test")) == 3
    with pytest.raises(OSError, match="the file is missing"):
        load(copy, split="test+train[:3]")


def test_whole_files_of_an_unusual_size_are_accepted(copy):
    # Other writers count the bytes differently; then records are counted.
    info = copy / "gray" / "1.0.0" / "dataset_info.json"
    text = info.read_text()
    info.write_text(text.replace('"numBytes": "', '"numBytes": "1'))
    assert info.read_text() != text
    assert len(load(copy)) == 9


# Labels and pixels, known only when they are read


@pytest.mark.parametrize("split, label", [("train", 12), ("test", -1)])
@pytest.mark.parametrize("training", [True, False])
def test_label_out_of_range(data_dir, split, label, training):
    options = {"batch_size": 2, "training": training, "num_classes": 10}
    dataset = load(data_dir, "wrong_labels", split, **options)
    text = message_of(tf.errors.InvalidArgumentError, list, dataset)
    assert "Labels must lie in [0, 10)" in text
    expected = f"label={label} with num_classes=10 in the dataset wrong_labels"
    assert f"Received: {expected}" in text
    assert "Pass the true num_classes" in text


def test_label_in_a_range_that_is_wide_enough(data_dir):
    dataset = load(data_dir, "wrong_labels", num_classes=13)
    assert sum(len(labels) for _, labels in dataset) == 6


def test_pixels_out_of_range(data_dir):
    dataset = load(data_dir, "too_bright")
    text = message_of(tf.errors.InvalidArgumentError, list, dataset)
    assert "Pixels of type float32 must lie in [0, 1]" in text
    assert "Received: lowest and highest pixel=[0 255]" in text


def test_num_classes_that_is_not_known(data_dir):
    text = message_of(ValueError, load, data_dir, name="wrong_labels")
    assert "`num_classes` must be given" in text
    assert "Received: num_classes=None with name='wrong_labels'" in text


@pytest.mark.parametrize("num_classes", [4, 0, -1])
def test_num_classes_that_is_too_small(data_dir, num_classes):
    text = message_of(ValueError, load, data_dir, num_classes=num_classes)
    assert "must be at least the number of classes of the dataset, 5" in text
    assert f"Received: num_classes={num_classes} with name='gray'" in text


# Arguments


@pytest.mark.parametrize(
    "argument, value, lowest",
    [
        ("batch_size", 0, 1),
        ("batch_size", 2.5, 1),
        ("batch_size", None, 1),
        ("shuffle_buffer", 0, 1),
        ("epoch", -1, 0),
        ("seed", None, 0),
        ("seed", -1, 0),
    ],
)
def test_numbers_out_of_range(data_dir, argument, value, lowest):
    text = message_of(ValueError, load, data_dir, **{argument: value})
    assert f"`{argument}` must be an integer of at least {lowest}" in text
    assert f"Received: {argument}={value!r}" in text


@pytest.mark.parametrize(
    "options",
    [
        {"split": "train[:0]"},
        {"split": "train[:3]", "training": True},
        {"split": "train[:3]", "drop_remainder": True},
    ],
)
def test_split_without_a_batch(data_dir, options):
    text = message_of(ValueError, load, data_dir, **options)
    assert "must hold at least one batch" in text
    assert f"Received: split={options['split']!r} of name='gray'" in text
    least = 1 if options == {"split": "train[:0]"} else 4
    assert f"of at least {least} examples" in text


# The network, and the listing behind the errors


def test_nothing_reaches_for_the_network(data_dir, monkeypatch):
    def refuse(*args):
        raise AssertionError(f"network: {args}")

    for function in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, function, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    data.info("digits")
    assert len(load(data_dir)) == 9
    for name in ("mnist", "nowhere", "huggingface:mnist", "kaggle:x"):
        with pytest.raises(ValueError, match="Received: name="):
            load(data_dir, name=name)


def test_prepared_datasets_are_names_that_load_accepts(data_dir):
    assert prepared_datasets(data_dir) == DATASETS
    for name in ("gray:1.0.0", "color:1.0.0"):
        assert len(load(data_dir, name=name)) > 0


# TensorFlow and the GPUs


class FakeConfig:
    """Records what is hidden, or refuses as TensorFlow does once started."""

    def __init__(self, error=None):
        self.hidden = []
        self.error = error
        self.config = self

    def set_visible_devices(self, devices, kind):
        if self.error:
            raise self.error
        self.hidden.append((devices, kind))


def test_gpus_are_hidden_from_tensorflow():
    fake = FakeConfig()
    tensorflow_runtime.hide_gpus(fake)
    assert fake.hidden == [([], "GPU")]


def test_gpus_stay_where_tensorflow_has_started():
    fake = FakeConfig(RuntimeError("already initialized"))
    tensorflow_runtime.hide_gpus(fake)
    assert fake.hidden == []


@pytest.mark.parametrize(
    "backend, expected", [("jax", 1), ("torch", 1), ("tensorflow", 0)]
)
def test_gpus_are_hidden_under_other_backends(monkeypatch, backend, expected):
    calls = []
    monkeypatch.setattr("keras.backend.backend", lambda: backend)
    monkeypatch.setattr(tensorflow_runtime, "hide_gpus", calls.append)
    tensorflow_runtime.import_tensorflow.__wrapped__()
    assert len(calls) == expected
