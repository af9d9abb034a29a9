"""Callbacks for `fit`: routing in the logs, stopping on NaN, atomic files."""

import csv
import io
import math
import pathlib
import warnings

import keras

from keras_vmoe import _files
from keras_vmoe import inspection
from keras_vmoe._checks import is_number
from keras_vmoe._extras import require
from keras_vmoe.distribution import _processes
from keras_vmoe.inspection import _plots


class RoutingHistory(keras.callbacks.Callback):
    """Puts what the routers did into the logs of every epoch.

    Adds the means over the epoch's training steps:

    - `auxiliary_loss`: sum of all MoE layers' weighted auxiliary losses.
    - `dropped_share`: share of the choices that were dropped, in `[0, 1]`.
    - `min_expert_load`, `max_expert_load`: load of the least and the most
      chosen expert of any layer; 1 is an even load.
    - with `per_layer`, for each MoE layer `<layer>/dropped_share`,
      `<layer>/gate_entropy` (mean entropy of the gates, in nats),
      `<layer>/importance_cv2` (squared coefficient of variation of the experts'
      summed gates), `<layer>/experts_per_image` (share of the experts that
      serve an image), `<layer>/auxiliary_loss` and `<layer>/load_<e>`, the
      share of the choices that fell on expert e.

    They are in the logs as metrics are: in what `fit` returns, in `CSVLogger`
    and `TensorBoard`, for `EarlyStopping` to monitor. Put this callback before
    those. (Under JAX a layer cannot update a `keras.Metric` inside of the
    compiled step, so that the means are kept in the routers and read here, once
    per epoch.)

    Args:
        per_layer: Whether to log each layer as well.
        epochs: Statistics of the epochs before, of a run that is resumed.

    Attributes:
        epochs: One dict per epoch, from layer name to that layer's statistics;
            see `inspection.routing_statistics`.

    Example:

    >>> model.fit(x, y, callbacks=[RoutingHistory()])  # doctest: +SKIP
    """

    def __init__(self, per_layer=False, epochs=()):
        super().__init__()
        self.per_layer = per_layer
        self.earlier = list(epochs)
        self.epochs = list(epochs)

    def on_train_begin(self, logs=None):
        self.epochs = list(self.earlier)

    def on_epoch_begin(self, epoch, logs=None):
        inspection.reset_routing_statistics(self.model)

    def on_epoch_end(self, epoch, logs=None):
        layers = inspection.routing_statistics(self.model)
        if not layers:
            return
        self.epochs.append(layers)
        if logs is not None:
            logs.update(_summary(list(layers.values())))
            if self.per_layer:
                logs.update(_columns(layers))


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


class RoutingMonitor(keras.callbacks.Callback):
    """Warns when experts die or a layer drops too much.

    Looks once per epoch at the means over its training steps. An expert whose
    load stays low is trained by few tokens and chosen by fewer still.

    Args:
        min_load: Smallest load of an expert, relative to an even load; below
            it counts as dying.
        max_dropped_share: Largest share of the choices (of the tokens, with
            expert choice) that a layer may drop.

    Attributes:
        warnings: The messages so far, one per epoch and layer at most.

    Example:

    >>> model.fit(x, y, callbacks=[RoutingMonitor()])  # doctest: +SKIP
    """

    def __init__(self, min_load=0.1, max_dropped_share=0.2):
        super().__init__()
        for name, value in (
            ("min_load", min_load),
            ("max_dropped_share", max_dropped_share),
        ):
            if not is_number(value) or not 0 <= value <= 1:
                raise ValueError(
                    f"`{name}` must be a number between 0 and 1. "
                    f"Received: {name}={value!r}. 0.1 is a tenth."
                )
        self.min_load = min_load
        self.max_dropped_share = max_dropped_share
        self.warnings = []

    def on_epoch_begin(self, epoch, logs=None):
        inspection.reset_routing_statistics(self.model)

    def on_epoch_end(self, epoch, logs=None):
        for name, layer in inspection.routing_statistics(self.model).items():
            problems = self._problems(layer)
            if problems:
                message = (
                    f"Epoch {epoch + 1}, {name}: {'; '.join(problems)}. What "
                    "balances the load: larger weights of the auxiliary losses "
                    "(or `update_rate` of a BiasBalancedRouter), more noise, "
                    "fewer experts; what drops less: a larger capacity factor."
                )
                self.warnings.append(message)
                warnings.warn(message, stacklevel=2)

    def _problems(self, layer):
        problems = []
        load = layer["load_share"] * len(layer["load_share"])
        dying = [e for e, share in enumerate(load) if share < self.min_load]
        if dying:
            problems.append(
                f"experts {dying} get less than {self.min_load} of an even load"
            )
        if layer["dropped_share"] > self.max_dropped_share:
            problems.append(
                f"{layer['dropped_share']:.0%} dropped, more than "
                f"{self.max_dropped_share:.0%}"
            )
        return problems


