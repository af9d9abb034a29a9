"""Statistics of experts and patches: numpy functions of routing decisions.

Axes: B images, N patches of an image, E experts, K choices of a patch. A patch
whose expert is -1 has none: it was dropped, or is masked.
"""

from collections.abc import Sequence

import numpy as np
from keras import ops

from keras_vmoe.routing.dropless import DroplessPlan
from keras_vmoe.routing.plans import Plan
from keras_vmoe.routing.plans import SparsePlan


def top_experts(plan: Plan) -> np.ndarray:
    """Returns the experts that serve each token, in the order of its choices.

    Args:
        plan: A `Plan` of token choice, such as from `routing.top_k_plan` or
            `MoEMLP.plan`.

    Returns:
        `(G, S, K)` int32 array; -1 where a choice was dropped or the token is
        masked.

    Raises:
        TypeError: If the plan is not one of token choice.

    Example:

    >>> from keras_vmoe.routing import top_k_plan
    >>> gates = ops.convert_to_tensor([[[0.9, 0.1], [0.7, 0.3]]])
    >>> plan = top_k_plan(gates, num_selected_experts=1, capacity=1)
    >>> top_experts(plan).tolist()
    [[[0], [-1]]]
    """
    if isinstance(plan, DroplessPlan):
        owner = _array(plan.block_expert)
        blocks = top_experts(plan.sparse)
        groups = plan.load.shape[0]
        found = np.where(blocks >= 0, owner[np.maximum(blocks, 0)], -1)
        return found.reshape(groups, -1, found.shape[-1])
    if not isinstance(plan, SparsePlan):
        raise TypeError(
            "Tokens must choose experts for a token to have a top one. "
            f"Received: a {type(plan).__name__}. Look at its own attributes: "
            "an ExpertChoicePlan has the `token` of each slot, a SoftPlan the "
            "weights of all."
        )
    _, num_experts, capacity = plan.choice.shape
    expert = _array(plan.slot) // capacity
    return np.where(expert < num_experts, expert, -1).astype("int32")


def patch_counts(top: np.ndarray, num_experts: int) -> np.ndarray:
    """Counts the patches of each image per expert.

    Args:
        top: `(B, N)` int array, the expert of each patch, or `(B, N, K)`, the
            experts of all its choices; -1 for none.
        num_experts: E.

    Returns:
        `(B, E)` int64 array.

    Raises:
        ValueError: If an expert is not below E.

    Example:

    >>> patch_counts(np.array([[0, 2, 2], [1, 1, -1]]), num_experts=3).tolist()
    [[1, 0, 2], [0, 2, 0]]
    """
    top = np.asarray(top)
    top = top.reshape(len(top), -1)
    _check_below("top", top, num_experts, "num_experts")
    images = np.arange(len(top))[:, None] * (num_experts + 1)
    places = images + np.where(top < 0, num_experts, top)
    counts = np.bincount(places.ravel(), minlength=len(top) * (num_experts + 1))
    return counts.reshape(len(top), num_experts + 1)[:, :num_experts]


def experts_per_image(counts: np.ndarray) -> np.ndarray:
    """Counts the experts that have a patch of each image.

    Args:
        counts: `(B, E)` array of `patch_counts`.

    Returns:
        `(B,)` int64 array.

    Example:

    >>> experts_per_image(np.array([[1, 0, 2], [0, 3, 0]])).tolist()
    [2, 1]
    """
    return (np.asarray(counts) > 0).sum(axis=-1)


def similarity(counts: np.ndarray) -> np.ndarray:
    """Returns how similar the images are whose patches two experts receive.

    `S_ij` is the sum of `c_i + c_j - |c_i - c_j|` over the images where both
    occur, divided by the sum of `c_i + c_j` over those where either does.

    Args:
        counts: `(B, E)` array of `patch_counts`.

    Returns:
        `(E, E)` float64 array, 1 on its diagonal. An expert without patches has
        NaN there and with other experts without patches, and 0 with the rest.

    Example:

    >>> similarity(np.array([[2, 1], [0, 3]])).round(3).tolist()
    [[1.0, 0.333], [0.333, 1.0]]

    Reference:
        [Riquelme et al., 2021](https://arxiv.org/abs/2106.05974), appendix E.
    """
    counts = np.asarray(counts)
    return similarity_of(shared_counts(counts), counts.sum(axis=0))


def shared_counts(counts):
    """`(E, E)` sums over images of the smaller count of two experts."""
    counts = np.asarray(counts)
    found = np.empty((counts.shape[1],) * 2, "int64")
    for expert in range(len(found)):
        smaller = np.minimum(counts, counts[:, expert : expert + 1])
        found[expert] = smaller.sum(axis=0)
    return found


def similarity_of(shared, totals):
    """`similarity` from `shared_counts` and the experts' counts `(E,)`."""
    # `c_i + c_j - |c_i - c_j|` is twice the smaller one: 0 unless both occur.
    sums = totals[:, None] + totals
    return np.where(sums > 0, 2 * shared / np.maximum(sums, 1), np.nan)


