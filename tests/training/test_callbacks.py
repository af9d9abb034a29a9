import csv
import math
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_vmoe import evaluation
from keras_vmoe import inspection
from keras_vmoe import layers
from keras_vmoe.training import callbacks
from tests.models.definitions import images_of
from tests.models.definitions import tiny


def moe_model(learning_rate=1e-3, noise_std=1.0):
    """A MoE layer inside somebody's own model, nested one level down."""
    tokens = keras.Input((6, 8))
    router = layers.TopKRouter(4, 2, capacity_factor=0.3, noise_std=noise_std)
    inner = keras.Model(
        tokens,
        layers.MoEMLP(4, 16, router, images_per_group=4, name="inner_moe")(
            tokens
        ),
    )
    x = keras.layers.GlobalAveragePooling1D()(tokens + inner(tokens))
    model = keras.Model(tokens, keras.layers.Dense(3)(x))
    model.compile(
        keras.optimizers.SGD(learning_rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def tokens_and_labels(images=10):
    x = np.random.default_rng(0).normal(size=(images, 6, 8)).astype("float32")
    return x, np.arange(images) % 3


def test_routing_history_reaches_the_logs_and_starts_anew_each_epoch():
    model, routing = moe_model(), callbacks.RoutingHistory()
    x, y = tokens_and_labels()
    history = model.fit(
        x, y, batch_size=4, epochs=3, verbose=0, callbacks=[routing]
    ).history
    for name in (
        "auxiliary_loss",
        "dropped_share",
        "min_expert_load",
        "max_expert_load",
    ):
        assert len(history[name]) == 3
        assert all(math.isfinite(value) for value in history[name])
    assert len(routing.epochs) == 3
    layer = routing.epochs[-1]["inner_moe"]
    np.testing.assert_allclose(layer["load_share"].sum(), 1, rtol=1e-5)
    # 4 places per expert: 16 for the 48 choices of a full group of 4 images,
    # and for the 24 of the last two, so that 5/9 are dropped at the least.
    assert 0.55 < history["dropped_share"][-1] < 1
    # Three steps (10 images in batches of 4), counted anew in every epoch.
    layer = inspection.statistics.moe_layers(model)["inner_moe"]
    state = layer.router.statistics.state
    assert float(keras.ops.convert_to_numpy(state.value)[0]) == 3


def test_auxiliary_loss_is_the_difference_between_training_loss_and_task():
    """Without noise and learning, loss = cross-entropy + auxiliary loss."""
    model = moe_model(learning_rate=0.0, noise_std=0.0)
    routing = callbacks.RoutingHistory()
    x, y = tokens_and_labels(8)
    history = model.fit(
        x, y, batch_size=8, verbose=0, shuffle=False, callbacks=[routing]
    ).history
    logits = keras.ops.convert_to_tensor(model.predict(x, verbose=0))
    assert history["auxiliary_loss"][0] > 0
    task = float(
        keras.ops.mean(
            keras.losses.sparse_categorical_crossentropy(
                y, logits, from_logits=True
            )
        )
    )
    difference = history["loss"][0] - task
    assert difference == pytest.approx(history["auxiliary_loss"][0], abs=1e-5)


@pytest.mark.backends("torch")
def test_model_without_moe_layers_logs_nothing():
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    x = np.ones((4, 2), "float32")
    history = model.fit(
        x, x[:, :1], verbose=0, callbacks=[callbacks.RoutingHistory()]
    ).history
    assert set(history) == {"loss"}


def test_nan_stops_with_the_step(tmp_path):
    """And names the last good model, if there is one."""
    guard = callbacks.StopOnNonFiniteLoss(tmp_path / "checkpoints")
    x, y = tokens_and_labels()
    x[5] = np.nan  # In the second batch of four.
    for words in (
        "loss=nan at step 2 of epoch 1. No good model was saved before",
        "loss=nan at step 2 of epoch 1. The last good model is kept at .*check",
    ):
        with pytest.raises(callbacks.NonFiniteLossError, match=words):
            moe_model().fit(
                x, y, batch_size=4, verbose=0, shuffle=False, callbacks=[guard]
            )
        (tmp_path / "checkpoints").mkdir(exist_ok=True)


def test_weights_that_the_last_update_spoils(tmp_path):
    """The epoch's only loss was finite."""
    inputs = keras.Input((2,))
    model = keras.Model(inputs, keras.layers.Dense(1)(inputs))
    model.compile(keras.optimizers.SGD(1e38), "mse")
    guard = callbacks.StopOnNonFiniteLoss()
    x = np.full((4, 2), 100, "float32")
    with pytest.raises(
        callbacks.NonFiniteLossError, match="not finite at the end of epoch 1"
    ):
        model.fit(x, x[:, 0], batch_size=4, verbose=0, callbacks=[guard])


@pytest.mark.backends("torch")
def test_history_file_holds_every_expert(tmp_path):
    routing = callbacks.RoutingHistory()
    history = callbacks.HistoryFile(tmp_path / "history.csv", routing)
    model = moe_model()
    x, y = tokens_and_labels()
    model.fit(x, y, epochs=2, verbose=0, callbacks=[routing, history])
    with open(tmp_path / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    loads = [float(rows[1][f"inner_moe/load_{e}"]) for e in range(4)]
    assert sum(loads) == pytest.approx(1, rel=1e-5)
    assert float(rows[0]["loss"]) == pytest.approx(
        model.history.history["loss"][0]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["history.csv"]


def test_routing_history_per_layer():
    model, routing = moe_model(), callbacks.RoutingHistory(per_layer=True)
    x, y = tokens_and_labels()
    history = model.fit(
        x, y, batch_size=4, epochs=2, verbose=0, callbacks=[routing]
    ).history
    layer = routing.epochs[-1]["inner_moe"]
    assert set(layer) > {"gate_entropy", "importance_cv2", "experts_per_image"}
    for name, value in layer.items():
        if name == "load_share":
            for e, share in enumerate(value):
                logged = history[f"inner_moe/load_{e}"]
                assert len(logged) == 2 and logged[-1] == share
        else:
            assert history[f"inner_moe/{name}"][-1] == value
    assert 0 < layer["gate_entropy"] <= math.log(4)
    # Next to those of the whole model, and only where asked for.
    assert history["dropped_share"] == history["inner_moe/dropped_share"]
    plain = model.fit(
        x, y, verbose=0, callbacks=[callbacks.RoutingHistory()]
    ).history
    assert not [name for name in plain if "/" in name]


@pytest.mark.backends("torch")
def test_per_layer_in_the_csv_of_keras(tmp_path):
    routing = callbacks.RoutingHistory(per_layer=True)
    log = keras.callbacks.CSVLogger(str(tmp_path / "log.csv"))
    x, y = tokens_and_labels()
    moe_model().fit(x, y, epochs=2, verbose=0, callbacks=[routing, log])
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    loads = [float(rows[1][f"inner_moe/load_{e}"]) for e in range(4)]
    np.testing.assert_allclose(
        loads, routing.epochs[1]["inner_moe"]["load_share"], rtol=1e-6
    )


def monitored(router, epochs=1, **arguments):
    """The messages of a monitor over one layer of 4 experts, and warnings."""
    inputs = keras.Input((6, 8))
    images_per_group = router.images_per_group or 2
    layer = layers.MoEMLP(
        4, 16, router, images_per_group=images_per_group, name="moe"
    )
    model = keras.Model(inputs, layer(inputs))
    model.compile(keras.optimizers.SGD(0.0), "mse")
    monitor = callbacks.RoutingMonitor(**arguments)
    x = np.abs(tokens_and_labels(4)[0])
    if isinstance(router, layers.TopKRouter):
        # Everybody wants expert 1, and then expert 2.
        kernel = np.zeros((8, 4), "float32")
        kernel[:, 1], kernel[:, 2] = 2.0, 1.0
        router.gate_layer.kernel.assign(kernel)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(x, x, epochs=epochs, verbose=0, callbacks=[monitor])
    said = [str(w.message) for w in caught if "expert" in str(w.message)]
    assert said == monitor.warnings
    return monitor.warnings


def quiet_router(**arguments):
    return layers.TopKRouter(4, noise_std=0.0, **arguments)


@pytest.mark.backends("jax", "torch")
def test_the_monitor_tells_dead_experts_and_their_layer():
    router = quiet_router(num_selected_experts=2, capacity_factor=4.0)
    first, second = monitored(router, epochs=2)
    assert first.startswith(
        "Epoch 1, moe: experts [0, 3] get less than 0.1 of an even load. To "
    )
    assert second.startswith("Epoch 2, moe: ")
    assert "dropped" not in first


@pytest.mark.backends("jax", "torch")
def test_the_monitor_tells_drops():
    # 12 tokens want the 4 places of expert 1: two thirds are dropped.
    (message,) = monitored(quiet_router(capacity_factor=1.0), min_load=0.0)
    assert message.startswith("Epoch 1, moe: 67% dropped, more than 20%. To")
    assert not monitored(
        quiet_router(capacity_factor=1.0), min_load=0.0, max_dropped_share=0.7
    )


@pytest.mark.backends("torch")
def test_the_monitor_tells_both_in_one_message():
    (message,) = monitored(quiet_router(capacity_factor=1.0))
    assert "experts [0, 2, 3] get less" in message
    assert "; 67% dropped" in message


@pytest.mark.backends("torch")
def test_the_monitor_is_silent_when_all_is_well():
    assert monitored(layers.ExpertChoiceRouter(4, capacity_factor=4.0)) == []
    assert monitored(layers.SoftRouter(4, num_slots=1)) == []


@pytest.mark.parametrize("name", ["min_load", "max_dropped_share"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), "many"])
def test_limits_of_the_monitor(name, value):
    with pytest.raises(
        ValueError, match=f"`{name}` must be a number between 0 and 1. Rec"
    ):
        callbacks.RoutingMonitor(**{name: value})


def events_of(folder):
    """All that TensorBoard finds: `{tag: {step: value or image bytes}}`."""
    import tensorflow as tf

    found = {}
    for path in sorted(folder.rglob("*tfevents*")):
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            event = tf.compat.v1.Event.FromString(record)
            for value in event.summary.value:
                array = tf.make_ndarray(value.tensor)
                found.setdefault(value.tag, {})[event.step] = array
    return found


@pytest.mark.backends("torch")
def test_tensorboard_has_scalars_and_pictures(tmp_path):
    import tensorflow as tf

    routing = callbacks.RoutingHistory()
    board = callbacks.RoutingTensorBoard(tmp_path / "logs")
    x, y = tokens_and_labels()
    moe_model().fit(x, y, epochs=3, verbose=0, callbacks=[routing, board])
    events = events_of(tmp_path / "logs")
    picture = events.pop("inner_moe/load")
    names = {f"inner_moe/load_{e}" for e in range(4)}
    names |= {
        f"inner_moe/{name}"
        for name in routing.epochs[0]["inner_moe"]
        if name != "load_share"
    }
    assert set(events) == names
    for epoch, layers_of_epoch in enumerate(routing.epochs):
        layer = layers_of_epoch["inner_moe"]
        for name in ("dropped_share", "gate_entropy", "auxiliary_loss"):
            got = events[f"inner_moe/{name}"][epoch]
            assert float(got) == pytest.approx(layer[name], rel=1e-6)
        for e, share in enumerate(layer["load_share"]):
            got = events[f"inner_moe/load_{e}"][epoch]
            assert float(got) == pytest.approx(float(share), rel=1e-6)
    # Width, height and a PNG for each.
    assert set(picture) == {0, 1, 2}
    width, height, png = picture[2]
    image = tf.io.decode_png(png).numpy()
    assert image.shape == (int(height), int(width), 3)
    assert image.std() > 0


@pytest.mark.backends("torch")
def test_tensorboard_without_moe_layers_writes_nothing(tmp_path):
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    x = np.ones((4, 2), "float32")
    board = callbacks.RoutingTensorBoard(tmp_path)
    model.fit(x, x[:, :1], verbose=0, callbacks=[board])
    assert events_of(tmp_path) == {}


@pytest.mark.backends("torch")
def test_few_shot_accuracy_every_other_epoch():
    model = moe_model()
    x, y = tokens_and_labels(30)
    few_shot = callbacks.FewShotEvaluation(
        [(x, y)], [(x[:9], y[:9])], every=2, shots=(2, 5), seeds=(0,)
    )
    history = keras.callbacks.History()
    rows = callbacks.HistoryFile("unused")
    rows.on_epoch_end = lambda epoch, logs=None: rows.rows.append(dict(logs))
    model.fit(x, y, epochs=4, verbose=0, callbacks=[few_shot, history, rows])
    seen = [math.isfinite(row["5_shot"]) for row in rows.rows]
    assert seen == [False, True] * 2
    sets = [
        evaluation.extract_features(model, [(x[:n], y[:n])]) for n in (30, 9)
    ]
    found = evaluation.few_shot(*sets, shots=(2, 5))
    expected = found.accuracy_at(evaluation.choose_l2([found]))[0]
    last = [rows.rows[-1][f"{shot}_shot"] for shot in (2, 5)]
    np.testing.assert_allclose(last, expected)
    with pytest.raises(ValueError, match="`every` must be"):
        callbacks.FewShotEvaluation([], [], every=0)
    with pytest.raises(ValueError, match="Received: 'best'"):
        callbacks.FewShotEvaluation([], [], penalty="best")


@pytest.mark.backends("torch")
def test_the_time_of_a_step(monkeypatch):
    clock = iter([0.0, 10.0, 20.0, 26.0, 30.0, 38.0, 40.0, 44.0])
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: next(clock))
    time = callbacks.StepTime(steps=2)
    assert time.seconds_per_step is None
    found = []
    for epoch in range(4):
        time.on_epoch_begin(epoch)
        for batch in range(2):
            time.on_train_batch_end(batch)
        found.append(time.seconds_per_step)
    assert found == [5, 3, 3.5, 3], "of the first epoch, then of the others"


@pytest.mark.backends("torch")
def test_maps_of_experts_for_tensorboard(tmp_path):
    model = tiny()
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(True))
    x, y = images_of(6), np.arange(6)
    maps = callbacks.ExpertMaps(x[:2], tmp_path, every=2)
    model.fit(x, y, epochs=5, verbose=0, callbacks=[maps])
    (path,) = (tmp_path / "experts").iterdir()
    events = tf.compat.v1.train.summary_iterator(str(path))
    values = [(e.step, v) for e in events for v in e.summary.value]
    assert [step for step, _ in values] == [1, 3]
    image = tf.make_ndarray(values[0][1].tensor)[2]
    assert tf.io.decode_png(image).shape[-1] == 3
    with pytest.raises(ValueError, match="`every` must be"):
        callbacks.ExpertMaps(x, tmp_path, every=0)
