"""Checkpoints of several processes; see `tests/distribution/` for two."""

import sys

import keras
import numpy as np
import pytest

from keras_vmoe import layers
from keras_vmoe import training
from keras_vmoe.distribution import _processes
from keras_vmoe.training.checkpointing import UNFINISHED
from keras_vmoe.training.checkpointing import Checkpoints
from tests.training.small import config_of

pytestmark = pytest.mark.backends("jax")


def small(num_experts=2):
    inputs = keras.Input((4, 8))
    model = keras.Model(inputs, layers.MoEMLP(num_experts, 8)(inputs))
    model.compile("adam", "mse")
    return model


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Two checkpoints of three, saved as by several processes, and a model."""
    checkpoints, model = Checkpoints(tmp_path), small()
    model.optimizer.build(model.trainable_variables)
    (tmp_path / UNFINISHED.replace("*", "3")).mkdir()  # Of a killed process.
    with monkeypatch.context() as patch:
        patch.setattr(_processes, "num_processes", lambda: 2)
        for epoch in (1, 2, 3):
            model.set_weights([w + 1 for w in model.get_weights()])
            model.optimizer.iterations.assign(epoch)
            checkpoints.save(model, epoch, {"rows": [epoch]})
    return checkpoints, model


def test_one_process_restores_them(saved):
    checkpoints, model = saved
    assert checkpoints.epochs() == [2, 3]
    folders = [x.name for x in checkpoints.folder.iterdir() if x.is_dir()]
    assert sorted(folders) == ["epoch_000002.parts", "epoch_000003.parts"]
    other = small()
    assert checkpoints.restore(other)["rows"] == [3]
    for mine, theirs in zip(
        _processes.variables_of(other),
        _processes.variables_of(model),
        strict=True,
    ):
        np.testing.assert_array_equal(mine.numpy(), theirs.numpy())


@pytest.mark.parametrize("is_missing", [True, False])
def test_a_part_is_missing_or_cut_short(saved, is_missing):
    checkpoints, _ = saved
    folder = checkpoints.folder / "epoch_000003.parts"
    part = max(folder.rglob("d/*"), key=lambda path: path.stat().st_size)
    if is_missing:
        part.unlink()
    else:
        part.write_bytes(part.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=f"000003.* corrupt .*{part.name}"):
        assert checkpoints.restore(small())["rows"] == [2]


def test_a_model_of_other_experts(saved):
    words = r"with \['.*', \[8, 2\]\] where the model has \['.*', \[8, 3\]\]"
    with pytest.raises(ValueError, match=words):
        saved[0].restore(small(num_experts=3))


def test_several_processes_need_the_extra(tmp_path, monkeypatch):
    """They are told before they train, and nothing is written."""
    monkeypatch.setattr(_processes, "num_processes", lambda: 2)
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r"pip install .*\[checkpoints\]"):
        training.train(config_of(tmp_path / "run", str(tmp_path)))
    assert not (tmp_path / "run").exists()
