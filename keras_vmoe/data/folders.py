"""Folders of images as a dataset: `folder/split/class/image.jpg`.

Without split folders, `folder/class/image.jpg`, all is one split, `train`.

TFDS's `ImageFolder` takes hidden folders for classes, silently skips extensions
that it does not know, and can neither slice a split nor repeat an order.
Therefore folders are listed and read here.
"""

import collections
import functools
import os
import pathlib
import random
import types

from keras_vmoe._warnings import warn
from keras_vmoe.data.tensorflow_runtime import tf
from keras_vmoe.data.tensorflow_runtime import tfds

NAME = "image_folder"
LAYOUT = "folder/split/class/image.jpg or folder/class/image.jpg"
WHOLE = "train"  # The split of a folder without splits.
# Extensions of files that `decode_image` reads, whatever format they hold.
ENDINGS = (
    *(".apng", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pjp"),
    *(".pjpeg", ".png", ".webp"),
)
# Folders of systems, archives and programs, by name or prefix.
SYSTEM = ("#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found")
HIDDEN = (".", "__", "@")


class ImageFolder:
    """A folder of images, with or without split folders.

    A split interleaves its classes: each slice has its share of each class.
    Images of a class are in a fixed random order.

    Attributes:
        info: `features` and `splits`, as in `tfds.core.DatasetInfo`.
        data_dir: String, the folder.
        counts: String, numbers of files taken and left out, by kind.
    """

    name = NAME

    def __init__(self, folder):
        if folder is None:
            raise ValueError(
                f"`data_dir` must name the folder of {NAME!r}, laid out as "
                f"{LAYOUT}. Received: data_dir=None."
            )
        self.data_dir = os.path.expanduser(os.fspath(folder))
        root = _decoded(self.data_dir)
        found, left = _classes_of_splits(root)
        self._files, taken, empty = _images_of(found, left)
        if not any(self._files.values()):
            raise ValueError(
                f"A folder of images must be laid out as {LAYOUT}, with at "
                f"least one file that ends in {', '.join(ENDINGS)}. "
                f"Received: data_dir={self.data_dir!r} with the entries "
                f"{sorted(os.listdir(self.data_dir))[:10]}."
            )
        self.counts = f"{_words(taken)} taken, {_words(left)} left out"
        if +left or empty:
            whole = root if "://" in root else os.path.realpath(root)
            empty = tuple(os.path.relpath(x, root) for x in empty)
            _warn_once(whole, self.counts, empty)
        classes = sorted(set().union(*found.values()))
        label = tfds.features.ClassLabel(names=classes)
        features = {"image": tfds.features.Image(), "label": label}
        splits = [
            tfds.core.SplitInfo(
                name=name, shard_lengths=[len(files)], num_bytes=0
            )
            for name, files in self._files.items()
        ]
        self.info = types.SimpleNamespace(
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            splits=tfds.core.splits.SplitDict(splits),
        )

    def num_examples(self, split):
        """Returns the number of images in a split."""
        return len(self.files(split)[0])

    def files(self, split):
        """Returns the paths and labels of a split, in order."""
        parts = tfds.core.ReadInstruction.from_spec(split)
        chosen = []
        for part in parts.to_absolute(self.info.splits):
            chosen += self._files[part.splitname][part.from_ : part.to]
        to_number = self.info.features["label"].str2int
        return [path for path, _ in chosen], [to_number(x) for _, x in chosen]

    def read(self, split, seed=None, reshuffles=False):
        """Returns examples: stored `image`, `label`, and `tfds_id`, the path.

        A seed shuffles the whole split. With `reshuffles`, every pass has a
        different order.
        """
        paths, labels = self.files(split)
        dataset = tf.data.Dataset.from_tensor_slices((paths, labels))
        if seed is not None:
            dataset = dataset.shuffle(
                len(paths), seed, reshuffle_each_iteration=reshuffles
            )

        def read(path, label):
            image = tf.io.read_file(path)
            label = tf.cast(label, tf.int64)
            return {"image": image, "label": label, "tfds_id": path}

        return dataset.map(read, tf.data.AUTOTUNE)


def _decoded(path):
    """A path in UTF-8, even where the locale is ASCII only."""
    return path.encode(errors="surrogateescape").decode(errors="replace")


def _entries(folder):
    """Names of the visible folders and files in a folder."""
    folders, files = [], []
    if "://" in folder:
        for name in tf.io.gfile.listdir(folder):
            is_folder = name.endswith("/") or (
                # Images are many, and each query goes to the store.
                not _is_image(name) and tf.io.gfile.isdir(f"{folder}/{name}")
            )
            (folders if is_folder else files).append(name.rstrip("/"))
    else:
        # As bytes, whatever the locale: TensorFlow reads UTF-8.
        with os.scandir(folder.encode()) as entries:
            for entry in entries:
                name = entry.name.decode(errors="replace")
                (folders if entry.is_dir() else files).append(name)
    folders = (x for x in folders if not x.startswith(HIDDEN))
    files = (x for x in files if not x.startswith("."))
    return sorted(x for x in folders if x not in SYSTEM), sorted(files)


def _ending(name):
    return pathlib.PurePath(name).suffix.lower()


def _is_image(name):
    return _ending(name) in ENDINGS


def _classes_of_splits(folder):
    """Each split's paths of classes, by name; a count of the rest."""
    folders, beside = _entries(folder)
    inner = {x: _entries(f"{folder}/{x}") for x in folders}
    # A folder that directly holds images is a class, whatever else is in it.
    filled = [x for x in inner.values() if any(x)]
    are_classes = all(any(map(_is_image, files)) for _, files in filled)
    if not are_classes and any(classes for classes, _ in filled):
        found = {
            split: {name: f"{folder}/{split}/{name}" for name in classes}
            for split, (classes, _) in inner.items()
        }
        beside = sum((files for _, files in inner.values()), beside)
    else:
        found = {WHOLE: {name: f"{folder}/{name}" for name in inner}}
    count = sum(map(_is_image, beside))
    return found, collections.Counter({"images beside the classes": count})


def _images_of(found, left):
    """`(path, class)` of each split's images, and what became of the files.

    Adds to the counts of files `left` out. Also returns the counts of files
    taken, and the class folders without an image.
    """
    taken, files, empty = collections.Counter(), {}, []
    for split, classes in found.items():
        places = []
        for label, path in classes.items():
            folders, names = _entries(path)
            images = [name for name in names if _is_image(name)]
            taken.update(map(_ending, images))
            left.update(
                _ending(name) or "without ending"
                for name in names
                if not _is_image(name)
            )
            left["folders in classes"] += len(folders)
            empty += [] if images else [path]
            # Spread evenly over the split, regardless of the class's size.
            random.Random(label).shuffle(images)  # noqa: S311
            places += [
                ((i + 0.5) / len(images), label, f"{path}/{name}")
                for i, name in enumerate(images)
            ]
        files[split] = [(path, label) for _, label, path in sorted(places)]
    return files, taken, empty


@functools.cache
def _warn_once(folder, counts, empty):
    """Warns of unused files once, however often a program opens the folder."""
    words = ", ".join(empty[:8])
    words = f" Classes without an image, which count: {words}." if empty else ""
    warn(
        f"Images of {folder}: {counts}.{words} Convert files to JPEG or PNG, "
        f"and lay folders out as {LAYOUT}."
    )


def _words(counts):
    """`12 .jpg, 3 .tif`."""
    most = (+counts).most_common(8)
    listed = ", ".join(f"{n} {ending}" for ending, n in most)
    return listed or "none"
