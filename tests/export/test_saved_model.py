"""A SavedModel in TensorFlow's C API reproduces the model's outputs."""

import io
import json
import os

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_vmoe import data
from keras_vmoe import export
from keras_vmoe import layers
from keras_vmoe import models
from keras_vmoe.data.untrusted import decoded_or_nan
from keras_vmoe.export.settings import STANDARD
from keras_vmoe.export.settings import check_warmup
from tests import processes
from tests.export import small
from tests.export.c_api import RefusedRequest
from tests.export.c_api import ServedModel
from tests.export.small import SIGNATURES

# The process that other backends start does the same.
pytestmark = small.IN_TENSORFLOW


def scale(right):
    return max(1, np.abs(right).max(initial=0))


def close(given, right):
    assert given.shape == right.shape
    atol = 1e-5 * scale(right)
    np.testing.assert_allclose(given, right, atol=atol, rtol=0)


@pytest.fixture(scope="module")
def right(model):
    """The model's logits for the largest batch, of which the others are parts.

    Each image is routed alone, so that their number changes nothing.
    """
    return small.logits(small.alone(model), small.images(max(small.BATCHES)))


# Of PyTorch: `tests/layers/test_bank.py`; of JAX: `tests/wheel`.
@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("batch", small.BATCHES)
def test_answers_are_the_models(served, right, batch):
    answer = served("serving_default", images=small.images(batch))
    right = right[:batch]
    close(answer["logits"], right)
    probabilities = np.exp(right - right.max(axis=-1, keepdims=True))
    probabilities /= probabilities.sum(axis=-1, keepdims=True)
    close(answer["probabilities"], probabilities)
    assert answer["class_id"].tolist() == right.argmax(axis=-1).tolist()
    names = [small.CLASSES[i].encode() for i in answer["class_id"]]
    assert answer["class_name"].tolist() == names


@small.ASKED_HERE
@pytest.mark.parametrize("kind", sorted(set(small.MODELS) - {"bpr"}))
@pytest.mark.slow
def test_answers_of_other_models(kind, tmp_path):
    model = small.MODELS[kind]()
    path = export.saved_model(model, tmp_path / "served", warmup=False)
    served = ServedModel(path)
    largest = small.images(max(small.BATCHES))
    right = small.logits(small.alone(model), largest)
    for batch in small.BATCHES:
        answer = served("serving_default", images=small.images(batch))
        close(answer["logits"], right[:batch])
    for name in served.signatures:
        assert leaks(served, name) == 0


def nested():
    backbone = models.ViTMoE(
        16, 4, 32, 2, 4, 64, None, moe={"layers": [1], "num_experts": 4}
    )
    head = keras.layers.Dense(5)
    return keras.Sequential([keras.Input((16, 16, 3)), backbone, head])


@small.ASKED_HERE
@pytest.mark.slow
def test_models_of_ones_own(tmp_path):
    """`test_other_channels_than_rgb` has one that is not nested."""
    model = small.wild(nested())
    served = ServedModel(export.saved_model(model, tmp_path, warmup=False))
    right = models.set_routing(model, images_per_group=1)
    images = small.images(3)
    answer = served("serving_default", images=images)
    close(answer["logits"], small.logits(right, images))
    assert served("features", images=images)["features"].shape[0] == 3


