"""Callbacks for `fit`: routing statistics, stopping on NaN, the history."""

import csv
import io
import math
import os
import pathlib
import statistics
import time
from collections.abc import Iterable
from typing import Any

import keras

from keras_vmoe import _files
from keras_vmoe import inspection
from keras_vmoe._checks import is_number
from keras_vmoe._extras import require
from keras_vmoe._warnings import warn
from keras_vmoe.distribution import _processes
from keras_vmoe.inspection import _plots
from keras_vmoe.training.looking import ExpertMaps
from keras_vmoe.training.looking import FewShotEvaluation
from keras_vmoe.training.looking import Logs

__all__ = [
    "ExpertMaps",
    "FewShotEvaluation",
    "HistoryFile",
    "NonFiniteLossError",
    "RoutingHistory",
    "RoutingMonitor",
    "RoutingTensorBoard",
    "StepTime",
    "StopOnNonFiniteLoss",
]


class _RoutingCallback(keras.callbacks.Callback):
    """Reads the routing statistics of each epoch."""

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        inspection.reset_routing_statistics(self.model)


class RoutingHistory(_RoutingCallback):
    """Adds routing statistics to the logs of every epoch.

    The statistics are means over the epoch's training steps:

    - `auxiliary_loss`: sum of all MoE layers' weighted auxiliary losses.
    - `dropped_share`: share of dropped choices, in `[0, 1]`.
    - `min_expert_load`, `max_expert_load`: load of the least and the most
      loaded expert of any layer; 1 is an even load.
    - with `per_layer`, for each MoE layer: `<layer>/dropped_share`,
      `<layer>/gate_entropy` (mean entropy of the gates, in nats),
      `<layer>/importance_cv2` (squared coefficient of variation of the experts'
      summed gates), `<layer>/experts_per_image` (share of the experts that
      serve an image), `<layer>/auxiliary_loss` and `<layer>/load_<e>`, the
      share of the choices that fell on expert e.

    Other callbacks see them as metrics: `History`, `CSVLogger`, `TensorBoard`,
    `EarlyStopping`. Put this callback before them. (Under JAX a layer cannot
    update a `keras.Metric` inside the compiled step, so the routers keep the
    means and this callback reads them once per epoch.)

    Args:
        per_layer: Whether to log each layer as well.
        epochs: Statistics of earlier epochs, when a run is resumed.

    Attributes:
        epochs: One dict per epoch, from layer name to layer statistics; see
            `inspection.routing_statistics`.

    Example:

    >>> model.fit(x, y, callbacks=[RoutingHistory()])  # doctest: +SKIP
    """

    def __init__(
        self, per_layer: bool = False, epochs: Iterable[dict[str, Any]] = ()
    ) -> None:
        super().__init__()
        self.per_layer = per_layer
        self.earlier = list(epochs)
        self.epochs = list(epochs)

    def on_train_begin(self, logs: Logs = None) -> None:
        self.epochs = list(self.earlier)

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        layers = inspection.routing_statistics(self.model)
        if not layers:
            return
        self.epochs.append(layers)
        if logs is not None:
            logs.update(_summary(list(layers.values())))
            if self.per_layer:
                logs.update(_columns(layers))


def _summary(layers):
    """Statistics over all layers."""
    loads = [layer["load_share"] for layer in layers]
    dropped = [layer["dropped_share"] for layer in layers]
    return {
        "auxiliary_loss": sum(layer["auxiliary_loss"] for layer in layers),
        "dropped_share": sum(dropped) / len(dropped),
        "min_expert_load": float(min(x.min() * len(x) for x in loads)),
        "max_expert_load": float(max(x.max() * len(x) for x in loads)),
    }


