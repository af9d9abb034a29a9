"""The embedded dataset `digits`: 1,797 scans of handwritten digits.

They are the test part of "Optical Recognition of Handwritten Digits" of the
UCI repository (Alpaydin and Kaynak, 1998), which ships inside scikit-learn:
32x32 bitmaps of real handwriting, reduced to 8x8 counts of ink from 0 to 16.
Their 13 writers wrote none of UCI's training part.

The split is random and stratified by class: 1,254 for training, 179 for
validation and 364 for test. scikit-learn does not say who wrote which digit, so
all three splits share the 13 writers: accuracy on `test` says nothing about new
writers.

This module imports TFDS. Import it only where a dataset is opened.
"""

import contextlib
import io
import math
import os
import pathlib
import random
from typing import TYPE_CHECKING

import numpy as np

from keras_vmoe import _files
from keras_vmoe._extras import require

if TYPE_CHECKING:
    import tensorflow_datasets as tfds
else:
    tfds = require("tensorflow_datasets", "data")

NAME = "digits"
VERSION = "1.0.0"
_TEST_SHARE = 0.2
_VALIDATION_SHARE = 0.1


# TFDS has no types.
class Digits(  # type: ignore[call-arg]
    tfds.core.GeneratorBasedBuilder, skip_registration=True
):
    """TFDS builder of the digits; each image is 8x8, gray, PNG."""

    RELEASE_NOTES = {VERSION: "First split into train, validation, test."}
    VERSION = tfds.core.Version(VERSION)

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits of the UCI repository, 8x8.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(
                        shape=(8, 8, 1), encoding_format="png"
                    ),
                    "label": tfds.features.ClassLabel(num_classes=10),
                    # Row in `sklearn.datasets.load_digits()`.
                    "index": tfds.features.Scalar(dtype=np.int64),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # Nothing is downloaded.
        digits = require("sklearn.datasets", "data").load_digits()
        return {
            name: self._generate_examples(digits, indices)
            for name, indices in split_indices(digits.target).items()
        }

    def _generate_examples(self, digits, indices):
        images = to_gray(digits.images)
        for index in indices.tolist():
            label = int(digits.target[index])
            yield (
                index,
                {"image": images[index], "label": label, "index": index},
            )


def to_gray(counts):
    """Maps ink counts `(B, 8, 8)` in [0, 16] to uint8 `(B, 8, 8, 1)`."""
    return np.round(counts * 255 / 16).astype("uint8")[..., None]


def split_indices(labels):
    """Returns sorted indices by split: a fixed random split of each class."""
    # Not `default_rng`: NumPy guarantees only RandomState's stream.
    generator = np.random.RandomState(0)
    parts = {"train": [], "validation": [], "test": []}
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        num_test = math.ceil(_TEST_SHARE * len(members))
        num_validation = round(_VALIDATION_SHARE * len(members))
        cuts = [num_test, num_test + num_validation]
        names = ("test", "validation", "train")
        for name, part in zip(names, np.split(members, cuts), strict=True):
            parts[name].append(part)
    return {name: np.sort(np.concatenate(p)) for name, p in parts.items()}


def cache_dir():
    """Returns the user's cache folder for datasets of this package."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(cache, "keras_vmoe", "datasets")


def prepare(data_dir):
    """Writes the digits to a folder of TFDS datasets, unless they exist.

    The write is atomic: a killed process leaves nothing that looks complete,
    and concurrent processes do not interfere.
    """
    target = pathlib.Path(data_dir) / NAME / VERSION
    if target.exists():
        return
    with contextlib.suppress(FileExistsError):
        # Another process may finish first; its dataset is just as good.
        with _files.creating(target) as partial:
            _write(partial.parent)
            os.rename(partial.parent / NAME / VERSION, partial)


def _write(data_dir):
    # TFDS needs it only to write, and its error names no remedy.
    require("importlib_resources", "data")
    # TFDS names its folders with Python's `random`. Its state must not depend
    # on whether the digits already existed.
    state = random.getstate()
    try:
        sink = io.StringIO()  # TFDS reports at length on both streams.
        with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            Digits(data_dir=data_dir).download_and_prepare()
    finally:
        random.setstate(state)