@keras.saving.register_keras_serializable("tests")
class Twice(keras.layers.Layer):
    """A call with two outputs and arguments of its own, and a loop."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), name="scale")

    def call(self, x, factor=1.0, other=None):
        def step(i, y):
            return i + 1, y * self.scale + factor

        y = keras.ops.while_loop(lambda i, _: i < 3, step, (0, x))[1]
        return y, y if other is None else y + other


def stateful(x):
    x = keras.layers.BatchNormalization()(x)
    return keras.layers.Dropout(0.5)(x)


def shared(x):
    layer, dense = Twice(), keras.layers.Dense(16)
    y, z = layer(dense(dense(x)))
    return keras.layers.Concatenate()(layer(x, factor=2.0, other=y + z))


def attention(x):
    x = keras.layers.Reshape((16, 16))(x)
    attention = keras.layers.MultiHeadAttention(2, 4)
    x = attention(x, x) * keras.ops.reshape(keras.ops.arange(16) < 5, (16, 1))
    x = keras.layers.LayerNormalization()(keras.layers.Masking()(x))
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.layers.Reshape((1, 1, 16))(x)


def nested_masks(x):
    inputs = keras.Input((16, 16))
    dense = keras.layers.Dense(16)(keras.layers.Masking()(inputs))
    x = keras.layers.Reshape((16, 16))(x)
    x = x * keras.ops.reshape(keras.ops.arange(16) < 5, (16, 1))
    x = keras.Model(inputs, dense)(x)
    x = keras.layers.MultiHeadAttention(2, 4)(x, x)
    return keras.layers.Reshape((4, 4, 16))(x)


def same_layers(x):
    for _ in range(2):
        x = x + layers.MoEMLP(num_experts=4, hidden_dim=32)(x)
    return x


@small.ASKED_HERE
@pytest.mark.slow
# What Keras says of its masks, and `models.cost` of Keras's attention.
@pytest.mark.filterwarnings("ignore:.*does not support masking")
@pytest.mark.filterwarnings("ignore:The multiply-adds of")
def test_any_layers(tmp_path):
    """With a state, called twice, with masks, loops and nested models."""
    images = keras.Input((16, 16, 3))
    x = keras.layers.Conv2D(16, 4, strides=4)(images)
    for body in (stateful, nested_masks, same_layers, shared):
        x = body(x)
    x = attention(keras.layers.Conv2D(16, 1)(x))
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(images, keras.layers.Dense(5)(x))
    for weight in model.weights:
        if weight.dtype == "float32":
            noise = np.random.default_rng(0).uniform(0, 0.2, weight.shape)
            weight.assign(keras.ops.convert_to_numpy(weight) + noise)
    served = ServedModel(export.saved_model(model, tmp_path, warmup=False))
    images = small.images(3)
    right = small.logits(models.set_routing(model, images_per_group=1), images)
    given = served("serving_default", images=images)["logits"]
    assert np.ptp(right, axis=0).max() > 1e-3  # Images differ.
    close(given, right)
    assert given.shape == (3, 5)


@small.ASKED_HERE
@pytest.mark.slow
def test_a_model_without_classes_gives_features(tmp_path):
    model = small.vit(None, num_experts=4)
    served = ServedModel(export.saved_model(model, tmp_path, warmup=False))
    assert set(served.signatures) == {
        "serving_default", "serve_images", "serve_jpeg",
    }  # fmt: skip
    images = small.images(3)
    answer = served("serving_default", images=images)
    close(answer["features"], small.logits(small.alone(model), images))


def test_features_are_what_the_head_gets(served, model):
    images = small.images(3)
    features = served("features", images=images)["features"]
    assert features.shape == (3, 32)
    kernel, bias = (
        keras.ops.convert_to_numpy(x) for x in model.get_layer("head").weights
    )
    logits = served("serving_default", images=images)["logits"]
    assert difference(features @ kernel + bias, logits) < 1e-5 * scale(logits)


def test_the_dial(served, model):
    images = small.images(3)
    for name, dials in (
        ("fast", small.FAST),
        ("accurate", {"num_selected_experts": 3}),
    ):
        right = small.logits(small.alone(model, **dials), images)
        close(served(name, images=images)["logits"], right)
        default = served("serving_default", images=images)["logits"]
        assert np.abs(default - right).max() > 1e-3  # Another model.


def test_pixels_and_files_are_read_as_in_evaluation(served, tmp_path):
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (3, 16, 16, 3), "uint8")
    images = (pixels / 127.5 - 1).astype("float32")
    right = served("serving_default", images=images)["logits"]
    given = served("serve_images", images=pixels)["logits"]
    assert difference(given, right) < 1e-5 * scale(right)
    paths = [tmp_path / name for name in ("a.jpg", "b.png", "gray.png")]
    for path, channels in zip(paths, (3, 3, 1), strict=True):
        image = generator.integers(0, 256, (37, 23, channels))
        keras.utils.save_img(path, image, scale=False)
    images = data.read_images(paths, 16)
    right = served("serving_default", images=images)["logits"]
    files = [path.read_bytes() for path in paths]
    given = served("serve_jpeg", image_bytes=files)["logits"]
    assert difference(given, right) < 1e-5 * scale(right)
    right = served("fast", images=images)["logits"]
    given = served("fast_jpeg", image_bytes=files)["logits"]
    assert difference(given, right) < 1e-5 * scale(right)


def leaks(served, name):
    """How much an image's answers change with the others of its batch."""
    found = []
    for place in (0, 3, 7):
        batches = small.images(8), small.images(8, seed=1)
        batches[1][place] = batches[0][place]
        first, second = (asked(served, name, x) for x in batches)
        for output, value in first.items():
            pair = (x[place] for x in (value, second[output]))
            found.append(difference(*pair))
    return max(found)


