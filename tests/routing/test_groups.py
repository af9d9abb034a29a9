"""Capacity, and the way of images into groups and back."""

import numpy as np
import pytest
from keras import ops

from keras_vmoe.routing import capacity
from keras_vmoe.routing._groups import group_tokens
from keras_vmoe.routing._groups import ungroup_tokens
from tests.routing.definitions import capacity_slowly


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "selected", "factor", "slots"),
    [
        # Evenly loaded: 64 choices over 8 experts.
        (64, 8, 1, 1.0, 8),
        (64, 8, 2, 1.0, 16),
        # 9 and 10 slots are rounded up to 12.
        (68, 8, 1, 1.0, 12),
        (64, 8, 1, 1.2, 12),
        # V-MoE: 8 images of 197 tokens, E = 8, K = 2, 5% to spare.
        (8 * 197, 8, 2, 1.05, 416),
        # Never above S, even where S is no multiple of 4; never 0.
        (10, 1, 1, 1.0, 10),
        (6, 2, 2, 5.0, 6),
        (1, 8, 1, 0.01, 1),
        (100, 8, 1, 0.001, 4),
        # Exact fractions: 0.28 * 100 is 28 and 1.1 * 200 is 220. In floating
        # point each of these is a little more, and has 4 slots too many.
        (100, 1, 1, 0.28, 28),
        (400, 1, 1, 0.07, 28),
        (400, 1, 1, 0.55, 220),
        (400, 2, 1, 1.1, 220),
        (400, 8, 2, 2.2, 220),
        # A third of a token more than 4 slots is 8 slots.
        (13, 3, 1, 1.0, 8),
        (12, 3, 1, 1, 4),
        # Long factors and large groups.
        (4 * 10**9, 4, 1, 1.000000001, 1000000004),
        (1000, 10, 1, 1e-5, 4),
    ],
)
def test_capacity(num_tokens, num_experts, selected, factor, slots):
    result = capacity(num_tokens, num_experts, selected, factor)
    assert result == slots
    assert isinstance(result, int)
    slowly = capacity_slowly(num_tokens, num_experts, selected, factor)
    assert slowly == slots


def test_capacity_of_many_sizes():
    for num_tokens in (1, 2, 3, 5, 17, 64, 197):
        for num_experts in (1, 2, 3, 8):
            for selected in {1, num_experts}:
                for factor in (0.1, 0.5, 1.0, 1.05, 2.5, 1 / 3):
                    arguments = (num_tokens, num_experts, selected, factor)
                    assert capacity(*arguments) == capacity_slowly(*arguments)


def test_capacity_of_a_tensor():
    # Exported programs know S only when they run.
    for num_tokens in (1, 10, 68, 1576):
        tensor = ops.convert_to_tensor(num_tokens, dtype="int32")
        assert int(capacity(tensor, 8, 2, 1.05)) == capacity(
            num_tokens, 8, 2, 1.05
        )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 2, 1, 1.0), "num_tokens=0, capacity_factor=1.0, which gives a "
         "capacity of 0"),
        ((8, 0, 1, 1.0), "`num_experts` must be an integer of at least 1. "
         "Received: num_experts=0"),
        ((8, 2.0, 1, 1.0), "Received: num_experts=2.0"),
        ((8, 2, 3, 1.0), "num_selected_experts=3 with num_experts=2. Select "
         "fewer"),
        ((8, 2, 0, 1.0), "num_selected_experts=0 with num_experts=2"),
        ((8, 2, 1, 0), "must be positive.*capacity of 0.*Received: "
         "capacity_factor=0"),
        ((8, 2, 1, -1.05), "must be positive.*Received: "
         "capacity_factor=-1.05"),
        ((8, 2, 1, float("nan")), "finite number. Received: "
         "capacity_factor=nan"),
        ((8, 2, 1, float("inf")), "finite number. Received: "
         "capacity_factor=inf"),
        ((8, 2, 1, "1"), "finite number. Received: capacity_factor='1'"),
        ((8, 2, 1, True), "finite number. Received: capacity_factor=True"),
    ],
)  # fmt: skip
def test_bad_capacity(arguments, words):
    with pytest.raises(ValueError, match=words):
        capacity(*arguments)


