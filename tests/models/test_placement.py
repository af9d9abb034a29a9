"""Which blocks hold a MoE layer."""

import pytest

from keras_vmoe.models.placement import moe_blocks

pytestmark = pytest.mark.backends("torch")


@pytest.mark.parametrize(
    ("layers", "num_layers", "blocks"),
    [
        # V-MoE counts over odd blocks: "Every 2" are all of them, "Last 2" the
        # last two of them.
        ("every_2", 12, (1, 3, 5, 7, 9, 11)),
        ("last_2", 12, (9, 11)),
        ("last_1", 12, (11,)),
        ("last_6", 12, (1, 3, 5, 7, 9, 11)),
        # The last block of an odd number of blocks is even.
        ("last_2", 13, (9, 11)),
        ("every_2", 5, (1, 3)),
        ("every_1", 3, (0, 1, 2)),
        ("every_3", 12, (2, 5, 8, 11)),
        ("every_4", 6, (3,)),
        ("every_12", 12, (11,)),
        # Any blocks, in any order.
        ([0], 4, (0,)),
        ([3, 0, 2], 4, (0, 2, 3)),
        ((1, 2), 4, (1, 2)),
        (range(4), 4, (0, 1, 2, 3)),
    ],
)
def test_placement(layers, num_layers, blocks):
    assert moe_blocks(layers, num_layers) == blocks


NAMES = (
    r"must be 'every_<n>', 'last_<n>' \(such as 'every_2' or 'last_2'\) or a "
    "list of block indices. Received: layers="
)
INDICES = (
    "Block indices must be a list of different integers from 0 to 3, at "
    "least one. "
    r"Received: layers="
)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ("evry_2", NAMES + "'evry_2'"),
        ("every_0", NAMES + "'every_0'"),
        ("last_-1", NAMES + "'last_-1'"),
        ("last", NAMES + "'last'"),
        ("", NAMES + "''"),
        ("last_3", "A model of 4 blocks is too small for this many MoE "
         "layers. Received: layers='last_3' .* 'last_<n>' counts over "
         "the 2 odd blocks"),
        ("every_5", "too small for this many.*Received: layers='every_5'"),
        ([4], INDICES + r"\[4\]"),
        ([-1], INDICES + r"\[-1\]"),
        ([1, 1], INDICES + r"\[1, 1\]"),
        ([], INDICES + r"\[\]. A name such as"),
        ([1.0], INDICES + r"\[1.0\]"),
        ("last2", "Received: layers='last2'. Did you mean 'last_2'"),
    ],
)  # fmt: skip
def test_bad_placement(layers, words):
    with pytest.raises(ValueError, match=words):
        moe_blocks(layers, 4)


@pytest.mark.parametrize("layers", [2, None, ["a", 1]])
def test_neither_a_name_nor_indices(layers):
    with pytest.raises(ValueError, match="Received: layers="):
        moe_blocks(layers, 4)