def asked(served, name, images):
    """The answers to images in the form that the signature takes."""
    pixels = np.uint8(127.5 * images + 127.5)
    if "image_bytes" in served.signatures[name][0]:
        files = [tf.io.encode_png(x).numpy() for x in pixels]
        return served(name, image_bytes=files)
    return served(name, images=pixels if name == "serve_images" else images)


def difference(one, other):
    if isinstance(one, bytes):
        return float(one != other)
    return np.abs(one - other).max()


def test_neighbors_change_nothing(served):
    """By default; in groups of 8 they compete for places, and so they do."""
    for name in served.signatures:
        leak = leaks(served, name)
        assert leak > 1e-3 if name == "crowded" else leak == 0, name


@small.ASKED_HERE
@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_than_rgb(channels, tmp_path):
    images = keras.Input((16, 16, channels))
    x = keras.layers.Conv2D(8, 4, 4)(images)
    x = layers.MoEMLP(4, 16)(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = small.wild(keras.Model(images, keras.layers.Dense(10)(x)))
    served = ServedModel(export.saved_model(model, tmp_path))
    images = np.ones((1, 16, 16, channels), "float32")
    right = small.logits(models.set_routing(model, images_per_group=1), images)
    close(served("serving_default", images=images)["logits"], right)
    assert ("serve_jpeg" in served.signatures) == (channels == 1)
    if channels == 4:
        with pytest.raises(ValueError, match="Files are decoded to grayscale"):
            table = {"mine": {"input": "encoded"}}
            export.saved_model(model, tmp_path, 2, signatures=table)
    three = data.Preprocessing(mean=(1, 2, 3))
    with pytest.raises(ValueError, match=f"images of {channels} channel"):
        export.saved_model(model, tmp_path, 2, preprocessing=three)


@small.ASKED_HERE
def test_a_version_that_lacks_a_signature(tmp_path):
    """Beside one of which only the card is there; of one image at most."""
    card = tmp_path / "1" / "assets.extra" / "model_card.json"
    card.parent.mkdir(parents=True)
    card.write_text('{"signatures": {"serving_default": {}, "mine": {}}}')
    (tmp_path / "1" / "saved_model.pb").write_text("")
    words = "no signature 'mine', which version 1 has"
    with pytest.warns(UserWarning, match=words):
        path = export.saved_model(
            small.MODELS["dense"](), tmp_path, 2, max_batch_size=1
        )
    assert path == tmp_path / "2" and (path / "saved_model.pb").exists()


def test_warm_up_is_not_refused():
    assert check_warmup(True, 4, 1) == (1, 4)
    assert check_warmup(True, 1, 1) == (1,)
    assert check_warmup(True, 1024, 1) == (1, 8)
    assert check_warmup(False, 4, 1) == ()


def test_a_jpeg_is_gone_over_as_often_as_it_is_small():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), "uint8")
    file = io.BytesIO()
    keras.utils.array_to_img(noise).save(file, "jpeg", progressive=True)
    once = file.getvalue()
    again = once[once.rindex(b"\xff\xda") : -2]  # Its last scan.
    often = once[:-2] + 100 * again + once[-2:]
    for content, room, is_decoded in (
        (once, 1, True), (once, 0.99, False),
        (often, 11, True), (often, 9, False),
    ):  # fmt: skip
        room = int(room * 64**2)
        pixels = decoded_or_nan(content, (8, 8), data.Preprocessing(), room)
        assert np.isfinite(pixels).all() == is_decoded


@small.ASKED_HERE
@pytest.mark.slow
def test_a_model_that_would_forget_a_nan(tmp_path):
    images = keras.Input((16, 16, 3))
    x = keras.layers.Conv2D(8, 3, activation="relu")(images)
    x = keras.layers.GlobalMaxPooling2D()(x)
    model = keras.Model(images, keras.layers.Dense(5)(x))
    served = ServedModel(export.saved_model(model, tmp_path, warmup=False))
    images = small.images(3)
    images[1, 0, 0, 0] = np.nan
    found = served("serving_default", images=images)["class_id"]
    assert found[1] == -1 and min(found[0], found[2]) >= 0


