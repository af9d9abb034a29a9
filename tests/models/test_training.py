"""`ViTMoE` in Keras's own loops: fit, evaluate, predict, save, resume."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_vmoe import data
from keras_vmoe import layers
from tests.harness import WITHOUT_GRADIENT
from tests.harness import randomize
from tests.models.definitions import images_of
from tests.models.definitions import tiny

# Two batches of 3 images: a full group of 2 and a partial one.
IMAGES = images_of(6)
LABELS = np.array([0, 3, 9, 1, 5, 4])
BATCH = 3


def small(num_layers=1, **arguments):
    """As few blocks as will do, all of them sparse."""
    moe = {"layers": "every_1", **arguments.pop("moe", {})}
    return tiny(num_layers=num_layers, moe=moe, **arguments)


def compile(model, learning_rate=0.01):
    model.compile(
        keras.optimizers.Adam(learning_rate),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[keras.metrics.SparseCategoricalAccuracy("accuracy")],
    )
    return model


def fit(model, epochs=1):
    history = model.fit(
        IMAGES,
        LABELS,
        batch_size=BATCH,
        epochs=epochs,
        shuffle=False,
        verbose=0,
    )
    return history.history["loss"]


def weights_of(model):
    return [ops.convert_to_numpy(weight) for weight in model.weights]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A noisy run, saved after 2 epochs; its losses and those of its heir."""
    keras.utils.set_random_seed(0)
    path = tmp_path_factory.mktemp("run") / "model.keras"
    model = compile(small(num_layers=2, dropout=0.1, drop_path_rate=0.2))
    start = weights_of(model)
    first = fit(model, epochs=2)
    model.save(path)
    before = model.predict(IMAGES, batch_size=BATCH, verbose=0)
    second = fit(model, epochs=2)

    keras.utils.set_random_seed(1)
    heir = keras.saving.load_model(path)
    after = heir.predict(IMAGES, batch_size=BATCH, verbose=0)
    return {
        "model": model,
        "start": start,
        "heir": heir,
        "losses": (first, second, fit(heir, epochs=2)),
        "predictions": (before, after),
    }


def test_fit_changes_every_weight(resumed):
    for weight, start in zip(
        resumed["model"].weights, resumed["start"], strict=True
    ):
        if not weight.path.endswith(WITHOUT_GRADIENT):
            assert (ops.convert_to_numpy(weight) != start).any(), weight.path
    first, second, _ = resumed["losses"]
    assert second[-1] < first[0]


def test_predictions_of_a_saved_model_are_bit_equal(resumed):
    before, after = resumed["predictions"]
    np.testing.assert_array_equal(after, before)


def test_a_resumed_run_has_the_noise_it_would_have_had(resumed):
    # Routing noise, dropout and drop path are all on; a single draw out of
    # place would show in the losses and in every weight.
    _, expected, got = resumed["losses"]
    np.testing.assert_array_equal(got, expected)
    for weight, other in zip(
        resumed["heir"].weights, weights_of(resumed["model"]), strict=True
    ):
        np.testing.assert_array_equal(
            ops.convert_to_numpy(weight), other, err_msg=weight.path
        )


@pytest.mark.backends("torch")
@pytest.mark.parametrize(
    "kind", ["bytes", "floats", "batch", "dataset", "generator", "validation"]
)
def test_pixels_are_warned_about_once(kind):
    import tensorflow as tf

    model = compile(tiny(moe=None, num_layers=1))
    pixels = np.full((3, 8, 8, 3), 255, "uint8")
    labels = LABELS[:BATCH]
    # Normalized as by ours, and by ImageNet's statistics.
    model.predict(pixels / 127.5 - 1, verbose=0)
    model.evaluate((pixels - 104.0) / 57.0, labels, verbose=0)
    dataset = tf.data.Dataset.from_tensors((pixels, labels))
    floats = dataset.map(lambda x, y: (tf.cast(x, tf.float32), y))
    model.fit(floats, shuffle=False, verbose=0)  # Not read for a warning.
    model._check_pixels(np.zeros((0, 8, 8, 3), "float32"))

    def see():
        if kind == "validation":
            fit = {"validation_data": (pixels, labels), "verbose": 0}
            model.fit(pixels / 127.5 - 1, labels, **fit)
        elif kind == "dataset":
            model.fit(dataset, shuffle=False, verbose=0)
        elif kind == "generator":
            batches = (batch for batch in [(pixels, labels)] * 2)
            model.fit(batches, steps_per_epoch=1, shuffle=False, verbose=0)
        elif kind == "batch":
            model.predict_on_batch(-pixels.astype("float32"))
        else:
            images = pixels if kind == "bytes" else -pixels.astype("float32")
            model.predict(images, verbose=0)

    is_float = kind in ("batch", "floats")
    received = "values up to 255" if is_float else "images of uint8"
    words = rf"model's prepro.*Received: {received}.*`model.preprocessing.norm"
    with pytest.warns(UserWarning, match=words) as warned:
        see()
    (warning,) = (x for x in warned if x.category is UserWarning)
    assert warning.filename == __file__
    see()


@pytest.fixture(scope="module")
def quiet():
    """A model without noise that does not learn."""
    keras.utils.set_random_seed(0)
    return compile(randomize(small(moe={"noise_std": 0.0})), learning_rate=0.0)


