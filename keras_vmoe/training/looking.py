"""Callbacks that evaluate a model or visualize its experts in training."""

import os
import pathlib
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any
from typing import Literal
from typing import TypeAlias

import keras
import numpy as np

from keras_vmoe import evaluation
from keras_vmoe import inspection
from keras_vmoe._checks import check_sizes
from keras_vmoe._extras import require
from keras_vmoe.distribution import _processes
from keras_vmoe.evaluation.fewshot import L2_REGS
from keras_vmoe.evaluation.fewshot import check_rule
from keras_vmoe.evaluation.fewshot import check_settings
from keras_vmoe.evaluation.fewshot import l2_regs_for
from keras_vmoe.inspection import _plots
from keras_vmoe.inspection import pictures
from keras_vmoe.inspection.inspecting import layers_to_look_at

Logs: TypeAlias = dict[str, Any] | None


class ExpertMaps(keras.callbacks.Callback):
    """Writes which expert sees which part of some images, for TensorBoard.

    After every n-th epoch it writes a picture of all MoE layers, as in the
    report of `inspection.inspect`. Needs TensorFlow and matplotlib.

    Args:
        images: `(images, H, W, channels)` array, normalized for the model.
        log_dir: Folder of the event files, as in `keras.callbacks.TensorBoard`.
        every: Epochs between pictures.

    Raises:
        ImportError: If TensorFlow or matplotlib is missing.
        ValueError: If `every` is not an integer of at least 1, or the model has
            no MoE layers, or is an ensemble.

    Example:

    >>> maps = ExpertMaps(images[:4], "logs", every=5)  # doctest: +SKIP
    >>> model.fit(x, y, callbacks=[maps])  # doctest: +SKIP
    """

    def __init__(
        self,
        images: np.ndarray,
        log_dir: str | os.PathLike[str],
        every: int = 1,
    ) -> None:
        super().__init__()
        check_sizes(every=every)
        require("matplotlib", "plots")
        self.tensorflow = require("tensorflow", "tensorflow")
        self.images, self.log_dir, self.every = images, str(log_dir), every
        self.writer: Any = None

    def on_train_begin(self, logs: Logs = None) -> None:
        layers_to_look_at(self.model)  # Raises before training.

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        if (epoch + 1) % self.every or not _processes.is_first_process():
            return
        if self.writer is None:
            path = pathlib.Path(self.log_dir) / "experts"
            summary = self.tensorflow.summary
            self.writer = summary.create_file_writer(str(path))
        found = inspection.inspect(
            self.model,
            [self.images],
            num_examples=len(self.images),
            capacities=(),
        )
        picture = _plots.pixels_of(pictures.expert_maps(found))
        with self.writer.as_default(step=epoch):
            self.tensorflow.summary.image("experts", picture[None])
        self.writer.flush()

    def on_train_end(self, logs: Logs = None) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None


class FewShotEvaluation(keras.callbacks.Callback):
    """Adds few-shot accuracies to the logs of every n-th epoch.

    The logs are named `"<shot>_shot"`; see `evaluation.few_shot`. Callbacks
    after this one see them as metrics, NaN in the epochs between.

    Args:
        train: Batches of `(images, labels)` to draw examples from, such as
            `data.load(..., training=False)`; read at every evaluation.
        test: Batches of the test images.
        every: Epochs between evaluations.
        shots: Numbers of examples per class.
        penalty: `"held_out"`, `"test"` or a number; see
            `evaluation.choose_l2`.
        seeds: Seeds for choosing examples. Their accuracies are averaged.

    Raises:
        ValueError: If `every` is not an integer of at least 1.

    Example:

    >>> few_shot = FewShotEvaluation(train, test, every=5)  # doctest: +SKIP
    >>> model.fit(x, y, callbacks=[few_shot])  # doctest: +SKIP
    """

    def __init__(
        self,
        train: Iterable[tuple[Any, Any]],
        test: Iterable[tuple[Any, Any]],
        every: int = 1,
        shots: Sequence[int] = (1, 5, 10, 25),
        penalty: Literal["held_out", "test"] | float = "held_out",
        seeds: Sequence[int] = (0, 1, 2),
    ) -> None:
        super().__init__()
        check_sizes(every=every)
        check_rule(penalty)
        check_settings(tuple(shots), L2_REGS, tuple(seeds))
        self.train, self.test, self.every = train, test, every
        self.shots, self.penalty, self.seeds = shots, penalty, seeds

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        if logs is None:
            return
        if (epoch + 1) % self.every:
            logs.update(dict.fromkeys(self._names(), float("nan")))
            return
        train, test = (
            evaluation.extract_features(self.model, dataset)
            for dataset in (self.train, self.test)
        )
        found = evaluation.few_shot(
            train, test, self.shots, l2_regs_for(self.penalty), self.seeds
        )
        chosen = evaluation.choose_l2([found], self.penalty)
        accuracy = found.accuracy_at(chosen).mean(axis=0)
        logs.update(zip(self._names(), map(float, accuracy), strict=True))

    def _names(self):
        return [f"{shot}_shot" for shot in self.shots]
