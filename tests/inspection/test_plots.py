import numpy as np
import pytest

from keras_vmoe import inspection

pytestmark = pytest.mark.backends("jax")

PNG = b"\x89PNG\r\n\x1a\n"


def test_picture_of_a_run(tmp_path):
    history = {"loss": [2.0, 1.0], "val_loss": [2.1, 1.2], "accuracy": [0, 1]}
    routing = [
        {name: {"load_share": np.full(4, 0.25)} for name in ("a", "b", "c")}
    ] * 2
    path = inspection.plot_history(history, routing, tmp_path / "curves.png")
    assert path.read_bytes().startswith(PNG)
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]


def test_dense_run_has_curves_only(tmp_path):
    path = inspection.plot_history({"loss": [1.0]}, [], tmp_path / "c.png")
    assert path.read_bytes().startswith(PNG)
