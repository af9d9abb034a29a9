"""Few-shot evaluation: the choice of the penalty, and what it refuses."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from keras_vmoe import data
from keras_vmoe import evaluation
from keras_vmoe import training
from keras_vmoe.evaluation import fewshot
from tests.commands import run

pytestmark = pytest.mark.backends("torch")  # None takes part.
RULES = "must be chosen by one of .'held_out', 'test'., or be a number"


def clusters(per_class, seed=0, num_classes=3, noise=1.0):
    generator = np.random.default_rng(seed)
    labels = np.arange(num_classes).repeat(per_class)
    features = np.eye(num_classes, 5)[labels] * 2
    return features + noise * generator.normal(size=features.shape), labels


def test_a_ridge_regression_by_its_definition():
    # One example of each of two classes: the classifier is a line between.
    train = np.array([[0.0], [2.0]]), np.array([0, 1])
    test = np.array([[0.9], [1.1]]), np.array([0, 1])
    found = evaluation.few_shot(train, test, shots=(1,), l2_regs=(1e-3,))
    assert found.accuracy.shape == (1, 1, 1) and found.accuracy[0, 0, 0] == 1


def test_more_shots_hold_those_of_fewer():
    train, test = clusters(40), clusters(50, seed=1)
    found = evaluation.few_shot(
        train, test, shots=(1, 5, 25), seeds=range(3), seed_offset=2
    )
    mean = found.accuracy.max(axis=-1).mean(axis=0)
    assert mean[0] < mean[2]
    other = evaluation.few_shot(train, test, shots=(1, 5, 25), seeds=range(3))
    assert (other.accuracy != found.accuracy).any(), "seed_offset draws others"


def test_the_penalty_is_chosen_on_images_that_are_not_tested():
    train, test = clusters(40), clusters(50, seed=1)
    found = evaluation.few_shot(train, test, shots=(2, 10), seeds=range(2))
    # 50 test images per class: all 30 training images left are judged.
    assert found.held_out_accuracy.shape == found.accuracy.shape == (2, 2, 30)
    hits = found.held_out_accuracy * 3 * 30
    np.testing.assert_allclose(hits, hits.round(), atol=1e-9)
    chosen = evaluation.choose_l2([found])
    ranks = np.argsort(np.argsort(found.held_out_accuracy, kind="stable"))
    best = ranks.mean(axis=0).argmax(axis=-1)
    assert chosen == [found.l2_regs[i] for i in best]
    assert evaluation.choose_l2([found], 1024.0) == [1024.0, 1024.0]
    accuracy = found.accuracy_at(chosen)
    np.testing.assert_array_equal(accuracy[:, 0], found.accuracy[:, 0, best[0]])


def test_few_examples():
    train, test = clusters(4), clusters(5, seed=1)
    words = "3 of 3 classes have fewer examples than shots: class 0 has 4 of 9"
    with pytest.warns(UserWarning, match=words):
        found = evaluation.few_shot(train, test, shots=(1, 9))
    with pytest.raises(ValueError, match="must be left to choose a penalty"):
        evaluation.choose_l2([found])
    assert len(evaluation.choose_l2([found], "test")) == 2
    with pytest.raises(ValueError, match=RULES):
        evaluation.choose_l2([found], "best")
    with pytest.raises(ValueError, match="Received: rule=3.0. Pass it to"):
        evaluation.choose_l2([found], 3.0)
    with pytest.raises(ValueError, match=r"that were tried, .*Received: .3.0"):
        found.accuracy_at(3.0)


def test_labels_need_not_be_dense():
    train, test = clusters(9), clusters(5, seed=1)
    expected = evaluation.few_shot(train, test, shots=(2,)).accuracy
    sparse = [(x, y * 10**6) for x, y in (train, test)]
    found = evaluation.few_shot(*sparse, shots=(2,)).accuracy
    np.testing.assert_array_equal(found, expected)


def test_results_of_other_kinds():
    train, test = clusters(9), clusters(5, seed=1)
    found = [
        evaluation.few_shot(train, test, shots=(2,), l2_regs=l2_regs)
        for l2_regs in ((1.0, 2.0), (4.0, 2.0))
    ]
    with pytest.raises(ValueError, match="Received: 2 of 2 kinds"):
        evaluation.choose_l2(found)
    with pytest.raises(ValueError, match="Received: 0 of 0 kinds"):
        evaluation.choose_l2([])


def test_one_shot_one_seed_one_penalty():
    train, test = clusters(9), clusters(5, seed=1)
    found = evaluation.few_shot(train, test, shots=2, l2_regs=7, seeds=3)
    assert found.accuracy.shape == (1, 1, 1)
    assert evaluation.choose_l2(found, 7) == [7]
    assert found.accuracy_at(7) == found.accuracy[..., 0]


def replaced(pair, features=None, labels=None):
    return (
        pair[0] if features is None else features,
        pair[1] if labels is None else labels,
    )


TRAIN, TEST = clusters(4), clusters(2, seed=1)
NAN = TRAIN[0].copy()
NAN[7, 1] = np.nan


@pytest.mark.parametrize(
    ("train", "test", "options", "words"),
    [
        (replaced(TRAIN, NAN), TEST, {}, r"in 1 image \(counted from 0: 7\)"),
        (TRAIN, replaced(TEST, labels=TEST[1] + 1), {},
         r"must have a training example. Received: none of \[3\]"),
        (replaced(TRAIN, labels=TRAIN[1] - 1), TEST, {},
         "Labels must be at least 0. Received: -1 in train"),
        (TRAIN, replaced(TEST, TEST[0][:, :4]), {},
         "features of the same model. Received: 5 and 4 features"),
        (replaced(TRAIN, labels=TRAIN[1] * 0.5), TEST, {},
         "integer labels .*Received: shapes .12, 5. and .12,., labels of "
         "dtype float64"),
        (replaced(TRAIN, TRAIN[0][:3]), TEST, {}, "`train` must be a pair"),
        (TRAIN, TEST, {"shots": (0,)}, r"`shots\[0\]` must be"),
        (TRAIN, TEST, {"shots": ()}, "at least one shot"),
        (TRAIN, TEST, {"l2_regs": (0.0,)}, "one penalty above 0"),
        (TRAIN, TEST, {"seeds": ()}, "one seed"),
    ],
)  # fmt: skip
def test_bad_input(train, test, options, words):
    with pytest.raises(ValueError, match=words):
        evaluation.few_shot(train, test, **{"shots": (1,), **options})


def test_the_command(trained, tmp_path):
    run_dir, _ = trained
    table = tmp_path / "table.csv"
    arguments = ["fewshot", run_dir, "digits", "--shots", 1, 5, "--seeds=2"]
    done = run(*arguments, f"--csv={table}", "--penalty=64")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split("\n")
    assert lines[0].split() == ["dataset", "1-shot", "5-shot"]
    assert lines[2].split() == ["penalty", "64", "64"]
    opened = training.restore(run_dir)
    sets = [
        evaluation.extract_features(
            opened, data.load("digits", split, 8, 64, training=False)
        )
        for split in ("train", "test")
    ]
    found = evaluation.few_shot(*sets, shots=(1, 5), seeds=(0, 1))
    accuracy = found.accuracy_at([64.0, 64.0]).mean(axis=0)
    assert [lines[1].split()[i] for i in (1, 4)] == [
        f"{x:.4f}" for x in accuracy
    ]
    rows = table.read_text().split("\n")
    assert len(rows) == 2 + 2 * 2, "each seed and shot"
    for penalty in ("test", "held_out"):
        done = run(*arguments, f"--penalty={penalty}")
        assert done.returncode == 0 and "chosen on t" in done.stdout
    done = run(*arguments, "--penalty=1000")
    assert done.returncode == 0 and "penalty fixed" in done.stdout
    done = run(*arguments, "--penalty=-1")
    assert done.returncode == 1 and "above 0. Received: -1.0" in done.stderr
    done = run("fewshot", run_dir, "digits", "--train_split=train[:9999]")
    assert "test (364), train (1254)" in done.stderr
    table.unlink()  # What was measured is kept, too.
    words = "fewer examples than shots"
    with pytest.warns(UserWarning, match=words):
        done = run(*arguments[:3], "--shots", 1, 500, f"--csv={table}")
    assert "must be left to choose a penalty" in done.stderr
    assert table.read_text().count("\n") == 1 + 3 * 2 * 30
    done = run(*arguments, "--penalty=best")
    assert "`penalty` must be" in done.stderr


def test_data_sets_of_the_paper():
    assert fewshot.SETS["colorectal_histology"] == (
        ("colorectal_histology", "train[:2000]"),
        ("colorectal_histology", "train[2000:]"),
    )
    assert fewshot.SETS["imagenet"][1] == ("imagenet2012", "validation")
    builders = set(tfds.list_builders(with_community_datasets=False))
    for parts in fewshot.SETS.values():
        assert {name.partition("/")[0] for name, _ in parts} <= builders
