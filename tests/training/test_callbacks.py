import csv
import math

import keras
import numpy as np
import pytest

from keras_vmoe import inspection
from keras_vmoe import layers
from keras_vmoe.training import callbacks


def moe_model(learning_rate=1e-3, noise_std=1.0):
    """A MoE layer inside somebody's own model, nested one level down."""
    tokens = keras.Input((6, 8))
    router = layers.TopKRouter(4, 2, capacity_factor=0.3, noise_std=noise_std)
    inner = keras.Model(
        tokens, layers.MoEMLP(4, 16, router, 4, name="inner_moe")(tokens)
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


def test_model_without_moe_layers_logs_nothing():
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    x = np.ones((4, 2), "float32")
    history = model.fit(
        x, x[:, :1], verbose=0, callbacks=[callbacks.RoutingHistory()]
    ).history
    assert set(history) == {"loss"}


def test_nan_stops_with_the_step_and_keeps_the_last_good_model(tmp_path):
    model, path = moe_model(), tmp_path / "model.keras"
    x, y = tokens_and_labels()
    guard = callbacks.StopOnNonFiniteLoss(path)
    save = callbacks.SaveModel(path)
    model.fit(x, y, batch_size=4, verbose=0, callbacks=[guard, save])
    good = path.read_bytes()
    x[5] = np.nan  # In the second batch of four.
    with pytest.raises(
        callbacks.NonFiniteLossError,
        match=r"loss=nan at step 2 of epoch 1.*last good model is kept at",
    ):
        model.fit(
            x,
            y,
            batch_size=4,
            verbose=0,
            shuffle=False,
            callbacks=[guard, save],
        )
    assert path.read_bytes() == good


def test_nan_without_a_saved_model_says_so():
    guard = callbacks.StopOnNonFiniteLoss()
    with pytest.raises(
        callbacks.NonFiniteLossError, match="No good model was saved before"
    ):
        guard.on_train_batch_end(0, {"loss": float("inf")})


@pytest.mark.parametrize("name", ["loss", "val_loss"])
def test_epoch_with_a_nan_is_not_saved(tmp_path, name):
    save = callbacks.SaveModel(tmp_path / "model.keras")
    save.set_model(moe_model())
    save.on_epoch_end(0, {"loss": 1.0, name: float("nan")})
    assert not list(tmp_path.iterdir())


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
