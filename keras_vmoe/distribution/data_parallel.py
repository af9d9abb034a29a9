"""Data parallelism on JAX: Keras's, with early errors."""

import keras

from keras_vmoe.distribution._processes import check_agreement

UNKNOWN = -2  # What tf.data says of a length that it cannot tell.


class DataParallel(keras.distribution.DataParallel):
    """Images spread over devices, each of which holds the whole model.

    As `keras.distribution.DataParallel`, but in several processes each reads
    its own part of every batch from a `tf.data.Dataset`, see
    `data.load(shard=...)`, and what would deadlock the processes is refused
    before the first step.

    Args:
        devices: Optional list of devices, as from
            `keras.distribution.list_devices()`; None is all of them.

    Raises:
        ValueError: In `fit`, `evaluate` and `predict`: if the devices do not
            divide a batch, or several processes do not read datasets of full
            batches and of one known length.

    Example:

    >>> parallel = DataParallel()  # doctest: +SKIP
    >>> keras.distribution.set_distribution(parallel)  # doctest: +SKIP
    >>> model = ViTMoE(...); model.fit(...)  # doctest: +SKIP
    """

    def __init__(self, devices=None):
        # True: Keras then takes nothing but datasets from several processes.
        # What it would do with them is `distribute_dataset`'s affair.
        super().__init__(
            devices=devices or keras.distribution.list_devices(),
            auto_shard_dataset=True,
        )

    def distribute_dataset(self, dataset):
        """A `tf.data.Dataset` of this process's part of every batch."""
        if self.num_processes > 1:
            check_full_batches(dataset)
            check_agreement(
                "batches",
                number=int(dataset.cardinality()),
                shapes=_shapes(dataset),
            )
        return dataset

    def get_data_layout(self, data_shape):
        self.check_images(data_shape[0])
        return super().get_data_layout(data_shape)

    def check_images(self, batch_size):
        """Raises unless the devices share the images of a batch evenly."""
        # Keras has the part of this process, `predict` the whole.
        devices = self.device_mesh.devices.size // self.num_processes
        if batch_size is not None and batch_size % devices:
            raise ValueError(
                "The images of a batch are spread evenly over the devices. "
                f"Received: a batch of {batch_size} for {devices} devices. "
                "Choose a batch size that they divide, and drop the remainder."
            )


def check_full_batches(dataset):
    """Raises unless all batches of a dataset are full, and can be counted."""
    shapes = _shapes(dataset)
    if any(shape is None or None in shape[:1] for shape in shapes):
        raise ValueError(
            "In several processes all batches must be full: a short one would "
            "deadlock them. Received: a dataset "
            f"with {dataset.element_spec}. Use "
            "`batch(..., drop_remainder=True)`."
        )
    if int(dataset.cardinality()) == UNKNOWN:
        raise ValueError(
            "In several processes the number of batches must be known and the "
            "same in all. Received: a dataset of unknown cardinality. Use "
            "`tf.data.experimental.assert_cardinality`."
        )


def _shapes(dataset):
    """The shapes of a batch's parts; None where the rank is not known."""
    specs = keras.tree.flatten(dataset.element_spec)
    return [
        None if spec.shape.rank is None else spec.shape.as_list()
        for spec in specs
    ]
