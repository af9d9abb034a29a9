"""Keras's data parallelism on JAX, with early errors."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_vmoe._typing import Shape
from keras_vmoe.distribution._processes import check_agreement

UNKNOWN = -2  # tf.data's cardinality of unknown lengths.


class DataParallel(keras.distribution.DataParallel):
    """Images spread over devices, each of which holds the whole model.

    Like `keras.distribution.DataParallel`, but each of several processes reads
    its own part of every batch from a `tf.data.Dataset` (see
    `data.load(shard=...)`), and datasets that would deadlock the processes are
    rejected before the first step.

    Args:
        devices: Optional list of devices, as from
            `keras.distribution.list_devices()`; None means all of them.

    Raises:
        ValueError: In `fit`, `evaluate` and `predict`: if a batch cannot be
            split evenly over the devices, or if the datasets of several
            processes have partial batches or no common, known length.

    Example:

    >>> parallel = DataParallel()  # doctest: +SKIP
    >>> keras.distribution.set_distribution(parallel)  # doctest: +SKIP
    >>> model = ViTMoE(...); model.fit(...)  # doctest: +SKIP
    """

    def __init__(self, devices: Sequence[str] | None = None) -> None:
        # With True, Keras takes only datasets from several processes. It would
        # shard them itself, if `distribute_dataset` were not overridden.
        super().__init__(
            devices=devices or keras.distribution.list_devices(),
            auto_shard_dataset=True,
        )

    def distribute_dataset(self, dataset: Any) -> Any:
        """Returns a `tf.data.Dataset` of this process's part of every batch."""
        if self.num_processes == 1:
            return dataset
        number, shapes = int(dataset.cardinality()), _shapes(dataset)
        if any(shape is None or None in shape[:1] for shape in shapes):
            raise ValueError(
                "In several processes all batches must be full: a short one "
                "would deadlock them. Received: a dataset with "
                f"{dataset.element_spec}. Use "
                "`batch(..., drop_remainder=True)`."
            )
        if number == UNKNOWN:
            raise ValueError(
                "In several processes the number of batches must be known, and "
                "the same in all. Received: a dataset of unknown cardinality. "
                "Use `tf.data.experimental.assert_cardinality`."
            )
        check_agreement("batches", number=number, shapes=shapes)
        return dataset

    def get_data_layout(
        self, data_shape: Shape
    ) -> keras.distribution.TensorLayout:
        self.check_images(data_shape[0])
        return super().get_data_layout(data_shape)

    def check_images(self, batch_size: int | None) -> None:
        """Raises unless a batch can be split evenly over the devices."""
        # Keras passes this process's part of a batch, `predict` all of it.
        devices = self.device_mesh.devices.size // self.num_processes
        if batch_size is not None and batch_size % devices:
            raise ValueError(
                "The images of a batch must split evenly over the devices. "
                f"Received: a batch of {batch_size} for {devices} devices. "
                "Choose a multiple of their number, and drop the remainder."
            )


def _shapes(dataset):
    """The shapes in a batch; None for an unknown rank."""
    specs = keras.tree.flatten(dataset.element_spec)
    return [
        None if spec.shape.rank is None else spec.shape.as_list()
        for spec in specs
    ]
