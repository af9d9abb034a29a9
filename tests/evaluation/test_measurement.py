"""`measure`: against a recount by hand."""

import dataclasses
import warnings

import keras
import numpy as np
import pytest

from keras_vmoe import data
from keras_vmoe import evaluation
from keras_vmoe.evaluation.measurement import calibration_error
from tests.harness import randomize
from tests.models.definitions import images_of
from tests.models.definitions import tiny


def test_a_recount(capsys):
    model = randomize(tiny(moe={"capacity_factor": 0.5}))
    images, labels = images_of(8), np.arange(8) % 10
    batches = [(images[:4], labels[:4]), (images[4:], labels[4:])]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = evaluation.measure(model, batches, verbose=True)
    assert "2/2" in capsys.readouterr().out
    logits = np.concatenate(
        [model.predict(x, batch_size=4, verbose=0) for x, _ in batches]
    )
    best = logits.argmax(-1)
    assert found.num_images == 8
    assert found.accuracy == (best == labels).mean()
    top = np.argsort(-logits, axis=-1)[:, :5]
    assert found.top5 == (top == labels[:, None]).any(axis=-1).mean()
    log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -log_softmax[np.arange(8), labels].mean()
    assert found.loss == pytest.approx(expected, rel=1e-4)
    assert found.confusion.sum() == 8
    assert f"calibration error: {found.calibration_error:.4f}" in (
        evaluation.report(found, "abcdefghij")
    )
    assert found.confusion[labels[0], best[0]] >= 1
    for name in ("block_1_moe", "block_3_moe"):
        routing = found.routing[name]
        assert routing["load_share"].sum() == pytest.approx(1, rel=1e-5)
        assert 0 < routing["dropped_share"] < 1
    text = evaluation.report(found, [f"class {i}" for i in range(10)])
    assert f"accuracy: {found.accuracy:.4f}" in text
    assert "block_3_moe: " in text and "(1 is even)" in text
    assert "top-5" in text
    few = dataclasses.replace(found, confusion=np.eye(5, dtype=int))
    assert "top-5" not in evaluation.report(few, "abcde")  # It is 1.


@pytest.mark.backends("torch")
def test_calibration_by_hand():
    """Four images in three bins: two are far too sure, two too modest."""
    shares = np.array([[0.99, 0.01], [0.98, 0.02], [0.3, 0.7], [0.55, 0.45]])
    labels = np.array([1, 1, 1, 0])
    found = calibration_error(np.log(shares) + 5.0, labels)
    expected = (abs(0.99 + 0.98 - 0) + abs(0.7 - 1) + abs(0.55 - 1)) / 4
    assert found == pytest.approx(expected)


@pytest.mark.backends("torch")
def test_a_dataset_made_for_another_model():
    model = tiny(preprocessing=data.Preprocessing.imagenet())
    images = data.load("digits", "test[:8]", 8, 8, training=False)
    words = "dataset of mean=127.5 for .*Pass `preprocessing=model.preproc"
    for function in (evaluation.measure, evaluation.extract_features):
        with pytest.raises(ValueError, match=words):
            function(model, images)


@pytest.mark.backends("torch")
def test_labels_and_logits_that_do_not_fit():
    model, images = tiny(), images_of(4)
    for labels, words in (
        (np.array([0, 3, 10, 1]), "labels from 0 to 10. Use a dataset of"),
        (np.array([0, -1, 2, 1]), "labels from -1 to 2"),
        (np.eye(10)[:4], r"labels of dtype float64 and shape \(4, 10\)"),
    ):
        with pytest.raises(ValueError, match=words):
            evaluation.measure(model, [(images, labels)])
    with pytest.raises(ValueError, match="num_classes=None. Give it one"):
        evaluation.measure(tiny(num_classes=None), [(images, labels)])
    images[2] = np.nan
    words = r"Logits must be finite.*images? \(counted from 0"
    with pytest.raises(ValueError, match=words):
        evaluation.measure(model, [(images, np.arange(4))])


def test_some_of_the_classes():
    """A mask behind the model."""
    model = randomize(tiny(moe={"capacity_factor": 0.5}))
    images, labels = images_of(8), 2 + np.arange(8) % 3
    mask = np.full(10, -1e9, "float32")
    mask[np.unique(labels)] = 0
    masked = keras.Model(model.input, model.output + mask)
    found = evaluation.measure(masked, [(images, labels)], routing=False)
    best = 2 + model.predict(images, verbose=0)[:, 2:5].argmax(-1)
    assert found.accuracy == (best == labels).mean()
    assert found.confusion[:, [0, 1, 5, 6, 7, 8, 9]].sum() == 0


def test_an_empty_dataset():
    with pytest.raises(ValueError, match="at least one batch"):
        evaluation.measure(tiny(), [])
