"""What mixes images and labels of a batch: MixUp and CutMix.

Axes: B images in the batch, H and W height and width in pixels.
"""

from keras_vmoe.data.changes import rectangles
from keras_vmoe.data.tensorflow_runtime import import_tensorflow


def _partners(images, labels, seed, alpha):
    """Another image for each, its label, and a share by Beta(alpha, alpha)."""
    tf = import_tensorflow()
    seeds = tf.random.split(seed, 3)
    count = tf.shape(images)[0]
    order = tf.argsort(tf.random.stateless_uniform((count,), seeds[0]))
    mine, other = (
        tf.random.stateless_gamma((count, 1, 1, 1), seeds[i], alpha)
        for i in (1, 2)
    )
    share = tf.math.divide_no_nan(mine, mine + other)
    return tf.gather(images, order), tf.gather(labels, order), share


def mixup(alpha, images, labels, seed):
    """MixUp ([Zhang et al., 2018](https://arxiv.org/abs/1710.09412))."""
    others, their_labels, share = _partners(images, labels, seed, alpha)
    images = share * images + (1 - share) * others
    share = share[:, :, 0, 0]
    return images, share * labels + (1 - share) * their_labels


def cutmix(alpha, images, labels, seed):
    """CutMix ([Yun et al., 2019](https://arxiv.org/abs/1905.04899)).

    The label's share is the area that is really pasted.
    """
    tf = import_tensorflow()
    seeds = tf.random.split(seed, 2)
    others, their_labels, share = _partners(images, labels, seeds[0], alpha)
    side = tf.sqrt(share)
    pasted = rectangles(images, seeds[1], side, side)
    images = tf.where(pasted, others, images)
    share = tf.reduce_mean(tf.cast(pasted, tf.float32), (1, 2, 3))[:, None]
    return images, (1 - share) * labels + share * their_labels
