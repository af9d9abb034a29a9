"""Replicas that share a batch, each of which needs whole groups of images."""

import math

import keras


def num_replicas(strategy):
    """Parts that a distribution or strategy splits a batch into; 1 for None."""
    if strategy is None:
        return 1
    if hasattr(strategy, "num_replicas_in_sync"):
        return strategy.num_replicas_in_sync
    return strategy.num_model_replicas


def check_batch(batch_size, images_per_group, replicas, processes=1):
    """Raises unless each replica gets whole groups of images.

    Args:
        batch_size: Images per step, over all devices of all processes.
        images_per_group: Images that are routed together; 1 without experts.
        replicas: Parts that a batch is split into.
        processes: Processes that read equal parts of it.
    """
    parts = math.lcm(replicas * images_per_group, processes)
    if batch_size % parts:
        raise ValueError(
            "Each device must get the same number of whole groups of images. "
            f"Received: batch_size={batch_size} for {replicas} devices, "
            f"{images_per_group} images per group, {processes} processes. "
            f"Choose a multiple of {parts}, or a smaller images_per_group."
        )


def check_groups(batch_size, images_per_group):
    """`check_batch` inside a replica of tf.distribute; nothing elsewhere.

    A replica never sees the images of the others: a group that spans two of
    them would be routed as two.

    Args:
        batch_size: Images of this replica; None if unknown while tracing.
        images_per_group: Images that are routed together; "batch" for all.
    """
    context = _context()
    if context is None or batch_size is None:
        return
    replicas = context.num_replicas_in_sync
    total = batch_size * replicas
    whole = images_per_group == "batch"
    check_batch(total, total if whole else images_per_group, replicas)


def replica_id():
    """This replica's index inside tf.distribute; None if it is the only one."""
    context = _context()
    return None if context is None else context.replica_id_in_sync_group


def of_sum(function, parts):
    """Applies a function to sums over the replicas of tf.distribute.

    Args:
        function: From a list of tensors to one of the same shapes.
        parts: List of this replica's summands.

    Returns:
        This replica's summands of the results.
    """
    context = _context()
    if context is None:
        return function(parts)
    sums = context.all_reduce("sum", parts)
    return [x / context.num_replicas_in_sync for x in function(sums)]


def _context():
    """The context in one of several replicas of tf.distribute; else None."""
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    is_one = context is None or context.num_replicas_in_sync == 1
    return None if is_one else context