class RoutingTensorBoard(keras.callbacks.Callback):
    """Writes what the routers did for TensorBoard, on every backend.

    Once per epoch the statistics of each MoE layer as scalars, and the load of
    its experts over all epochs of this `fit` as a picture: one row per expert,
    one column per epoch. Needs TensorFlow and matplotlib.

    Args:
        log_dir: Folder of the event files, as of `keras.callbacks.TensorBoard`.

    Raises:
        ImportError: If TensorFlow or matplotlib is missing.

    Example:

    >>> board = RoutingTensorBoard("logs")  # doctest: +SKIP
    >>> model.fit(x, y, callbacks=[board])  # doctest: +SKIP
    """

    def __init__(self, log_dir):
        super().__init__()
        require("matplotlib", "plots")
        self.tensorflow = require("tensorflow", "tensorflow")
        self.log_dir = str(log_dir)
        self.epochs = []
        self.writer = None

    def on_train_begin(self, logs=None):
        self.epochs = []
        if not _processes.is_first_process():
            return  # It only resets the statistics, as all must at once.
        path = pathlib.Path(self.log_dir) / "routing"
        self.writer = self.tensorflow.summary.create_file_writer(str(path))

    def on_epoch_begin(self, epoch, logs=None):
        inspection.reset_routing_statistics(self.model)

    def on_epoch_end(self, epoch, logs=None):
        layers = inspection.routing_statistics(self.model)
        if not layers or self.writer is None:
            return
        self.epochs.append(layers)
        summary = self.tensorflow.summary
        with self.writer.as_default(step=epoch):
            for name, value in _columns(layers).items():
                summary.scalar(name, value)
            for name in layers:
                loads = [layers[name] for layers in self.epochs]
                picture = _plots.load_heatmap(name, loads)
                summary.image(f"{name}/load", picture[None])
        self.writer.flush()

    def on_train_end(self, logs=None):
        if self.writer is not None:
            self.writer.close()


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite."""


class StopOnNonFiniteLoss(keras.callbacks.Callback):
    """Raises as soon as the training loss is NaN or infinite.

    Reads the loss after every step, which waits for the step to finish, and at
    the end of an epoch the weights, which the last update may have spoilt.

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
            received = f"loss={loss} at step {batch + 1}"
            raise NonFiniteLossError(self._message(received))

    def on_epoch_end(self, epoch, logs=None):
        # The last step's loss was computed before the last step's update.
        if not is_finite(self.model):
            received = "weights that are not finite at the end"
            raise NonFiniteLossError(self._message(received))

    def _message(self, received):
        kept = "No good model was saved before."
        if self.checkpoint and pathlib.Path(self.checkpoint).exists():
            kept = f"The last good model is kept at {self.checkpoint}."
        return (
            "The training loss and the weights must stay finite. "
            f"Received: {received} of epoch {self.epoch + 1}. {kept} Start "
            "another run with a lower learning rate or a longer warm-up, or "
            "look for broken images."
        )


def is_finite(model):
    """Whether all trained weights are finite."""
    return all(
        bool(keras.ops.all(keras.ops.isfinite(weight)))
        for weight in model.trainable_weights
    )


class HistoryFile(keras.callbacks.Callback):
    """Writes the logs of all epochs, and every expert's load, as CSV.

    The file is rewritten after every epoch, atomically. The load of expert e
    of a layer is in the column `<layer>/load_<e>`, as a share of the choices.

    Args:
        path: CSV file.
        routing: Optional `RoutingHistory` that stands before this callback.
        rows: Rows of the epochs before, of a run that is resumed.

    Attributes:
        rows: One dict per epoch.

    Example:

    >>> routing = RoutingHistory()
    >>> callbacks = [routing, HistoryFile("history.csv", routing)]
    """

    def __init__(self, path, routing=None, rows=()):
        super().__init__()
        self.path = pathlib.Path(path)
        self.routing = routing
        self.earlier = list(rows)
        self.rows = list(rows)

    def on_train_begin(self, logs=None):
        self.rows = list(self.earlier)

    def on_epoch_end(self, epoch, logs=None):
        row = {"epoch": epoch + 1}
        row |= {name: float(value) for name, value in (logs or {}).items()}
        if self.routing is not None and self.routing.epochs:
            row |= _columns(self.routing.epochs[-1])
        self.rows.append(row)
        if _processes.is_first_process():
            _files.write_text(self.path, _csv(self.rows))


def _columns(layers):
    """All statistics of all layers under names of their own."""
    row = {}
    for name, layer in layers.items():
        for key, value in layer.items():
            if key != "load_share":
                row[f"{name}/{key}"] = value
        for e, share in enumerate(layer["load_share"]):
            row[f"{name}/load_{e}"] = float(share)
    return row


def _csv(rows):
    """Dicts as CSV; the columns are all their keys, in order."""
    text = io.StringIO(newline="")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
