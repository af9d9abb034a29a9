"""MixUp and CutMix, which mix the images and labels of a batch.

Axes: B images in the batch, H and W height and width in pixels.
"""

from keras_vmoe.data.changes import span
from keras_vmoe.data.tensorflow_runtime import tf


def _partners(images, labels, seed, alpha):
    """Images, partners, partners' labels, shares from Beta(alpha, alpha)."""
    seeds = tf.random.split(seed, 3)
    count = tf.shape(images)[0]
    order = tf.argsort(tf.random.stateless_uniform((count,), seeds[0]))
    mine, other = (
        tf.random.stateless_gamma((count,), seeds[i], alpha) for i in (1, 2)
    )
    share = tf.math.divide_no_nan(mine, mine + other)
    # Gathered before the cast: images are mostly still bytes.
    images, others = (
        tf.cast(x, tf.float32) for x in (images, tf.gather(images, order))
    )
    return images, others, tf.gather(labels, order), share


def mixup(alpha, images, labels, seed):
    """MixUp ([Zhang et al., 2018](https://arxiv.org/abs/1710.09412))."""
    images, others, their_labels, share = _partners(images, labels, seed, alpha)
    weight = tf.reshape(share, (-1, 1, 1, 1))
    images = others + weight * (images - others)
    share = share[:, None]
    return images, share * labels + (1 - share) * their_labels


def cutmix(alpha, images, labels, seed):
    """CutMix ([Yun et al., 2019](https://arxiv.org/abs/1905.04899)).

    Labels are mixed by the share of the pasted area.
    """
    seeds = tf.random.split(seed, 3)
    images, others, their_labels, share = _partners(
        images, labels, seeds[0], alpha
    )
    shape = tf.shape(images)
    inside = []
    for size, seed in ((shape[1], seeds[1]), (shape[2], seeds[2])):
        center = tf.random.stateless_uniform((shape[0],), seed)
        begin, end = span(center, tf.sqrt(share), tf.cast(size, tf.float32))
        place = tf.range(size)
        is_inside = (begin[:, None] <= place) & (place < end[:, None])
        inside.append(tf.cast(is_inside, tf.float32))
    rows, columns = inside
    # Arithmetic, because `tf.where` is slow. The channels are in the columns,
    # because broadcasting few numbers is slow.
    columns_of_all = tf.repeat(columns, shape[3], axis=1)
    pasted = rows[:, :, None] * columns_of_all[:, None]
    pasted = tf.reshape(pasted, shape)
    images += pasted * (others - images)
    share = tf.reduce_mean(rows, 1) * tf.reduce_mean(columns, 1)
    share = share[:, None]
    return images, (1 - share) * labels + share * their_labels
