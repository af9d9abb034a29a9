"""Groups of tokens that are routed together, and the capacity of experts."""

import functools
import math
from fractions import Fraction
from typing import Any
from typing import NamedTuple

import keras
from keras import ops

from keras_vmoe._checks import check_mask
from keras_vmoe._checks import is_integer
from keras_vmoe._checks import is_number
from keras_vmoe._typing import Tensor

# The capacity is a multiple of this, as in V-MoE.
CAPACITY_MULTIPLE = 4


def capacity(
    num_tokens: int | Tensor,
    num_experts: int,
    num_selected_experts: int,
    capacity_factor: float,
) -> int | Tensor:
    """Returns the slots that each expert has for the tokens of one group.

    `ceil(S * K * capacity_factor / E)`, rounded up to a multiple of 4, never
    above S. (V-MoE's "expert's buffer capacity" `B_e`; the rounding follows the
    authors' code.)

    The arithmetic is exact: `1.05` means 105/100, not the binary number next to
    it. It uses integers only, and S may be a symbolic dimension.

    Args:
        num_tokens: S, tokens in the group; an int or a scalar int tensor.
        num_experts: E.
        num_selected_experts: K.
        capacity_factor: Capacity relative to a perfectly even load. 1.0 is just
            enough when every expert gets the same number of tokens.

    Returns:
        C, of the type of `num_tokens`.

    Raises:
        ValueError: If a count is below 1, or the factor is not positive.

    Example:

    >>> capacity(197 * 8, num_experts=8, num_selected_experts=2,
    ...          capacity_factor=1.05)
    416

    Reference:
        [Riquelme et al., 2021](https://arxiv.org/abs/2106.05974)
    """
    check_selection(num_experts, num_selected_experts)
    check_capacity_factor(capacity_factor)
    if is_integer(num_tokens):
        num_tokens = int(num_tokens)
    factor = Fraction(str(float(capacity_factor)))
    slots = num_selected_experts * factor / num_experts
    step = CAPACITY_MULTIPLE * slots.denominator
    # One ceiling does both roundings: ceil(ceil(x) / 4) is ceil(x / 4).
    blocks = ceil_divide(num_tokens * slots.numerator, step)
    if isinstance(num_tokens, int) and num_tokens < 1:
        raise ValueError(
            "Each expert needs a slot for at least 1 token. Received: "
            f"num_tokens={num_tokens}, capacity_factor={capacity_factor}, "
            "which gives a capacity of 0."
        )
    return smallest(blocks * CAPACITY_MULTIPLE, num_tokens)


def ceil_divide(count, size):
    """`ceil(count / size)` of nonnegative integers or integer tensors.

    Not `-(-count // size)`: ONNX rounds the quotient of a negative number up.
    """
    return (count + size - 1) // size


def smallest(*sizes):
    """Returns the smallest of some sizes, each an int or a symbolic size."""
    if all(isinstance(size, int) for size in sizes):
        return min(sizes)
    return functools.reduce(_symbolic("min", sizes), sizes)


def largest(*sizes):
    """Returns the largest of some sizes; see `smallest`."""
    if all(isinstance(size, int) for size in sizes):
        return max(sizes)
    return functools.reduce(_symbolic("max", sizes), sizes)


def _symbolic(name, sizes):
    """Returns `min` or `max` for two sizes, which JAX may keep symbolic."""
    if keras.backend.backend() == "jax":
        import jax

        if any(map(jax.export.is_symbolic_dim, sizes)):
            return getattr(jax.core, f"{name}_dim")
    return getattr(ops, f"{name}imum")


def check_capacity_factor(capacity_factor):
    """Raises unless `capacity_factor` is a positive, finite number."""
    if not is_number(capacity_factor):
        raise ValueError(
            "`capacity_factor` must be a finite number. "
            f"Received: capacity_factor={capacity_factor!r}. "
            "V-MoE trains with 1.05."
        )
    if capacity_factor <= 0:
        raise ValueError(
            "`capacity_factor` must be positive: with 0 every expert has a "
            "capacity of 0 and all tokens are dropped. "
            f"Received: capacity_factor={capacity_factor}. "
            "V-MoE trains with 1.05."
        )


