"""Requests that TF Serving answers before it opens its doors."""

import numpy as np

from keras_vmoe._extras import require
from keras_vmoe.data.tensorflow_runtime import import_tensorflow
from keras_vmoe.export.endpoints import INPUT_NAMES
from keras_vmoe.export.replay import WARMUP

SEED = 0


def write_warmup(folder, shape, settings):
    """Writes a request of each batch size for each signature.

    Args:
        folder: `pathlib.Path` of a version.
        shape: `(H, W, C)` of the model's images.
        settings: `ServedSettings`.
    """
    tf = import_tensorflow()
    logs = require("tensorflow_serving.apis.prediction_log_pb2", "serving")
    path = folder / WARMUP
    path.parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for name, signature in settings.signatures.items():
            for batch in settings.warmup_batches:
                images = example(signature.input, (batch, *shape))
                log = logs.PredictionLog()
                request = log.predict_log.request
                request.model_spec.signature_name = name
                request.inputs[INPUT_NAMES[signature.input]].CopyFrom(
                    tf.make_tensor_proto(images)
                )
                writer.write(log.SerializeToString())


def example(kind, shape, seed=SEED):
    """Something to ask: images of noise, the same every time.

    Args:
        kind: `Signature.input`.
        shape: `(B, H, W, C)`.
        seed: Integer; another one gives other images.

    Returns:
        Array `(B, H, W, C)`, or `(B,)` of bytes.
    """
    tf = import_tensorflow()
    pixels = np.random.default_rng(seed).integers(0, 256, shape, "uint8")
    if kind == "float":
        return (pixels / 127.5 - 1).astype("float32")
    if kind == "uint8":
        return pixels
    encoded = [tf.io.encode_jpeg(image).numpy() for image in pixels]
    return np.array(encoded, object)