def numbered(*shape):
    return np.arange(1, np.prod(shape) + 1, dtype="float32").reshape(shape)


# Images of 2 x 3 tokens with 2 features. A row: batch, images per group, then
# the groups, the tokens in each, and how many of the last group are filling.
GROUPS = [
    (4, 2, 2, 12, 0),
    (4, 4, 1, 24, 0),
    (5, 2, 3, 12, 6),
    (7, 3, 3, 18, 12),
    # Smaller than a group: no filling is spent.
    (3, 8, 1, 18, 0),
    (1, 2, 1, 6, 0),
    (1, 1, 1, 6, 0),
    (3, 1, 3, 6, 0),
    (5, "batch", 1, 30, 0),
]


@pytest.mark.parametrize(
    ("batch", "images_per_group", "groups", "size", "filling"), GROUPS
)
def test_groups_are_consecutive_images(
    batch, images_per_group, groups, size, filling
):
    images = numbered(batch, 2, 3, 2)
    grouped = group_tokens(ops.convert_to_tensor(images), images_per_group)
    tokens = ops.convert_to_numpy(grouped.tokens)
    assert tokens.shape == (groups, size, 2)
    flat = tokens.reshape(-1, 2)
    np.testing.assert_array_equal(flat[: batch * 6], images.reshape(-1, 2))
    assert not flat[batch * 6 :].any()
    whole = images_per_group == "batch"
    full = size if whole else images_per_group * 6
    assert grouped.group_size == full
    if filling:
        mask = ops.convert_to_numpy(grouped.mask).ravel()
        assert mask.tolist() == [True] * (batch * 6) + [False] * filling
    else:
        assert grouped.mask is None
    back = ungroup_tokens(grouped.tokens, images.shape)
    np.testing.assert_array_equal(ops.convert_to_numpy(back), images)


@pytest.mark.parametrize("middle", [(4,), (2, 3), (2, 1, 3), (1,)])
def test_round_trip_of_any_middle_axes(middle):
    inputs = numbered(5, *middle, 3)
    grouped = group_tokens(ops.convert_to_tensor(inputs), 2)
    assert tuple(grouped.tokens.shape) == (3, 2 * np.prod(middle), 3)
    back = ungroup_tokens(grouped.tokens, inputs.shape)
    np.testing.assert_array_equal(ops.convert_to_numpy(back), inputs)


def test_an_empty_batch():
    grouped = group_tokens(ops.zeros((0, 6, 2)), 2)
    back = ungroup_tokens(grouped.tokens, (0, 6, 2))
    assert tuple(back.shape) == (0, 6, 2)


# Only TensorFlow traces a batch without its size.
@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("images_per_group", [1, 2, 8, "batch"])
def test_dynamic_batch(images_per_group):
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec([None, 2, 3, 2])])
    def there_and_back(images):
        groups = group_tokens(images, images_per_group)
        mask = groups.mask
        if mask is None:
            mask = tf.ones(tf.shape(groups.tokens)[:2], tf.bool)
        back = ungroup_tokens(groups.tokens, ops.shape(images))
        return groups.tokens, mask, back

    for batch in (1, 2, 5, 8, 9, 0):
        images = numbered(batch, 2, 3, 2)
        tokens, mask, back = there_and_back(images)
        np.testing.assert_array_equal(back, images)
        np.testing.assert_array_equal(tokens[mask], images.reshape(-1, 2))
        assert int(tf.reduce_sum(tf.cast(mask, "int32"))) == batch * 6
        if images_per_group != "batch":
            assert tokens.shape[1] == images_per_group * 6


@pytest.mark.parametrize("shape", [(2, 3), (3, 4), (2, 6, 1), (12,)])
def test_a_mask_of_another_shape(shape):
    inputs = np.ones((2, 6, 8), "float32")
    with pytest.raises(ValueError, match=r"one value per token.*\(2, 6\)"):
        group_tokens(inputs, 1, np.ones(shape, bool))
