"""Images and files that are corrupt: named, counted, skipped if asked to."""

import pathlib
import shutil
import warnings

import numpy as np
import PIL.Image
import pytest
import tensorflow as tf

from keras_vmoe import data
from keras_vmoe.data import _corruption
from keras_vmoe.data.folders import ImageFolder

BAD = 5  # Number of the image that is no JPEG.
BROKEN = 16  # Number of the record with a flipped bit.


@pytest.fixture
def folder(tmp_path):
    """Sixteen JPEGs of two classes, one of them corrupt, and two for tests."""
    for split, count in (("train", 16), ("test", 2)):
        for i in range(count):
            path = tmp_path / split / "ab"[i % 2] / f"{i:02}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.full((20 + i, 30, 3), 10 * i, "uint8")
            content = tf.io.encode_jpeg(pixels).numpy()
            bad = split == "train" and i == BAD
            path.write_bytes(content[: 100 if bad else None])
    return tmp_path


@pytest.fixture
def flipped(data_dir, tmp_path):
    """A copy of `gray` with a flipped bit in record 4 of the second file."""
    shutil.copytree(data_dir / "gray", tmp_path / "gray")
    path = sorted((tmp_path / "gray" / "1.0.0").glob("gray-train.*"))[1]
    records = [x.numpy() for x in tf.data.TFRecordDataset(str(path))]
    place = sum(16 + len(x) for x in records[:4]) + 12 + len(records[4]) // 2
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    return tmp_path, path


def load(folder, split="train", training=True, batch=4, **options):
    return data.load(
        "image_folder", split, 16, batch, training, folder, **options
    )


def labels_of(dataset):
    return np.concatenate([y for _, y in dataset.as_numpy_iterator()])


# Folders of images.


def test_a_folder_is_a_dataset(folder):
    info = data.info("image_folder", folder)
    assert info.class_names == ("a", "b")
    assert info.splits == {"train": 16, "test": 2}
    images, labels = next(iter(load(folder, "test", False)))
    assert images.shape == (2, 16, 16, 3)
    np.testing.assert_array_equal(labels, [0, 1])


def test_slices_and_order_of_a_folder(folder):
    (folder / "train" / "b" / "05.jpg").unlink()
    labels = labels_of(load(folder, "train[:50%]+test", False, batch=5))
    assert np.bincount(labels[:-2]).tolist() == [4, 4]
    np.testing.assert_array_equal(labels[-2:], [0, 1])
    kwargs = {"skip_corrupt": True, "seed": 3, "batch": 2}
    kwargs["shuffle_buffer"] = 1  # The folder shuffles all of it.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, again, other = (
            labels_of(load(folder, epoch=epoch, **kwargs))
            for epoch in (0, 0, 1)
        )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_a_slice_has_its_share_of_each_class(tmp_path):
    """Seventeen images of three classes, as on every machine."""
    sizes = {"cat": 8, "dog": 7, "fox": 2}
    for label, size in sizes.items():
        (tmp_path / "train" / label).mkdir(parents=True)
        for i in range(size):
            image = tf.zeros((4, 4, 3), tf.uint8)
            path = tmp_path / "train" / label / f"{i}.png"
            tf.io.write_file(str(path), tf.io.encode_png(image))
    for folder in (tmp_path, tmp_path / "train"):  # Without splits: all.
        counts = [
            np.bincount(labels_of(load(folder, split, False)), minlength=3)
            for split in ("train[:50%]", "train[50%:]")
        ]
        assert [x.tolist() for x in counts] == [[4, 3, 1], [4, 4, 1]]
        assert data.info("image_folder", folder).splits == {"train": 17}
    paths = map(pathlib.Path, ImageFolder(folder).files("train")[0])
    first = [f"{x.parent.name}{x.stem}" for x in paths][:6]
    assert first == ["cat1", "dog5", "cat2", "dog0", "fox0", "cat4"]


