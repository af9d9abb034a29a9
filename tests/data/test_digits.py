"""The embedded digits: their content, and how they come to the disk."""

import json
import os
import pathlib
import random
import signal
import time

import numpy as np
import pytest
import sklearn.datasets
import tensorflow_datasets as tfds

from keras_vmoe import data
from keras_vmoe.data import digits
from keras_vmoe.data.sources import prepared_datasets
from tests.processes import Process

SPLITS = {"train": 1254, "validation": 179, "test": 364}


def read(split):
    """The examples as TFDS itself reads them, without our pipeline."""
    data.info("digits")
    folder = pathlib.Path(digits.cache_dir()) / "digits" / digits.VERSION
    builder = tfds.builder_from_directory(folder)
    return list(tfds.as_numpy(builder.as_dataset(split)))


def test_every_digit_is_as_in_scikit_learn():
    source = sklearn.datasets.load_digits()
    examples = [example for split in SPLITS for example in read(split)]
    indices = [example["index"] for example in examples]
    assert sorted(indices) == list(range(1797))
    for example in examples:
        index = example["index"]
        assert example["label"] == source.target[index]
        expected = np.round(source.images[index] * 255 / 16)
        np.testing.assert_array_equal(example["image"][..., 0], expected)


@pytest.mark.parametrize("split", SPLITS)
def test_splits_are_stratified(split):
    labels = [example["label"] for example in read(split)]
    assert len(labels) == SPLITS[split]
    source = np.bincount(sklearn.datasets.load_digits().target)
    expected = source * len(labels) / 1797
    assert np.abs(np.bincount(labels) - expected).max() < 1.1


def test_splits_are_the_same_for_ever():
    # Figures of the first release. If they change, so must the version.
    parts = digits.split_indices(sklearn.datasets.load_digits().target)
    assert [p[:3].tolist() for p in parts.values()] == FIRST_INDICES
    assert [int(p.sum()) for p in parts.values()] == SUMS


FIRST_INDICES = [[0, 1, 2], [5, 16, 22], [3, 7, 13]]
SUMS = [1140590, 155882, 317234]


def test_files_are_not_sorted_by_class():
    labels = np.array([example["label"] for example in read("train")])
    assert np.mean(labels[1:] == labels[:-1]) < 0.2


@pytest.mark.parametrize("home", [None, "", "own"])
def test_cache_dir(monkeypatch, tmp_path, home):
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = tmp_path / ".cache"
    if home is None:
        monkeypatch.delenv("XDG_CACHE_HOME")
    else:
        expected = tmp_path / home if home else expected
        monkeypatch.setenv("XDG_CACHE_HOME", home and str(expected))
    assert digits.cache_dir() == str(expected / "keras_vmoe" / "datasets")


# Preparing


def test_prepare_leaves_only_the_dataset(tmp_path, capfd):
    digits.prepare(tmp_path / "new" / "folder")
    files = sorted(p.name for p in tmp_path.rglob("*") if p.is_file())
    assert files == [
        "dataset_info.json",
        "digits-test.tfrecord-00000-of-00001",
        "digits-train.tfrecord-00000-of-00001",
        "digits-validation.tfrecord-00000-of-00001",
        "features.json",
    ]
    assert capfd.readouterr().out == ""
    assert prepared_datasets(tmp_path / "new" / "folder") == ["digits:1.0.0"]


def test_prepare_draws_no_random_number_of_the_program(tmp_path):
    random.seed(7)
    expected = random.random()
    random.seed(7)
    digits.prepare(tmp_path)
    assert random.random() == expected