def class_counts(
    counts: np.ndarray, labels: np.ndarray | Sequence[int], num_classes: int
) -> np.ndarray:
    """Counts the patches of each class per expert.

    Args:
        counts: `(B, E)` array of `patch_counts`.
        labels: `(B,)` int array of classes.
        num_classes: Number of classes.

    Returns:
        `(num_classes, E)` array.

    Raises:
        ValueError: If a label is not one of the classes.

    Example:

    >>> class_counts(np.array([[1, 0], [0, 2], [3, 0]]), [1, 0, 1], 2).tolist()
    [[0, 2], [4, 0]]
    """
    counts, labels = np.asarray(counts), np.asarray(labels)
    _check_below("labels", labels, num_classes, "num_classes", least=0)
    found = np.zeros((num_classes, counts.shape[1]), counts.dtype)
    np.add.at(found, labels, counts)
    return found


def class_weight(
    gates: np.ndarray,
    top: np.ndarray,
    labels: np.ndarray | Sequence[int],
    num_classes: int,
) -> np.ndarray:
    """Returns the mean weight of each expert for the patches of each class.

    Args:
        gates: `(B, N, E)` array of gates.
        top: `(B, N, K)` int array of the chosen experts; all others have
            weight 0. -1 for none.
        labels: `(B,)` int array of classes.
        num_classes: Number of classes.

    Returns:
        `(num_classes, E)` float64 array; NaN for a class without images.

    Example:

    >>> gates = np.array([[[0.75, 0.25]], [[0.5, 0.5]]])
    >>> class_weight(gates, np.array([[[0]], [[1]]]), [0, 0], 1).tolist()
    [[0.375, 0.25]]

    Reference:
        [Riquelme et al., 2021](https://arxiv.org/abs/2106.05974), section 5.
    """
    images = np.bincount(labels, minlength=num_classes)
    total = class_counts(mean_weight(gates, top), labels, num_classes)
    with np.errstate(invalid="ignore"):
        return total / images[:, None]


def mean_weight(gates, top):
    """`(B, E)`: the mean weight of each expert for an image's patches."""
    gates, top = np.asarray(gates, "float64"), np.asarray(top)
    chosen = (top[..., None] == np.arange(gates.shape[-1])).any(axis=-2)
    return np.where(chosen, gates, 0.0).mean(axis=1)


def patches_cdf(counts: np.ndarray, num_patches: int) -> np.ndarray:
    """Returns the CDF of an expert's patches per image, where it has any.

    Args:
        counts: `(B, E)` array of `patch_counts`.
        num_patches: N.

    Returns:
        `(E, N + 1)` float64 array: at n the share of those images in which the
        expert has at most n patches; NaN for an expert without patches.

    Raises:
        ValueError: If an expert has more than N patches of an image.

    Example:

    >>> patches_cdf(np.array([[1], [2], [0]]), num_patches=2).tolist()
    [[0.0, 0.5, 1.0]]
    """
    return cdf_of(images_by_count(counts, num_patches))


def images_by_count(counts, num_patches):
    """`(E, N + 1)`: the number of images by each expert's patch count."""
    counts = np.asarray(counts)
    _check_below("counts", counts, num_patches + 1, "num_patches + 1", least=0)
    return (counts[..., None] == np.arange(num_patches + 1)).sum(axis=0)


def cdf_of(images):
    """`patches_cdf` from `images_by_count`."""
    images = images.copy()
    images[:, 0] = 0
    upto = images.cumsum(axis=-1)
    with np.errstate(invalid="ignore"):
        return upto / upto[:, -1:]


def spatial_share(
    top: np.ndarray, num_experts: int, grid: tuple[int, int] | None = None
) -> np.ndarray:
    """Returns where in the image each expert has its patches.

    Args:
        top: `(B, N)` int array, the expert of each patch; -1 for none.
        num_experts: E.
        grid: `(rows, columns)` of the patches; None means a square.

    Returns:
        `(E, rows, columns)` float64 array: the share of the images in which the
        expert has the patch at that place. Each place sums to 1 over the
        experts if every patch has one.

    Raises:
        ValueError: If N is not rows times columns.

    Example:

    >>> spatial_share(np.array([[0, 0, 1, 1]]), 2).tolist()
    [[[1.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 1.0]]]
    """
    top = np.asarray(top)
    side = round(top.shape[1] ** 0.5)
    rows, columns = grid or (side, side)
    if rows * columns != top.shape[1]:
        raise ValueError(
            "`grid` must be the rows and columns of the patches. Received: "
            f"grid={(rows, columns)} for {top.shape[1]} patches. Pass it: "
            "spatial_share(top, num_experts, grid=(rows, columns))."
        )
    share = (top == np.arange(num_experts)[:, None, None]).mean(axis=1)
    return share.reshape(num_experts, rows, columns)


def _check_below(name, values, end, words, least=-1):
    """Raises unless all values are from `least` to below `end`."""
    wrong = values[(values < least) | (values >= end)]
    if wrong.size:
        raise ValueError(
            f"`{name}` must be at least {least} and below {words}={end}. "
            f"Received: {wrong[0]}."
        )


def _array(x):
    return ops.convert_to_numpy(x)
