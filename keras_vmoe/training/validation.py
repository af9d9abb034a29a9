"""Validation after every epoch, the same on any number of devices."""

import keras
import numpy as np

from keras_vmoe import distribution


class Validation(keras.callbacks.Callback):
    """Adds the loss and accuracy on a dataset to the logs of every epoch.

    The logs are `val_loss` and `val_accuracy`, as on one device. (Validation in
    `fit` would drop a last batch that several devices cannot share evenly, or
    route it in other groups.) Put it before the callbacks that read the logs.

    Args:
        dataset: Batches of `(images, labels)`, the same in all processes;
            labels are integers `(B,)` or distributions `(B, classes)`.
        loss: Keras loss, or function from labels and logits to `(B,)`.
        average: Optional `keras.callbacks.SwapEMAWeights` of the same `fit`,
            whose averaged weights are evaluated.
    """

    def __init__(self, dataset, loss, average=None):
        super().__init__()
        self.dataset = dataset
        # Without Keras's mean, which tf.distribute divides by replicas.
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
    """Whether each image's class has the largest logit."""
    if labels.ndim > 1:
        labels = labels.argmax(axis=-1)
    return logits.argmax(axis=-1) == labels
