"""The functions of a SavedModel: guards, decoding, model, answers.

Runs under the TensorFlow backend, in the process that exports.

Axes: B images in the batch, H and W height and width in pixels, C channels.
"""

from keras_vmoe.data.tensorflow_runtime import import_tensorflow
from keras_vmoe.data.untrusted import decoded_or_nan
from keras_vmoe.export.settings import INPUT_NAMES
from keras_vmoe.export.variants import answering
from keras_vmoe.export.variants import has_classes
from keras_vmoe.export.variants import routed

UNKNOWN = -1  # The class of an image without a finite answer.


def make_endpoints(model, settings):
    """Returns one traced function per signature.

    All share the model's variables, and those with the same routing share one
    copy of its graph.

    Args:
        model: A model; see `saved_model`.
        settings: `Settings`.

    Returns:
        Dict from name to `tf.ConcreteFunction`.
    """
    tf = import_tensorflow()
    shape = model.input_shape[1:]
    answer = _answer(settings.class_names)
    cores, endpoints = {}, {}
    for name, signature in settings.signatures.items():
        dials = signature.routing
        key = tuple(dials.items())
        if key not in cores:
            cores[key] = traced_model(routed(model, dials))
        features = signature.features or not has_classes(model)
        endpoint = _endpoint(
            _reader(signature.input, shape, settings),
            cores[key],
            _features if features else answer,
        )
        endpoints[name] = tf.function(
            endpoint, autograph=False
        ).get_concrete_function(input_spec(signature.input, shape))
    return endpoints


def input_spec(kind, shape):
    """Returns the `tf.TensorSpec` of a signature's input.

    Args:
        kind: `Signature.input`.
        shape: `(H, W, C)`.
    """
    tf = import_tensorflow()
    name = INPUT_NAMES[kind]
    if kind == "encoded":
        return tf.TensorSpec((None,), tf.string, name)
    dtype = tf.uint8 if kind == "uint8" else tf.float32
    return tf.TensorSpec((None, *shape), dtype, name)


def traced_model(model):
    """Returns a function from images to the dict of the model's outputs."""
    tf = import_tensorflow()
    model = answering(model)

    def call(images):
        return model(images, training=False)

    spec = tf.TensorSpec((None, *model.input_shape[1:]), tf.float32)
    return tf.function(call, input_signature=[spec], autograph=False)


def _endpoint(read, core, answer):
    tf = import_tensorflow()

    def endpoint(inputs):
        images = read(inputs)
        # TensorFlow's convolutions give an empty batch a wrong shape. (And
        # they fuse with a `tf.pad` before them.)
        count = tf.shape(images)[0]
        filling = tf.zeros((tf.cast(count == 0, tf.int32), *images.shape[1:]))
        outputs = core(tf.concat([images, filling], axis=0))
        # Explicit, because some models lose a NaN, such as by a maximum.
        good = tf.reduce_all(tf.math.is_finite(images), axis=(1, 2, 3))
        nan = tf.constant(float("nan"))
        return answer(
            {
                name: tf.where(good[:, None], x[:count], nan)
                for name, x in outputs.items()
            }
        )

    return endpoint


def _reader(kind, shape, settings):
    """Returns a function from a request's content to the model's input."""
    tf = import_tensorflow()
    spec = input_spec(kind, shape)
    preprocessing = settings.preprocessing

    @tf.function(autograph=False)
    def read(inputs):
        # First, because a wrong rank would abort the process in a kernel.
        inputs = tf.ensure_shape(inputs, spec.shape)
        inputs = _limited(inputs, settings.max_batch_size)
        if kind == "float":
            return inputs
        if kind == "uint8":
            return preprocessing.normalized(tf.cast(inputs, tf.float32))
        pixels = tf.map_fn(
            lambda content: decoded_or_nan(
                content, shape[:2], preprocessing, settings.max_pixels
            ),
            inputs,
            fn_output_signature=tf.TensorSpec(shape, tf.float32),
        )
        return preprocessing.normalized(pixels)

    return read


def _limited(inputs, max_batch_size):
    """Returns the inputs, or fails if there are too many."""
    tf = import_tensorflow()
    count = tf.shape(inputs)[0]
    check = tf.debugging.Assert(
        count <= max_batch_size,
        [
            f"A request must hold at most {max_batch_size} images. Received:",
            count,
        ],
    )
    with tf.control_dependencies([check]):
        return tf.identity(inputs)


def _features(core):
    return {"features": core["features"]}


def _answer(class_names):
    """Returns a function from the model's outputs to a request's answer."""
    tf = import_tensorflow()

    @tf.function(autograph=False)
    def answer(logits):
        finite = tf.reduce_all(tf.math.is_finite(logits), axis=-1)
        best = tf.argmax(logits, axis=-1)
        unknown = tf.cast(UNKNOWN, best.dtype)
        found = tf.where(finite, best, unknown)
        outputs = {
            "logits": logits,
            "probabilities": tf.nn.softmax(logits),
            "class_id": found,
        }
        if class_names is not None:
            # The empty name, for unknown classes, comes last.
            names = tf.constant([*class_names, ""])
            index = tf.where(finite, best, len(class_names))
            outputs["class_name"] = tf.gather(names, index)
        return outputs

    return lambda core: answer(core["logits"])