def check_selection(num_experts, num_selected_experts):
    """Raises unless `1 <= K <= E`, both integers."""
    if not is_integer(num_experts) or num_experts < 1:
        raise ValueError(
            "`num_experts` must be an integer of at least 1. "
            f"Received: num_experts={num_experts!r}. "
            "Set moe=None for a dense model."
        )
    if (
        not is_integer(num_selected_experts)
        or not 1 <= num_selected_experts <= num_experts
    ):
        raise ValueError(
            "`num_selected_experts` must be an integer between 1 and the "
            "number of experts. Received: "
            f"num_selected_experts={num_selected_experts!r} with "
            f"num_experts={num_experts}. Select fewer experts or add some."
        )


class TokenGroups(NamedTuple):
    """Tokens in routing groups.

    Attributes:
        tokens: `(G, S, D)`.
        mask: `(G, S)` bool, False for padding; None if there is none.
        group_size: Tokens in a full group. `tokens` holds fewer only when the
            whole batch is smaller than one group.
        images_per_group: Images that the tokens of a group belong to, padding
            included.
    """

    tokens: Any
    mask: Any
    group_size: Any
    images_per_group: Any


def group_tokens(inputs, images_per_group, mask=None):
    """Splits a batch into groups of consecutive images.

    A partial group behaves as if it were padded with masked tokens. If the
    batch is smaller than one group and its size is known, no padding is added:
    the group stays small and records the size of a full one.

    Args:
        inputs: `(B, ..., D)` tensor.
        images_per_group: Images per group, or `"batch"` for one group per
            batch.
        mask: Optional `(B, ...)` bool tensor, False for tokens to leave out.

    Returns:
        A `TokenGroups`.
    """
    shape = ops.shape(inputs)
    batch, features = shape[0], shape[-1]
    if mask is not None:
        mask = ops.convert_to_tensor(mask, dtype="bool")
        check_mask(mask, inputs.shape[:-1])
        if not all(isinstance(size, int) for size in shape):
            # Fails in the graph if the shape is wrong; a reshape would not.
            mask = ops.logical_and(mask, ops.ones(shape[:-1], "bool"))
    num_tokens = math.prod(shape[1:-1])
    total = batch * num_tokens

    def split(groups, images, group_size):
        size = images * num_tokens
        tokens = ops.reshape(inputs, (groups, size, features))
        kept = None if mask is None else ops.reshape(mask, (groups, size))
        return TokenGroups(tokens, kept, group_size, images)

    static = isinstance(batch, int)
    if static and batch == 0:
        return split(0, 1, num_tokens)
    if images_per_group == "batch":
        return split(1, batch, total)
    group_size = images_per_group * num_tokens
    if static and batch < images_per_group:
        return split(1, batch, group_size)
    groups = ceil_divide(batch, images_per_group)
    if static and batch == groups * images_per_group:
        return split(groups, images_per_group, group_size)
    padding = groups * group_size - total
    inputs = ops.reshape(inputs, (total, features))
    inputs = ops.pad(inputs, ((0, padding), (0, 0)))
    if mask is None:
        mask = ops.arange(total + padding, dtype="int32") < total
    else:
        mask = ops.pad(ops.reshape(mask, (total,)), ((0, padding),))
    return split(groups, images_per_group, group_size)


def ungroup_tokens(tokens, shape):
    """Restores the images from groups; undoes `group_tokens`.

    Args:
        tokens: `(G, S, D)` tensor.
        shape: `(B, ..., D)`, the shape before grouping, as returned by
            `ops.shape`.

    Returns:
        Tensor of shape `shape`, without the padding.
    """
    num_tokens = math.prod(shape[:-1])
    groups, group_size, features = ops.shape(tokens)
    tokens = ops.reshape(tokens, (groups * group_size, features))
    if not _same_size(num_tokens, groups * group_size):
        tokens = tokens[:num_tokens]
    return ops.reshape(tokens, shape)


def _same_size(first, second):
    """Whether two sizes are known to be equal."""
    return isinstance(first, int) and first == second