class RoutingMonitor(_RoutingCallback):
    """Warns of dying experts and of layers that drop too much.

    Checks the means over each epoch's training steps. An expert with a low load
    is trained on few tokens, and is then chosen by even fewer.

    Args:
        min_load: Load below which an expert counts as dying, relative to an
            even load.
        max_dropped_share: Largest share of the choices (of the tokens, with
            expert choice) that a layer may drop.

    Attributes:
        warnings: The messages so far, at most one per epoch and layer.

    Example:

    >>> model.fit(x, y, callbacks=[RoutingMonitor()])  # doctest: +SKIP
    """

    def __init__(
        self, min_load: float = 0.1, max_dropped_share: float = 0.2
    ) -> None:
        super().__init__()
        self.min_load = min_load
        self.max_dropped_share = max_dropped_share
        for name in ("min_load", "max_dropped_share"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value <= 1:
                raise ValueError(
                    f"`{name}` must be a number between 0 and 1. "
                    f"Received: {name}={value!r}."
                )
        self.warnings: list[str] = []

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        for name, layer in inspection.routing_statistics(self.model).items():
            problems = self._problems(layer)
            if problems:
                message = (
                    f"Epoch {epoch + 1}, {name}: {'; '.join(problems)}. To "
                    "balance the load, increase the weights of the auxiliary "
                    "losses (`update_rate` of a BiasBalancedRouter) or the "
                    "noise, or use fewer experts; to drop less, increase the "
                    "capacity factor."
                )
                self.warnings.append(message)
                warn(message)

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


class RoutingTensorBoard(_RoutingCallback):
    """Writes routing statistics for TensorBoard, on every backend.

    After each epoch it writes the statistics of each MoE layer as scalars, and
    the load of its experts over all epochs of this `fit` as an image: one row
    per expert, one column per epoch. Needs TensorFlow and matplotlib.

    Args:
        log_dir: Folder of the event files, as in `keras.callbacks.TensorBoard`.

    Raises:
        ImportError: If TensorFlow or matplotlib is missing.

    Example:

    >>> board = RoutingTensorBoard("logs")  # doctest: +SKIP
    >>> model.fit(x, y, callbacks=[board])  # doctest: +SKIP
    """

    def __init__(self, log_dir: str | os.PathLike[str]) -> None:
        super().__init__()
        require("matplotlib", "plots")
        self.tensorflow = require("tensorflow", "tensorflow")
        self.log_dir = str(log_dir)
        self.epochs: list[dict[str, Any]] = []
        self.writer: Any = None

    def on_train_begin(self, logs: Logs = None) -> None:
        self.epochs = []
        if not _processes.is_first_process():
            return  # All processes must reset the statistics; one writes.
        path = pathlib.Path(self.log_dir) / "routing"
        self.writer = self.tensorflow.summary.create_file_writer(str(path))

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
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
                heatmap = _plots.load_heatmap(name, loads)
                summary.image(f"{name}/load", heatmap[None])
        self.writer.flush()

    def on_train_end(self, logs: Logs = None) -> None:
        if self.writer is not None:
            self.writer.close()


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite."""


# Not `keras.callbacks.TerminateOnNaN`, which does not name the epoch or the
# last good checkpoint, and misses weights that the last update ruined.
class StopOnNonFiniteLoss(keras.callbacks.Callback):
    """Raises as soon as the training loss is NaN or infinite.

    Reads the loss after every step, which waits for the step to finish. At the
    end of an epoch, also checks the weights, which the last update may ruin.

    Args:
        checkpoint: Optional path of the last good model, for the error.

    Raises:
        NonFiniteLossError: With the step, counted from 1.

    Example:

    >>> model.fit(x, y, callbacks=[StopOnNonFiniteLoss()])  # doctest: +SKIP
    """

    def __init__(
        self, checkpoint: str | os.PathLike[str] | None = None
    ) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.epoch = 0

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        loss = float((logs or {}).get("loss", 0.0))
        if not math.isfinite(loss):
            self._stop(f"loss={loss} at step {batch + 1}")

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        # The last step's loss was computed before the last step's update.
        finite = map(keras.ops.isfinite, self.model.trainable_weights)
        if not all(bool(keras.ops.all(x)) for x in finite):
            self._stop("weights that are not finite at the end")

    def _stop(self, received):
        kept = "No good model was saved before."
        if self.checkpoint and pathlib.Path(self.checkpoint).exists():
            kept = f"The last good model is kept at {self.checkpoint}."
        raise NonFiniteLossError(
            "The training loss and the weights must stay finite. "
            f"Received: {received} of epoch {self.epoch + 1}. {kept} Start "
            "another run with a lower learning rate or a longer warm-up, or "
            "look for corrupt images."
        )


class StepTime(keras.callbacks.Callback):
    """Measures the time per training step, in the median epoch.

    The first epoch, which compiles, counts only if it is the only one. Work
    between epochs, such as validation, does not count.

    Args:
        steps: Steps per epoch.

    Attributes:
        seconds_per_step: None before the first epoch.

    Example:

    >>> StepTime(steps=10).seconds_per_step
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.seconds: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        if batch + 1 == self.steps:
            self.seconds.append(time.perf_counter() - self.start)

    @property
    def seconds_per_step(self) -> float | None:
        """The median over the epochs; the first counts only if it is alone."""
        seconds = self.seconds[1:] or self.seconds
        return statistics.median(seconds) / self.steps if seconds else None


# Not `keras.callbacks.CSVLogger`, which appends: a run killed between a row and
# its checkpoint would have that epoch twice when resumed.
class HistoryFile(keras.callbacks.Callback):
    """Writes the logs of all epochs, and the load of every expert, as CSV.

    The file is rewritten atomically after every epoch. The column
    `<layer>/load_<e>` has the load of expert e as a share of the choices.

    Args:
        path: CSV file.
        routing: Optional `RoutingHistory`, placed before this callback.
        rows: Rows of earlier epochs, when a run is resumed.

    Attributes:
        rows: One dict per epoch.

    Example:

    >>> routing = RoutingHistory()
    >>> callbacks = [routing, HistoryFile("history.csv", routing)]
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        routing: RoutingHistory | None = None,
        rows: Iterable[dict[str, Any]] = (),
    ) -> None:
        super().__init__()
        self.path = pathlib.Path(path)
        self.routing = routing
        self.earlier = list(rows)
        self.rows = list(rows)

    def on_train_begin(self, logs: Logs = None) -> None:
        self.rows = list(self.earlier)

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        row: dict[str, float] = {"epoch": epoch + 1}
        row |= {name: float(value) for name, value in (logs or {}).items()}
        if self.routing is not None and self.routing.epochs:
            row |= _columns(self.routing.epochs[-1])
        self.rows.append(row)
        if _processes.is_first_process():
            _files.write_text(self.path, _csv(self.rows))


def _columns(layers):
    """The statistics of all layers as `<layer>/<name>`."""
    row = {}
    for name, layer in layers.items():
        loads = {f"load_{e}": x for e, x in enumerate(layer["load_share"])}
        for key, value in {**layer, **loads}.items():
            if key != "load_share":
                row[f"{name}/{key}"] = float(value)
    return row


def _csv(rows):
    """Formats dicts as CSV; the columns are all keys, in order."""
    text = io.StringIO(newline="")
    columns = dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