def test_hidden_folders_and_files_that_are_no_images(tmp_path):
    for path in (
        *(".ipynb_checkpoints/1.png", "dog/.DS_Store", "dog/sub.png/1.png"),
        *("__pycache__/1.pyc", "@eaDir/1.png", "lost+found/1.png", "notes.txt"),
        *("../__MACOSX/train/1.png", "../$RECYCLE.BIN/a/1.png", "dog/notes"),
        *("beside.png", "dog/notes.txt", "empty/.keep", "../test/dog/@eaDir/1"),
        "../test/notes.txt",
    ):
        (tmp_path / "train" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / path).write_text("none")
    (tmp_path / "train/cat").mkdir()
    picture = np.full((5, 7, 3), 200, "uint8")
    kinds = {"a.JPG": "jpeg", "b.webp": "webp", "c.Gif": "gif", "d.bmp": "bmp",
             "e.apng": "png", "f.jfif": "jpeg", "g.jpe": "jpeg", "h.png": "png",
             "gif.jpg": "gif"}  # fmt: skip
    for name, kind in kinds.items():
        PIL.Image.fromarray(picture).save(tmp_path / "train/cat" / name, kind)
    said = ("2 .jpg, ", " taken, ", "1 .txt", "1 folders in classes",
            "1 images beside the classes", "1 without ending", "left out",
            "train/empty", "test/dog")  # fmt: skip
    with pytest.warns(UserWarning) as caught:
        info = data.info("image_folder", tmp_path)
    (warning,) = caught
    assert warning.filename == __file__
    for words in said:
        assert words in str(warning.message)
    assert info.files in str(warning.message)
    assert info.class_names == ("cat", "dog", "empty")
    assert info.splits == {"train": len(kinds), "test": 0}
    paths = sorted((tmp_path / "train/cat").iterdir())
    expected = data.read_images(paths, 16)
    # It has been said.
    loaded = load(f"{tmp_path}/", training=False, batch=len(kinds))
    ((images, labels),) = loaded.as_numpy_iterator()
    assert not labels.any()
    np.testing.assert_allclose(expected, images, atol=0.02)


def test_names_in_a_locale_of_ascii(tmp_path):
    """Python then makes surrogates of the bytes of a name."""
    path = tmp_path / "Tiere/Käfer/größe.png"
    path.parent.mkdir(parents=True)
    PIL.Image.new("RGB", (4, 4)).save(path)
    (tmp_path / "Tiere/Leer").mkdir()
    given = str(path.parents[1]).encode().decode("ascii", "surrogateescape")
    with pytest.warns(UserWarning, match="an image, which count: Leer. Conv"):
        folder = ImageFolder(given)
    assert folder.info.features["label"].names == ["Käfer", "Leer"]
    assert folder.files("train") == ([str(path)], [0])


def test_a_folder_inside_a_class_makes_no_splits(tmp_path):
    for name in ("cat/1", "cat/thumbs/1", "dog/1"):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (4, 4)).save(path)
    (tmp_path / "fox").mkdir()
    with pytest.warns(UserWarning, match="1 folders in classes"):
        info = data.info("image_folder", tmp_path)
    assert info.class_names == ("cat", "dog", "fox")
    assert info.splits == {"train": 2}


def test_a_file_that_holds_no_image_is_named(tmp_path):
    (tmp_path / "train/cat").mkdir(parents=True)
    path = tmp_path / "train/cat/1.jpg"
    PIL.Image.new("RGB", (5, 7)).save(path, "tiff")
    words = f"JPEG, WebP, .* Received: path=.*{path}"
    with pytest.raises(tf.errors.InvalidArgumentError, match=words):
        labels_of(load(tmp_path, batch=1))
    assert list(data.find_corrupt("image_folder", "train", tmp_path)) == [
        str(path)
    ]


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda path: None, ValueError, "data_dir=None"),
        (
            lambda path: path,
            ValueError,
            "laid out as folder/split/class.* or folder/class",
        ),
        (lambda path: path / "none", OSError, "folder of images"),
    ],
)
def test_no_folder_of_images(tmp_path, make, error, words):
    with pytest.raises(error, match=words):
        load(make(tmp_path))


def test_no_such_split_of_a_folder(folder):
    with pytest.raises(ValueError, match="Received: split='val'"):
        load(folder, "val")


# Images.


def test_corrupt_images_are_found(folder):
    (place,) = data.find_corrupt("image_folder", "train", folder)
    assert place == str(folder / "train" / "b" / "05.jpg")
    assert not list(data.find_corrupt("image_folder", "test", folder))


def test_a_corrupt_image_is_an_error(folder):
    with pytest.raises(tf.errors.InvalidArgumentError):
        labels_of(load(folder))


