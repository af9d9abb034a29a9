import keras
import numpy as np
import pytest

from keras_vmoe import evaluation


def identity():
    """The images of this model are their own logits."""
    return keras.Sequential([keras.Input((3,)), keras.layers.Activation(None)])


def test_most_probable_first():
    logits = np.log(np.array([[0.2, 0.7, 0.1], [0.5, 0.1, 0.4]], "float32"))
    found = evaluation.classify(identity(), logits, ["a", "b", "c"], top=2)
    assert [[p.class_name for p in row] for row in found] == [
        ["b", "a"],
        ["a", "c"],
    ]
    probabilities = [[p.probability for p in row] for row in found]
    np.testing.assert_allclose(
        probabilities, [[0.7, 0.2], [0.5, 0.4]], rtol=1e-5
    )


def test_number_of_names():
    with pytest.raises(
        ValueError, match="each of the 3 classes.*Received: 2 class_names"
    ):
        evaluation.classify(identity(), np.zeros((1, 3)), ["a", "b"])


@pytest.mark.parametrize("top", [0, -1])
def test_top(top):
    with pytest.raises(ValueError, match=f"Received: top={top}"):
        evaluation.classify(identity(), np.zeros((1, 3)), ["a"] * 3, top=top)
