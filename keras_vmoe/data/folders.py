"""Folders of images as a dataset: `folder/split/class/image.jpg`.

Without folders of splits, `folder/class/image.jpg`, all is one split, `train`.

TFDS's `ImageFolder` takes hidden folders for classes, leaves out endings that
it does not know without a word, and can neither slice a split nor repeat an
order, so that folders are listed and read here.
"""

import collections
import os
import pathlib
import random
import types
import warnings

from keras_vmoe.data.tensorflow_runtime import tf
from keras_vmoe.data.tensorflow_runtime import tfds

NAME = "image_folder"
LAYOUT = "folder/split/class/image.jpg or folder/class/image.jpg"
WHOLE = "train"  # The split of a folder without splits.
# Of files that `decode_image` reads, whichever of these they hold.
ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")


class ImageFolder:
    """A folder of images, with or without folders of splits.

    The order of a split is one of all classes: each slice of it has its share
    of each class, of images in a fixed random order.

    Attributes:
        info: `features` and `splits`, as of `tfds.core.DatasetInfo`.
        data_dir: String, the folder.
    """

    name = NAME

    def __init__(self, folder):
        if folder is None:
            raise ValueError(
                f"`data_dir` must name the folder of {NAME!r}, laid out as "
                f"{LAYOUT}. Received: data_dir=None."
            )
        self.data_dir = os.path.expanduser(os.fspath(folder))
        found = _classes_of_splits(self.data_dir)
        self._files = _images_of(self.data_dir, found)
        if not any(self._files.values()):
            raise ValueError(
                f"A folder of images must be laid out as {LAYOUT}, with at "
                f"least one file that ends in {', '.join(ENDINGS)}. "
                f"Received: data_dir={self.data_dir!r} with the entries "
                f"{sorted(os.listdir(self.data_dir))[:10]}."
            )
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
        """How many images a split has."""
        return len(self.files(split)[0])

    def files(self, split):
        """Paths and labels of a split, in its order."""
        parts = tfds.core.ReadInstruction.from_spec(split)
        chosen = []
        for part in parts.to_absolute(self.info.splits):
            chosen += self._files[part.splitname][part.from_ : part.to]
        to_number = self.info.features["label"].str2int
        return [path for path, _ in chosen], [to_number(x) for _, x in chosen]

    def read(self, split, seed=None, reshuffles=False):
        """Examples with the stored `image`, `label` and `tfds_id`, the path.

        A seed shuffles the whole split, in another order in every pass that
        `reshuffles`.
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


def _visible(folder):
    """Names in a folder without a slash, but for hidden ones, in order."""
    names = (name.rstrip("/") for name in tf.io.gfile.listdir(folder))
    return sorted(name for name in names if not name.startswith("."))


def _folders(folder):
    """Names of the folders in a folder."""
    return [
        name
        for name in _visible(folder)
        # Images are many; each question goes to the file system.
        if not _is_image(name) and tf.io.gfile.isdir(f"{folder}/{name}")
    ]


def _is_image(name):
    return pathlib.PurePath(name).suffix.lower() in ENDINGS


def _classes_of_splits(folder):
    """Of each split the paths of its classes, by name."""
    inner = {x: _folders(f"{folder}/{x}") for x in _folders(folder)}
    if not any(inner.values()):
        return {WHOLE: {name: f"{folder}/{name}" for name in inner}}
    return {
        split: {name: f"{folder}/{split}/{name}" for name in names}
        for split, names in inner.items()
    }


def _images_of(folder, found):
    """`(path, class)` of the images of each split, and a word on the rest."""
    taken, left = collections.Counter(), collections.Counter()
    files = {}
    for split, classes in found.items():
        places = []
        for label, path in classes.items():
            images = []
            for name in _visible(path):
                ending = pathlib.PurePath(name).suffix.lower()
                is_image = _is_image(name)
                (taken if is_image else left)[ending or name] += 1
                images += [name] * is_image
            # Spread evenly over the split, whatever the size of the class.
            random.Random(label).shuffle(images)  # noqa: S311
            places += [
                ((i + 0.5) / len(images), label, f"{path}/{name}")
                for i, name in enumerate(images)
            ]
        files[split] = [(path, label) for _, label, path in sorted(places)]
    if left:
        warnings.warn(
            f"Files were left out of {folder}: {_words(left)}. Taken: "
            f"{_words(taken)}. Convert them to JPEG or PNG.",
            stacklevel=2,
        )
    return files


def _words(counts):
    """`12 .jpg, 3 .tif`."""
    listed = ", ".join(f"{n} {ending}" for ending, n in counts.most_common(8))
    return listed or "none"
