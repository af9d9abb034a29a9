"""`compare`: the table of run folders against figures computed by hand."""

import json

import numpy as np
import pytest
import yaml

from keras_vmoe import cli
from keras_vmoe import evaluation
from keras_vmoe.evaluation import comparison
from tests.commands import SMALL
from tests.commands import run

pytestmark = pytest.mark.backends("torch")  # Files alone are compared.


def write(folder, hits, labels=None, data=None, names="abc", **settings):
    """The folder of a finished run; `hits` says which images are right."""
    hits = np.array(hits, bool)
    labels = np.arange(len(hits)) % 3 if labels is None else labels
    folder.mkdir(parents=True)
    data = {"dataset": "digits", "test_split": "test", **(data or {})}
    config = {"data": data, **settings}
    (folder / "classes.json").write_text(json.dumps(list(names)))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    result = {"accuracy": float(hits.mean()), "params": 3e6, "macs": 2e6}
    result |= {"active_params": 1e6, "seconds_per_step": 0.5}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "history.csv").write_text(
        "epoch,val_accuracy,dropped_share\n1,0.25,0.5\n2,0.5,0.125\n"
    )
    np.savez(
        folder / "predictions.npz",
        labels=labels,
        predicted=np.where(hits, labels, labels + 1),
    )
    return folder


def test_means_and_differences(tmp_path):
    first = write(tmp_path / "first", [1, 1, 0, 0], seed=0, epochs=2)
    second = tmp_path / "second"
    write(second / "seed_0", [1, 1, 1, 0], seed=0, epochs=3)
    write(second / "seed_1", [1, 1, 1, 1], seed=1, epochs=3)
    found = evaluation.compare([first, second])
    rows = found.rows
    assert [row["accuracy"] for row in rows] == [0.5, 0.875]
    assert [row["seeds"] for row in rows] == [1, 2]
    assert rows[0]["accuracy_std"] is None
    assert rows[1]["accuracy_std"] == pytest.approx(0.25 / 2**0.5)
    assert rows[1]["difference"] == 0.375
    assert rows[1]["dropped_share"] == 0.125
    assert rows[1]["min_expert_load"] is None
    assert found.settings == {"epochs": ["2", "3"]}
    assert [row["settings"] for row in rows] == ["epochs=2", "epochs=3"]
    text = comparison.comparison_table(found)
    assert "0.8750 ± 0.1768" in text and "+0.3750 [" in text
    assert "epochs: 2 | 3" in text and "500" in text and "12.5%" in text


def test_the_interval_is_of_pairs(tmp_path):
    # The same 50 of 100 images are right twice: nothing differs in any draw.
    hits = np.arange(100) % 2
    a, b = (write(tmp_path / name, hits) for name in "ab")
    row = evaluation.compare([a, b]).rows[1]
    assert row["difference_low"] == row["difference_high"] == 0
    # 10 more images are right: the share of them in a draw is binomial.
    more = write(tmp_path / "more", hits | (np.arange(100) < 20))
    row = evaluation.compare([a, more]).rows[1]
    assert row["difference"] == pytest.approx(0.1)
    sigma = (0.1 * 0.9 / 100) ** 0.5
    assert row["difference_low"] == pytest.approx(0.1 - 1.96 * sigma, abs=0.012)
    assert row["difference_high"] == pytest.approx(
        0.1 + 1.96 * sigma, abs=0.012
    )
    again = evaluation.compare([a, more]).rows[1]
    assert again == row, "the bootstrap is seeded"


def test_runs_that_cannot_be_compared(tmp_path):
    good = write(tmp_path / "good", [1, 0])
    other = write(tmp_path / "other", [1, 0], data={"dataset": "cifar10"})
    words = r"good on digits, test \(2 images\) and .*other on cifar10, test"
    with pytest.raises(ValueError, match=words):
        evaluation.compare([good, other])
    with pytest.raises(ValueError, match="tested on the same"):
        evaluation.compare([good, write(tmp_path / "x", [1, 0], names="xyz")])
    folders = [
        write(
            tmp_path / name, [1, 0],
            data={"dataset": "image_folder", "data_dir": name},
        )
        for name in ("f", "g")
    ]  # fmt: skip
    with pytest.raises(ValueError, match="on image_folder f, test"):
        evaluation.compare(folders)
    fewer = write(tmp_path / "fewer", [1, 0, 1])
    with pytest.raises(ValueError, match=r"\(3 images\)"):
        evaluation.compare([good, fewer])
    (fewer / "predictions.npz").unlink()
    words = r"finished.*fewer' without .'predictions.npz'.*keras-vmoe train"
    with pytest.raises(FileNotFoundError, match=words):
        evaluation.compare([good, fewer])
    with pytest.raises(FileNotFoundError, match="Name the folder of a run"):
        evaluation.compare(tmp_path)
    with pytest.raises(ValueError, match="Received: none"):
        evaluation.compare([])


def test_seeds_from_training_to_the_table(tmp_path):
    """Three seeds of digits; the third one is added later."""
    folder = tmp_path / "runs"
    done = run("train", *SMALL, f"--run_dir={folder}", "--seeds", 0, 1)
    assert done.returncode == 0, done.stderr
    weights = (folder / "seed_0" / "model.keras").read_bytes()
    done = run("train", *SMALL, f"--run_dir={folder}", "--seeds", 0, 1, 7)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("already finished") == 2
    assert (folder / "seed_0" / "model.keras").read_bytes() == weights
    alone = tmp_path / "alone"
    run("train", *SMALL, f"--run_dir={alone}", "--seed=7")
    names = ("history.csv", "classes.json")
    for name in names:
        assert (alone / name).read_text() == (
            folder / "seed_7" / name
        ).read_text()

    paths = [folder / f"seed_{seed}" for seed in (0, 1, 7)]
    accuracies = [
        json.loads((path / "result.json").read_text())["accuracy"]
        for path in paths
    ]
    plot, table = tmp_path / "curves.png", tmp_path / "table.csv"
    done = run("compare", folder, alone, f"--plot={plot}", f"--csv={table}")
    assert done.returncode == 0, done.stderr
    mean, std = np.mean(accuracies), np.std(accuracies, ddof=1)
    assert f"{mean:.4f} ± {std:.4f}" in done.stdout
    difference = accuracies[2] - mean
    assert f"{difference:+.4f} [" in done.stdout
    assert "only the seed differs" in done.stdout
    assert "with 1 seed(s) on a side" in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert table.read_text().count("\n") == 3
    done = run("evaluate", folder)
    assert "3 seeds. Name one of them, such as" in done.stderr
    done = run(
        "train", *SMALL, f"--run_dir={folder}", "--seeds", 0, "--epochs=3"
    )
    assert done.returncode == 1
    assert "these differ: epochs: 2 there, 3 here" in done.stderr


def test_how_a_run_of_seeds_goes_on():
    words = cli._how_to_resume(config=object(), seeds=[1, 2])
    assert words == ". Repeat the command to resume"


@pytest.mark.parametrize(
    ("number", "words"),
    [(950, "950"), (12058, "12.1 k"), (3.4e6, "3.4 M"), (1.25e9, "1.25 G")],
)
def test_amounts(number, words):
    assert comparison.amount(number) == words
