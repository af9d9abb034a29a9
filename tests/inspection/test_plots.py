"""Plots: what matplotlib's figure holds, and the file that is written."""

import matplotlib.image
import numpy as np
import pytest

from keras_vmoe import inspection
from keras_vmoe.inspection import _plots

pytestmark = pytest.mark.backends("torch")

HISTORY = {"loss": [2.0, 1.0], "val_loss": [2.1, 1.2], "accuracy": [0.0, 1.0]}
LOADS = np.array([[0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.2, 0.0]])
ROUTING = [
    {name: {"load_share": load} for name in ("a", "b", "c")} for load in LOADS
]


def lines_of(axis):
    return {
        line.get_label(): ([*line.get_xdata()], [*line.get_ydata()])
        for line in axis.get_lines()
    }


def test_curves_of_a_run():
    loss, accuracy, *_ = _plots.history_figure(HISTORY, ROUTING).axes
    assert lines_of(loss) == {
        "training": ([1, 2], [2.0, 1.0]),
        "validation": ([1, 2], [2.1, 1.2]),
    }
    assert lines_of(accuracy) == {"training": ([1, 2], [0.0, 1.0])}
    assert (loss.get_title(), loss.get_xlabel()) == ("Loss", "epoch")
    assert (accuracy.get_title(), accuracy.get_xlabel()) == (
        "Accuracy",
        "epoch",
    )
    texts = [text.get_text() for text in loss.get_legend().get_texts()]
    assert texts == ["training", "validation"]


def test_load_of_the_experts():
    figure = _plots.history_figure(HISTORY, ROUTING)
    pictures = [axis for axis in figure.axes if axis.get_images()]
    titles = [axis.get_title() for axis in pictures]
    assert titles == [f"{x}: share of the choices per expert" for x in "abc"]
    for axis in pictures:
        (image,) = axis.get_images()
        np.testing.assert_array_equal(image.get_array(), LOADS.T)
        assert image.get_clim() == (0, 0.5)
        assert (axis.get_xlabel(), axis.get_ylabel()) == ("epoch", "expert")


def test_a_dense_run_has_curves_only():
    figure = _plots.history_figure({"loss": [1.0]}, [])
    visible = [axis.get_title() for axis in figure.axes if axis.get_visible()]
    assert visible == ["Loss"]
    (line,) = figure.axes[0].get_lines()
    assert line.get_marker() == "o"  # A line of one epoch has no length.


@pytest.mark.parametrize(("routing", "height"), [(ROUTING, 1296), ([], 432)])
def test_the_file(tmp_path, routing, height):
    path = inspection.plot_history(HISTORY, routing, tmp_path / "curves.png")
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]
    pixels = matplotlib.image.imread(path)
    assert pixels.shape == (height, 1320, 4)
    assert len(np.unique(pixels[:400].reshape(-1, 4), axis=0)) > 10


def test_heatmap():
    """An idle expert is as dark as the map goes, a busy one as bright."""
    epochs = [{"load_share": np.array([1.0, 0.0])}] * 2
    pixels = _plots.load_heatmap("a", epochs)
    assert pixels.shape == (400, 600, 3) and pixels.dtype == "uint8"
    top, bottom = pixels[100, 200], pixels[300, 200]
    np.testing.assert_array_equal(top, [68, 1, 84])
    np.testing.assert_allclose(bottom, [253, 231, 37], atol=1)
