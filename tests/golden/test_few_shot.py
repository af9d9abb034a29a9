"""Few-shot evaluation of random features, as the reference program does it.

Three sets: more features than examples, fewer, and one whose classes have
unequal numbers of examples.
"""

import json
import pathlib

import numpy as np
import pytest

from keras_vmoe import evaluation
from keras_vmoe.evaluation import fewshot

FOLDER = pathlib.Path(__file__).parent
GOLDEN = dict(np.load(FOLDER / "fewshot.npz"))
CONFIG = json.loads((FOLDER / "fewshot.json").read_text())
SHOTS, SEEDS = CONFIG["shots"], range(CONFIG["seeds"])
SETS = list(CONFIG["num_classes"])
pytestmark = pytest.mark.backends("torch")  # None takes part.


def pair(name, part):
    return GOLDEN[f"{name}/{part}_features"], GOLDEN[f"{name}/{part}_labels"]


def evaluate(name):
    return evaluation.few_shot(
        pair(name, "train"), pair(name, "test"), SHOTS, seeds=SEEDS
    )


def assert_same_hits(accuracy, expected, name):
    """The same number of test images are right; means in float32 are not."""
    count = len(GOLDEN[f"{name}/test_labels"])
    np.testing.assert_allclose(accuracy, expected, rtol=0, atol=1e-7)
    np.testing.assert_array_equal(
        (accuracy * count).round(), (expected * count).round()
    )


@pytest.mark.filterwarnings("ignore:.*fewer examples than shots")
def test_accuracies_and_penalties():
    results = [evaluate(name) for name in SETS]
    for name, result in zip(SETS, results, strict=True):
        assert result.l2_regs == tuple(CONFIG["l2_regs"])
        for seed in SEEDS:
            expected = GOLDEN[f"{name}/seed{seed}/accuracy"]
            assert_same_hits(result.accuracy[seed], expected, name)
    best = evaluation.choose_l2(results, "test")
    assert best == [CONFIG["best_l2"][str(shot)] for shot in SHOTS]
    for name, result in zip(SETS, results, strict=True):
        expected = CONFIG["accuracy_at_best_l2"][name]
        expected = np.array([expected[str(x)] for x in SHOTS]).T
        assert_same_hits(result.accuracy_at(best), expected, name)


@pytest.mark.parametrize("name", SETS)
def test_examples_and_scores(name):
    (x, y), (test, _) = pair(name, "train"), pair(name, "test")
    x, test = x.astype("float64"), test[:32].astype("float64")
    num_classes = CONFIG["num_classes"][name]
    for seed in SEEDS:
        order = fewshot._order(y, num_classes, CONFIG["seed"], seed)
        for shot in SHOTS:
            drawn = np.concatenate([c[:shot] for c in order])
            key = f"{name}/seed{seed}/shot{shot}"
            np.testing.assert_array_equal(drawn, GOLDEN[f"{key}/index"])
    l2_regs = CONFIG["scores_l2"]
    order = fewshot._order(y, num_classes, 0, 0)
    for shot in SHOTS:
        drawn = np.concatenate([c[:shot] for c in order])
        found = fewshot._scores(
            (x[drawn], y[drawn]), [test], l2_regs, num_classes
        )
        for l2, (scores,) in zip(l2_regs, found, strict=True):
            key = f"{name}/seed0/shot{shot}/l2_{l2:g}/scores"
            np.testing.assert_allclose(scores, GOLDEN[key], rtol=0, atol=1e-8)