@pytest.mark.parametrize("training", [True, False])
def test_corrupt_images_are_left_out_and_named(folder, training):
    dataset = load(folder, training=training, skip_corrupt=True)
    with pytest.warns(UserWarning, match=r"05.jpg cannot be decoded .* \d+ so"):
        labels = labels_of(dataset)
    # In training another one takes its place.
    assert len(labels) == 16 if training else 15
    if training:
        assert len(dataset) == 4
    else:
        assert np.bincount(labels).tolist() == [8, 7]


def test_nothing_is_left_out_where_all_is_good(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        skipping, plain = (
            list(
                load(
                    folder, "test", False, skip_corrupt=skip
                ).as_numpy_iterator()
            )
            for skip in (True, False)
        )
    np.testing.assert_array_equal(skipping[0][0], plain[0][0])


# Files of records.


def test_flipped_bits_are_found(flipped):
    folder, path = flipped
    (place,) = data.find_corrupt("gray", "train", folder)
    assert place == f"{path}, record 4"


@pytest.mark.parametrize("split", ["train", "train[:20]+train[14:]"])
def test_corrupt_records_are_left_out_and_named(flipped, split):
    folder, path = flipped
    with pytest.raises(tf.errors.DataLossError):
        labels_of(data.load("gray", split, 8, 4, False, folder))
    with pytest.warns(UserWarning, match=f"1 corrupt .* record 4 of {path}"):
        dataset = data.load(
            "gray", split, 8, 4, False, folder, skip_corrupt=True
        )
    numbers = np.arange(36)
    if split != "train":
        numbers = np.concatenate([numbers[:20], numbers[14:]])
    numbers = numbers[numbers != BROKEN]
    np.testing.assert_array_equal(labels_of(dataset), numbers % 5)


@pytest.mark.parametrize(
    ("places", "lost"), [((20, -20), [0, 11]), ((9,), range(12))]
)
def test_corruption_at_both_ends_and_in_a_length(flipped, places, lost):
    """Behind a corrupt length (byte 9 is its checksum) nothing is found."""
    _, path = flipped
    content = bytearray(path.read_bytes())
    for place in places:
        content[place] ^= 1
    path.write_bytes(content)
    expected = sorted({*lost, 4})
    assert _corruption.corrupt_records(str(path), 12) == expected


def test_truncated_and_empty_files(flipped):
    folder, path = flipped
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.warns(UserWarning, match="2 corrupt records are skipped"):
        dataset = data.load(
            "gray", "train", 8, 4, True, folder, skip_corrupt=True
        )
    assert len(dataset) == 8
    assert len(labels_of(dataset)) == 32
    for file in path.parent.glob("gray-train.*"):
        file.write_bytes(b"")
    with pytest.raises(OSError, match="no record is whole"):
        data.load("gray", "train", 8, 4, True, folder, skip_corrupt=True)


# Hosts, cache.


@pytest.mark.parametrize("training", [True, False])
def test_hosts_share_a_split(data_dir, training):
    parts = [
        labels_of(
            data.load(
                "long", "train", 1, 4, training, data_dir, shard=(i, 7),
                drop_remainder=False,
            )
        )
        for i in range(7)
    ]  # fmt: skip
    sizes = [len(part) for part in parts]
    assert set(sizes) == ({17} if training else {17, 18})
    if not training:
        np.testing.assert_array_equal(np.concatenate(parts), np.arange(120) % 5)


@pytest.mark.parametrize("shard", [(1, 1), (-1, 2), 3, ("a", 2)])
def test_no_such_host(data_dir, shard):
    with pytest.raises(ValueError, match="must be a pair .index, count."):
        data.load("long", "train", 1, 4, True, data_dir, shard=shard)


def test_a_cache_changes_nothing(data_dir, tmp_path):
    shutil.copytree(data_dir / "gray", tmp_path / "gray")
    cached = data.load("gray", "train", 8, 4, True, tmp_path, cache=True)
    plain = data.load("gray", "train", 8, 4, True, tmp_path)
    np.testing.assert_array_equal(labels_of(cached), labels_of(plain))
    shutil.rmtree(tmp_path / "gray")
    assert len(labels_of(cached)) == 36  # It needs no file any more.
