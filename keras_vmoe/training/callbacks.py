"""Callbacks for `fit`: routing in the logs, stopping on NaN, atomic files."""

import csv
import math
import pathlib

import keras
import numpy as np

from keras_vmoe import inspection
from keras_vmoe import models


class RoutingHistory(keras.callbacks.Callback):
    """Puts what the routers did into the logs of every epoch.

    Adds the means over the epoch's training steps:

    - `auxiliary_loss`: sum of all MoE layers' weighted auxiliary losses.
    - `dropped_share`: share of the choices that were dropped, in `[0, 1]`.
    - `min_expert_load`, `max_expert_load`: load of the least and the most
      chosen expert of any layer; 1 is an even load.

    Put it before callbacks that write the logs, such as `CSVLogger`.

    Attributes:
        epochs: One dict per epoch, from layer name to that layer's statistics;
            see `inspection.routing_statistics`.

    Example:

    >>> model.fit(x, y, callbacks=[RoutingHistory()])  # doctest: +SKIP
    """

    def __init__(self):
        super().__init__()
        self.epochs = []

    def on_train_begin(self, logs=None):
        self.epochs = []

    def on_epoch_begin(self, epoch, logs=None):
        inspection.reset_routing_statistics(self.model)

    def on_epoch_end(self, epoch, logs=None):
        layers = inspection.routing_statistics(self.model)
        if not layers:
            return
        self.epochs.append(layers)
        if logs is not None:
            logs.update(_summary(list(layers.values())))


def _summary(layers):
    """The numbers of one epoch's log line."""
    loads = [layer["load_share"] for layer in layers]
    dropped = [layer["dropped_share"] for layer in layers]
    return {
        "auxiliary_loss": sum(layer["auxiliary_loss"] for layer in layers),
        "dropped_share": sum(dropped) / len(dropped),
        "min_expert_load": float(min(x.min() * len(x) for x in loads)),
        "max_expert_load": float(max(x.max() * len(x) for x in loads)),
    }


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite."""


class StopOnNonFiniteLoss(keras.callbacks.Callback):
    """Raises as soon as the training loss is NaN or infinite.

    Reads the loss after every step, which waits for the step to finish.

    Args:
        checkpoint: Optional path of the last good model, for the message.

    Raises:
        NonFiniteLossError: With the step, counted from 1.

    Example:

    >>> model.fit(x, y, callbacks=[StopOnNonFiniteLoss()])  # doctest: +SKIP
    """

    def __init__(self, checkpoint=None):
        super().__init__()
        self.checkpoint = checkpoint
        self.epoch = 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        loss = float((logs or {}).get("loss", 0.0))
        if not math.isfinite(loss):
            raise NonFiniteLossError(self._message(batch, loss))

    def _message(self, batch, loss):
        kept = "No good model was saved before."
        if self.checkpoint and pathlib.Path(self.checkpoint).exists():
            kept = f"The last good model is kept at {self.checkpoint}."
        return (
            "The training loss must stay finite. "
            f"Received: loss={loss} at step {batch + 1} of epoch "
            f"{self.epoch + 1}. {kept} Lower the learning rate, lengthen the "
            "warm-up or look for broken images."
        )


class SaveModel(keras.callbacks.Callback):
    """Saves the model after every epoch that leaves it finite, atomically.

    Args:
        path: `.keras` file; always the last good model, whole.

    Example:

    >>> model.fit(x, y, callbacks=[SaveModel("m.keras")])  # doctest: +SKIP
    """

    def __init__(self, path):
        super().__init__()
        self.path = pathlib.Path(path)

    def on_epoch_end(self, epoch, logs=None):
        losses = [v for k, v in (logs or {}).items() if k.endswith("loss")]
        if all(math.isfinite(loss) for loss in losses) and self._is_finite():
            models.save(self.model, self.path)

    def _is_finite(self):
        # The last step's loss was computed before the last step's update.
        return all(
            np.isfinite(keras.ops.convert_to_numpy(weight)).all()
            for weight in self.model.trainable_weights
        )


class HistoryFile(keras.callbacks.Callback):
    """Writes the logs of all epochs, and every expert's load, as CSV.

    The file is rewritten after every epoch, atomically. The load of expert e
    of a layer is in the column `<layer>/load_<e>`, as a share of the choices.

    Args:
        path: CSV file.
        routing: Optional `RoutingHistory` that stands before this callback.

    Attributes:
        rows: One dict per epoch.

    Example:

    >>> routing = RoutingHistory()
    >>> callbacks = [routing, HistoryFile("history.csv", routing)]
    """

    def __init__(self, path, routing=None):
        super().__init__()
        self.path = pathlib.Path(path)
        self.routing = routing
        self.rows = []

    def on_epoch_end(self, epoch, logs=None):
        row = {"epoch": epoch + 1}
        row |= {name: float(value) for name, value in (logs or {}).items()}
        if self.routing is not None and self.routing.epochs:
            row |= _columns(self.routing.epochs[-1])
        self.rows.append(row)
        write_csv(self.path, self.rows)


def _columns(layers):
    row = {}
    for name, layer in layers.items():
        row[f"{name}/dropped_share"] = layer["dropped_share"]
        for e, share in enumerate(layer["load_share"]):
            row[f"{name}/load_{e}"] = float(share)
    return row


def write_csv(path, rows):
    """Writes rows as CSV, atomically.

    Args:
        path: `pathlib.Path` to write.
        rows: List of dicts; the columns are all their keys, in order.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)
