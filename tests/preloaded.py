"""What processes of tests have imported before they are forked."""

import gc

import keras  # noqa: F401
import matplotlib.figure  # noqa: F401

import keras_vmoe.cli  # noqa: F401
from keras_vmoe.data.tensorflow_runtime import tf
from keras_vmoe.data.tensorflow_runtime import tfds

# Both are imported at their first use.
tf.data  # noqa: B018
tfds.core  # noqa: B018
gc.freeze()