def test_prepare_writes_once(tmp_path, monkeypatch):
    digits.prepare(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(digits, "_write", None)  # Not to be called.
    digits.prepare(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def fast_write(folder):
    """Stands for the two seconds of TFDS where its files do not matter."""
    target = pathlib.Path(folder) / "digits" / digits.VERSION
    target.mkdir(parents=True)
    (target / "dataset_info.json").write_text("{}")


def test_prepare_accepts_the_work_of_a_faster_process(tmp_path, monkeypatch):
    def overtaken(folder):
        fast_write(folder)
        fast_write(tmp_path)

    monkeypatch.setattr(digits, "_write", overtaken)
    digits.prepare(tmp_path)
    assert os.listdir(tmp_path) == ["digits"]


def test_prepare_sweeps_what_killed_processes_left(tmp_path, monkeypatch):
    folder = tmp_path / "digits"
    old, new, other = ".partial.1.0.0.old", ".partial.1.0.0.new", "other"
    long_ago = time.time() - 25 * 3600
    for name in (old, new, other):
        (folder / name).mkdir(parents=True)
        if name != new:
            os.utime(folder / name, (long_ago, long_ago))
    monkeypatch.setattr(digits, "_write", fast_write)
    digits.prepare(tmp_path)
    assert sorted(os.listdir(folder)) == [new, digits.VERSION, other]


def test_prepare_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(folder):
        pathlib.Path(folder, "half").touch()
        raise OSError("disk full")

    monkeypatch.setattr(digits, "_write", fail)
    with pytest.raises(OSError, match="disk full"):
        digits.prepare(tmp_path)
    assert not list(tmp_path.iterdir())


def test_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(**options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    words = r"can be written to. Received: .*digits. \(Permission denied\)"
    with pytest.raises(PermissionError, match=words):
        data.load("digits", "train", 8, 4, True, str(tmp_path))


def test_folder_that_is_a_file(tmp_path):
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(OSError, match="can be written to. Received"):
        data.info("digits", path)


def test_digits_that_are_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "_write", fast_write)
    text = str(pytest.raises(OSError, data.info, "digits", tmp_path).value)
    assert f"Received: name='digits', data_dir={str(tmp_path)!r}" in text
    assert f"Delete the folder {str(tmp_path / 'digits')!r}" in text


# Processes: two that start together, and one that is killed at work

TOGETHER = """
import hashlib, pathlib, sys, time
from keras_vmoe.data import digits  # Imports TensorFlow.
from keras_vmoe import data
folder, me, other = map(pathlib.Path, sys.argv[1:])
me.touch()
while not other.exists():
    time.sleep(0.01)
train = data.load("digits", "train", 8, 64, True, folder,
                  seed=5, augmentation=data.Augmentation(crop_padding=2))
digest = hashlib.sha256()
for _ in range(2):
    for images, labels in train.as_numpy_iterator():
        digest.update(images.tobytes() + labels.tobytes())
print(digest.hexdigest())
"""

KILLED = """
import os, signal, sys
from keras_vmoe import data
from keras_vmoe.data import digits
whole = digits.Digits._generate_examples
def half(self, *args):
    for number, example in enumerate(whole(self, *args)):
        if number == 100:
            os.kill(os.getpid(), signal.SIGKILL)
        yield example
digits.Digits._generate_examples = half
data.info("digits", sys.argv[1])
"""


def test_two_processes_prepare_at_once_and_train_alike(tmp_path):
    ready = [tmp_path / "a", tmp_path / "b"]
    folder = tmp_path / "datasets"
    both = [
        Process("-c", TOGETHER, folder, *order)
        for order in (ready, ready[::-1])
    ]
    digests = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert len(digests[0].strip()) == 64
    assert digests[0] == digests[1]
    assert os.listdir(folder) == ["digits"]


def test_killed_process_leaves_nothing_that_looks_whole(tmp_path):
    process = Process("-c", KILLED, tmp_path)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    (leftover,) = (tmp_path / "digits").iterdir()
    assert leftover.name.startswith(".partial.1.0.0.")
    assert prepared_datasets(tmp_path) == []

    assert data.info("digits", tmp_path).splits == SPLITS
    assert prepared_datasets(tmp_path) == ["digits:1.0.0"]
    info = tmp_path / "digits" / digits.VERSION / "dataset_info.json"
    assert json.loads(info.read_text())["name"] == "digits"
