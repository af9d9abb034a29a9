"""Datasets: from TensorFlow Datasets (TFDS) to `tf.data`, for any backend.

Importing this package needs neither TensorFlow nor TFDS. Calling it needs the
extra `data`: `pip install 'keras_vmoe[data]'`.
"""

from keras_vmoe._preprocessing import Preprocessing
from keras_vmoe.data._corruption import find_corrupt
from keras_vmoe.data.augmentation import Augmentation
from keras_vmoe.data.images import preprocess
from keras_vmoe.data.images import read_images
from keras_vmoe.data.loading import load
from keras_vmoe.data.schema import info

__all__ = [
    "Augmentation",
    "Preprocessing",
    "find_corrupt",
    "info",
    "load",
    "preprocess",
    "read_images",
]
