"""How ImageNet's test sets judge logits, by tables worked out by hand."""

import numpy as np
import pytest

from keras_vmoe import evaluation
from keras_vmoe.evaluation import imagenet

pytestmark = pytest.mark.backends("torch")  # None takes part.


def logits_of(*orders, classes=1000):
    """An image each; the classes that are named first have larger logits."""
    logits = np.zeros((len(orders), classes), "float32")
    for row, order in zip(logits, orders, strict=True):
        row[list(order)] = np.arange(len(order), 0, -1)
    return logits


def test_sets_of_200_classes():
    assert len(evaluation.IMAGENET_A) == len(evaluation.IMAGENET_R) == 200
    for classes in (evaluation.IMAGENET_A, evaluation.IMAGENET_R):
        assert list(classes) == sorted(set(classes))
        assert 0 <= min(classes) and max(classes) < 1000
    # 6 is a class of both, 1 of R alone, 0 of none.
    logits = logits_of((0, 1, 6), (6, 1, 0), (1, 0, 6))
    in_a = imagenet.ranked(logits, evaluation.IMAGENET_A)
    in_r = imagenet.ranked(logits, evaluation.IMAGENET_R)
    assert in_a["all"].tolist() == in_r["all"].tolist() == [0, 6, 1]
    assert in_a["of_set"].tolist() == [6, 6, 6]
    assert in_r["of_set"].tolist() == [1, 6, 1]


def test_a_head_of_more_classes():
    ids = [f"n{i:08}" for i in range(1000)]
    # The larger model lacks class 3, and names the others backwards.
    names = ["n99999999", *(x for x in reversed(ids) if x != ids[3])]
    columns = imagenet.columns_of(names, ids)
    assert columns[3] == -1 and columns[999] == 1 and columns[0] == 999
    # Best of all: none of ImageNet's; class 0; class 998.
    logits = logits_of((0, 999), (999, 1), (2, 0))
    found = imagenet.ranked(logits, [998, 999], columns)
    assert found["full"].tolist() == [-1, 0, 998]
    assert found["all"].tolist() == [0, 0, 998]
    assert found["of_set"].tolist()[1:] == [999, 998]
    with pytest.raises(ValueError, match="1 name, such as .'cat'."):
        imagenet.columns_of(["cat"], ids)


def test_sets_of_labels():
    # Two of the three images with labels are right; one has none.
    truths = [np.array([4, 7]), np.array([], int), np.array([5]), 9]
    assert imagenet.accuracy([7, 5, 6, 9], truths) == pytest.approx(2 / 3)
    assert np.isnan(imagenet.accuracy([1], [[]]))


def test_mean_corruption_error():
    # AlexNet's own errors give 1, half of them 1/2, one of 15 doubled 16/15.
    errors = {name: [x] * 5 for name, x in imagenet.ALEXNET_ERROR.items()}
    assert imagenet.mean_corruption_error(errors) == pytest.approx(1)
    half = {name: np.array(x) / 2 for name, x in errors.items()}
    assert imagenet.mean_corruption_error(half) == pytest.approx(0.5)
    errors["fog"] = [0, 0, 0, 0, 10 * imagenet.ALEXNET_ERROR["fog"]]
    assert imagenet.mean_corruption_error(errors) == pytest.approx(16 / 15)
    assert len(errors) == 15
