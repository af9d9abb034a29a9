"""Linear probes: both solvers against each other and by hand."""

import numpy as np
import pytest

from keras_vmoe import evaluation
from tests.commands import run
from tests.evaluation.test_few_shot import clusters

TRAIN, TEST = clusters(200, noise=0.8), clusters(100, seed=1, noise=0.8)


@pytest.mark.backends("torch")
def test_lbfgs_finds_where_the_slope_is_zero():
    # Features as they are: a shift and a scale that standardizing takes out.
    x, y = TRAIN[0] * 3 + 5, TRAIN[1]
    found = evaluation.linear_probe((x, y), TRAIN, sweep=(0.01,), epochs=500)
    std = x.std(axis=0) + 1e-5
    logits = x @ found.kernel + found.bias
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    error = (shares - np.eye(3)[y]) / len(x)
    standardized = (x - x.mean(axis=0)) / std
    slope = standardized.T @ error + 0.01 * found.kernel * std[:, None]
    assert np.abs(slope).max() < 1e-5
    assert np.abs(error.sum(axis=0)).max() < 1e-5
    assert found.chosen == 0.01 and list(found.held_out_accuracy) == [0.01]


@pytest.mark.backends("jax", "torch")
def test_both_solvers():
    found = {
        solver: evaluation.linear_probe(TRAIN, TEST, solver, epochs=epochs)
        for solver, epochs in (("lbfgs", 100), ("sgd", 10))
    }
    for solver, probe in found.items():
        assert probe.solver == solver
        scores = TEST[0] @ probe.kernel + probe.bias
        accuracy = (scores.argmax(axis=-1) == TEST[1]).mean()
        assert probe.accuracy == pytest.approx(accuracy, abs=1e-3)
        best = max(probe.held_out_accuracy.values())
        assert probe.held_out_accuracy[probe.chosen] == best
        assert probe.accuracy > 0.8
    again = evaluation.linear_probe(TRAIN, TEST, "sgd", epochs=10)
    np.testing.assert_array_equal(again.kernel, found["sgd"].kernel)


@pytest.mark.backends("torch")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"solver": "adam"}, "`solver` must be one of"),
        ({"held_out": 1.0}, "between 0 and 1. Received: held_out=1.0"),
        ({"held_out": 0.001}, "both sides. Received: held_out=0.001 of 600"),
        ({"sweep": ()}, "`sweep` must hold numbers above 0"),
        ({"sweep": (0.0,)}, "`sweep` must hold numbers above 0"),
        ({"epochs": 0}, "`epochs` must be"),
    ],
)
def test_bad_input(options, words):
    with pytest.raises(ValueError, match=words):
        evaluation.linear_probe(TRAIN, TEST, **options)


@pytest.mark.backends("torch")
def test_iterations_that_do_not_suffice():
    with pytest.warns(UserWarning, match="L-BFGS stopped after 2 iterations"):
        found = evaluation.linear_probe(TRAIN, TEST, sweep=(1e-6,), epochs=2)
    assert found.chosen == 1e-6 and np.isfinite(found.kernel).all()


@pytest.mark.backends("torch")
def test_the_command(trained, tmp_path):
    run_dir, _ = trained
    table = tmp_path / "table.csv"
    arguments = ["probe", run_dir, "digits", "--train_split=train[:200]"]
    done = run(*arguments, f"--csv={table}", "--sweep", 0.01, 1)
    assert done.returncode == 0, done.stderr
    first, *others = done.stdout.split("\n")
    assert first.startswith("digits: 0.") and "of 364 test images" in first
    assert [x.split(":")[0] for x in others[:2]] == [
        "  penalty 0.01", "  penalty 1",
    ]  # fmt: skip
    assert table.read_text().count("\n") == 3
    done = run(*arguments, "--held_out=2")
    assert done.returncode == 1 and "held_out=2.0" in done.stderr
    done = run(*arguments, f"--csv={tmp_path / 'none' / 'a.csv'}")
    assert "in a folder that exists" in done.stderr
    done = run(*arguments, "--solver=sgd", "--epochs=1")
    assert "learning rate 0.003" in done.stdout
