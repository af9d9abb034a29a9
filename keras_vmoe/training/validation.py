"""Validation after every epoch: on several devices the numbers of one."""

import keras
import numpy as np

from keras_vmoe import distribution


class Validation(keras.callbacks.Callback):
    """Puts the loss and accuracy on a dataset into the logs of every epoch.

    `fit` would do so too, but would have to leave a last batch out that several
    devices cannot share evenly, or route its groups otherwise. Here the numbers
    are those of one device, `val_loss` and `val_accuracy`. Put it before the
    callbacks that read the logs.

    Args:
        dataset: Batches of `(images, labels)`, the same in all processes;
            labels are integers `(B,)` or distributions `(B, classes)`.
        loss: Keras loss, or function of labels and logits to `(B,)`.
        average: Optional `keras.callbacks.SwapEMAWeights` of the same `fit`,
            whose averages of the weights are to be measured.

    Example:

    >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    >>> callback = Validation(dataset, loss)  # doctest: +SKIP
    >>> model.fit(x, y, callbacks=[callback])  # doctest: +SKIP
    """

    def __init__(self, dataset, loss, average=None):
        super().__init__()
        self.dataset = dataset
        # Not Keras's mean, which tf.distribute divides by its replicas.
        self.losses = getattr(loss, "call", loss)
        self.average = average

    def on_epoch_end(self, epoch, logs=None):
        if self.average is not None:
            self.average.on_test_begin()
        loss, accuracy = self._measured()
        if self.average is not None:
            self.average.on_test_end()
        if logs is not None:
            logs.update(val_loss=loss, val_accuracy=accuracy)

    def _measured(self):
        """Means over the images of the dataset."""
        sums, count = np.zeros(2), 0
        for images, labels in self.dataset:
            labels = np.asarray(labels)
            logits = distribution.predict(self.model, images)
            losses = keras.ops.convert_to_numpy(self.losses(labels, logits))
            sums += [losses.sum(), _is_right(labels, logits).sum()]
            count += len(labels)
        return (sums / count).tolist()


def _is_right(labels, logits):
    """For each image whether its class has the largest logit."""
    if labels.ndim > 1:
        labels = labels.argmax(axis=-1)
    return logits.argmax(axis=-1) == labels