def test_auxiliary_losses_are_in_training_and_not_in_evaluate(quiet):
    images, labels = IMAGES[:BATCH], LABELS[:BATCH]
    logits = quiet.predict(images, verbose=0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    plain = float(loss(labels, logits))

    for layer in quiet.moe_layers:
        layer.router.statistics.reset()
    logs = quiet.train_on_batch(images, labels, return_dict=True)
    auxiliary = sum(
        layer.router.statistics.result()["auxiliary_loss"]
        for layer in quiet.moe_layers
    )
    assert auxiliary > 1e-4
    assert logs["loss"] == pytest.approx(plain + auxiliary, rel=1e-5)

    logs = quiet.evaluate(images, labels, verbose=0, return_dict=True)
    assert logs["loss"] == pytest.approx(plain, rel=1e-5)
    assert logs["accuracy"] == pytest.approx(
        np.mean(logits.argmax(-1) == labels), abs=1e-6
    )
    logs = quiet.test_on_batch(images, labels, return_dict=True)
    assert logs["loss"] == pytest.approx(plain, rel=1e-5)


def test_inference_has_no_noise(resumed):
    model = resumed["model"]
    once, twice = (
        model.predict(IMAGES, batch_size=BATCH, verbose=0) for _ in range(2)
    )
    np.testing.assert_array_equal(once, twice)


def test_clone_model(quiet):
    # Keras makes a plain functional model of a functional subclass; its layers
    # are ours, new, with their names.
    clone = keras.models.clone_model(quiet)
    names = [layer.name for layer in quiet.layers]
    assert [layer.name for layer in clone.layers] == names
    assert not {id(w) for w in clone.weights} & {id(w) for w in quiet.weights}
    config = quiet.get_layer("block_0_moe").router.get_config()
    assert clone.get_layer("block_0_moe").router.get_config() == config
    clone.set_weights(quiet.get_weights())
    images = IMAGES[:BATCH]
    np.testing.assert_array_equal(
        clone.predict(images, verbose=0), quiet.predict(images, verbose=0)
    )


def test_weights_files(quiet, tmp_path):
    quiet.save_weights(tmp_path / "model.weights.h5")
    other = small(moe={"noise_std": 0.0})
    other.load_weights(tmp_path / "model.weights.h5")
    for got, expected in zip(weights_of(other), weights_of(quiet), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_frozen_layers_stay():
    model = randomize(small())
    for layer in model.layers:
        layer.trainable = layer.name in ("head", "block_0_moe")
    compile(model)
    before = {w.path: ops.convert_to_numpy(w) for w in model.weights}
    model.train_on_batch(IMAGES[:BATCH], LABELS[:BATCH])
    for weight in model.weights:
        changed = (ops.convert_to_numpy(weight) != before[weight.path]).any()
        frozen = not weight.path.startswith(("head", "block_0_moe"))
        assert changed != frozen, weight.path


@pytest.mark.backends("jax")
def test_the_first_epoch_compiles_all(monkeypatch):
    """Steps of training and validation; one epoch is as good as three."""
    model, run = compile(small()), layers.MoEMLP._run
    calls, counts = [], []

    def counted(self, buffers, training):
        calls.append(self)
        return run(self, buffers, training)

    monkeypatch.setattr(layers.MoEMLP, "_run", counted)
    noted = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: counts.append(len(calls))
    )
    model.fit(
        IMAGES, LABELS, batch_size=BATCH, epochs=3, verbose=0,
        validation_data=(IMAGES, LABELS), callbacks=[noted],
    )  # fmt: skip
    assert counts == [counts[0]] * 3


@pytest.mark.backends("tensorflow")
def test_a_pipeline_that_knows_no_sizes():
    """Such as one that decodes files; and a step of fit is traced once."""
    import tensorflow as tf

    vit = tiny(num_layers=1, moe={"layers": [0]})
    images = images_of(6)
    sizes = (tf.TensorSpec((None, None, 3)), tf.TensorSpec((), tf.int32))
    data = tf.data.Dataset.from_generator(
        lambda: ((image, 0) for image in images), output_signature=sizes
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    vit.compile("adam", loss)
    step, traces = vit.train_step, []
    vit.train_step = lambda data: (traces.append(data), step(data))[1]
    batches = data.batch(3).repeat()
    vit.fit(batches, steps_per_epoch=2, verbose=0, shuffle=False)
    assert len(traces) == 1
    np.testing.assert_allclose(
        vit.predict(data.batch(3).map(lambda x, y: x), steps=2, verbose=0),
        vit.predict(images, batch_size=3, verbose=0),
        atol=1e-5,
    )
    unknown = keras.Input((None, None, 3))
    of_any_size = tf.TensorSpec((None, None, None, 3))
    for model in (
        keras.Model(vit.input, vit.output),
        keras.Sequential([vit]),
        keras.Model(unknown, vit(unknown)),
    ):
        compiled = tf.function(model, [of_any_size], autograph=False)
        np.testing.assert_allclose(compiled(images), vit(images), atol=1e-5)


@pytest.mark.parametrize(
    "library",
    [
        pytest.param("keras", marks=pytest.mark.backends("jax", "torch")),
        pytest.param(  # Under the others it only takes longer.
            "keras_cv", marks=pytest.mark.backends("tensorflow")
        ),
    ],
)
def test_layers_of_others_augment_the_images(library):
    """In tf.data, whatever trains."""
    import keras_cv

    if library == "keras":
        changes = [keras.layers.RandomRotation(0.1), keras.layers.MixUp()]
    else:
        changes = [
            keras_cv.layers.RandomContrast((0, 255), 0.5),
            keras_cv.layers.CutMix(),
        ]
    train = data.load(
        "digits", "train[:32]", 8, 8, True, augmentation=changes
    )  # fmt: skip
    model = tiny(moe=None, num_layers=1)
    model.compile("adam", keras.losses.CategoricalCrossentropy(True))
    history = model.fit(train, epochs=2, shuffle=False, verbose=0).history
    assert np.isfinite(history["loss"]).all()