def test_an_invalid_image_affects_its_own_answer_alone(served, tmp_path):
    images = small.images(3)
    right = served("serving_default", images=images)
    images[1, 0, 0, 0] = np.nan
    given = served("serving_default", images=images)
    assert given["class_id"][1] == -1 and given["class_name"][1] == b""
    for name in right:
        assert np.array_equal(given[name][[0, 2]], right[name][[0, 2]])
    good = tf.io.encode_jpeg(np.zeros((9, 9, 3), "uint8")).numpy()
    head = b"\x89PNG\r\n\x1a\n" + bytes(8)
    huge = head + (2**20).to_bytes(4, "big") * 2 + bytes(9)
    files = [good, good[:90], b"", b"GIF89a" + bytes(20), huge, good]
    classes = served("serve_jpeg", image_bytes=files)["class_id"].tolist()
    assert classes[0] == classes[-1] >= 0 and classes[1:-1] == [-1] * 4


def test_requests_without_a_sense(folder):
    served = ServedModel(folder)
    images = small.images(2)
    for signature, inputs, words in (
        ("nope", {"images": images}, "must name a signature"),
        ("serving_default", {"image": images}, "must name a signature"),
        ("serving_default", {"images": images.astype("uint16")}, "uint16"),
        ("serve_jpeg", {"image_bytes": ["text"]}, "must be bytes"),
    ):
        with pytest.raises(ValueError, match=words):
            served(signature, **inputs)
    served.close()
    served.close()
    with pytest.raises(ValueError, match="Load the folder again"):
        served("serving_default", images=images)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((2, 16, 16), "float32"), r"\[2,16,16\].*\[\?,16,16,3\]"),
        (np.zeros((2, 8, 8, 3), "float32"), r"\[2,8,8,3\].*\[\?,16,16,3\]"),
        (np.zeros((), "float32"), r"\[\].*\[\?,16,16,3\]"),
        (np.zeros((2, 16, 16, 3), "uint8"), "float"),
        (np.zeros((1025, 16, 16, 3), "float32"), "at most 1024"),
    ],
)
def test_wrong_requests_are_refused(served, images, words):
    with pytest.raises(RefusedRequest, match=words):
        served("serving_default", images=images)


def test_a_thousand_hostile_requests(folder):
    """In a process of its own, which must live."""
    program = os.path.join(os.path.dirname(__file__), "run_hostile.py")
    done = processes.run(program, folder)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["right"] == counts["alone"] == 250
    assert counts["answered"] + counts["refused"] == 500
    assert counts["refused"] > 200


def test_weights_are_written_once(folder, model):
    """The graph of the eight signatures has at most 2 MB."""
    weights = 4 * model.count_params()
    size = sum(x.stat().st_size for x in folder.rglob("*") if x.is_file())
    assert size < 1.15 * weights + 2e6
    variables = sum(x.stat().st_size for x in folder.glob("variables/*"))
    assert variables < 1.05 * weights + 2e4


def test_the_model_card(folder, model):
    card = json.loads((folder / "assets.extra/model_card.json").read_text())
    assert card["test_accuracy"] == 0.5 and card["preset"] is None
    assert card["params"] == model.count_params()
    flops = {
        name: x["multiply_adds_per_image"]
        for name, x in card["signatures"].items()
    }
    assert flops["fast"] < flops["serving_default"] < flops["accurate"]
    assert (
        flops["fast"]
        == models.cost(
            models.set_routing(model, images_per_group=1, **small.FAST)
        ).macs
    )
    labels = (folder / "assets.extra/labels.txt").read_text().split()
    assert tuple(labels) == small.CLASSES
    assert set(card["versions"]) == {
        "keras_vmoe", "keras", "tensorflow", "python",
    }  # fmt: skip


def test_warmup_requests(folder):
    """As TF Serving reads them."""
    from tensorflow_serving.apis import prediction_log_pb2

    path = folder / "assets.extra" / "tf_serving_warmup_requests"
    asked = []
    for record in tf.data.TFRecordDataset(str(path)):
        log = prediction_log_pb2.PredictionLog.FromString(record.numpy())
        request = log.predict_log.request
        (value,) = request.inputs.values()
        batch = tf.make_ndarray(value).shape[0]
        asked.append((request.model_spec.signature_name, batch))
    names = [*STANDARD, *SIGNATURES]
    assert asked == [(name, batch) for name in names for batch in (1, 8)]
