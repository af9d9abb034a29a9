"""Folders of images as a dataset: `folder/split/class/image.jpg`.

TFDS's `ImageFolder` lists the files; it can neither slice a split nor repeat
an order, so that they are read here.
"""

import os

from keras_vmoe.data.tensorflow_runtime import tf
from keras_vmoe.data.tensorflow_runtime import tfds

NAME = "image_folder"
LAYOUT = "folder/split/class/image.jpg"


class ImageFolder:
    """A folder of images, `folder/split/class/image.jpg`.

    Attributes:
        info: `tfds.core.DatasetInfo`, with features, splits and classes.
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
        builder = tfds.ImageFolder(self.data_dir)
        self.info = builder.info
        self._files = {
            split: sorted((x.image_path, x.label) for x in examples)
            for split, examples in builder._split_examples.items()
        }
        if not any(self._files.values()):
            raise ValueError(
                f"A folder of images must be laid out as {LAYOUT}, with at "
                "least one JPEG or PNG. "
                f"Received: data_dir={self.data_dir!r} with the entries "
                f"{sorted(os.listdir(self.data_dir))[:10]}."
            )

    def num_examples(self, split):
        """How many images a split has."""
        return len(self.files(split)[0])

    def files(self, split):
        """Paths and labels of a split, in the order of the paths."""
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
