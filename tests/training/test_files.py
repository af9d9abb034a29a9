"""Files of a run on a full disk, and on one that loses its power."""

import os
import pathlib
import threading

import pytest
import yaml

from keras_vmoe import _files
from keras_vmoe import data
from keras_vmoe import models
from keras_vmoe import training
from keras_vmoe.models import saving
from keras_vmoe.training.run_folder import settings_of
from tests import processes
from tests.models.definitions import tiny
from tests.training.test_resume import assert_same

pytestmark = pytest.mark.backends("torch")

# A disk that is full behind the n-th byte of every file.
SCRIPT = """
import resource, sys
from keras_vmoe import cli
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.exit(cli.main(sys.argv[2:]))
"""


def run_on_a_full_disk(config, limit, file):
    """`keras-vmoe train` where no file gets larger than a limit."""
    data.info("digits", config.data.data_dir)  # Writes it, while it can.
    file.write_text(yaml.safe_dump(settings_of(config)))
    return processes.run("-c", SCRIPT, limit, "train", f"--config={file}")


def test_a_full_disk_is_one_message(config, tmp_path):
    """And no crash of HDF5, which cannot be stopped half-way."""
    done = run_on_a_full_disk(config, 200_000, tmp_path / "config.yaml")
    assert done.returncode == 1, done.stderr[-2000:]
    (line,) = [x for x in done.stderr.splitlines() if "keras-vmoe: err" in x]
    assert "epoch_000001.weights.h5 ([Errno 27] File too large). The" in line
    assert "Traceback" not in done.stderr and "HDF5" not in done.stderr
    names = {x.name for x in pathlib.Path(config.run_dir).rglob("*")}
    assert names == {"config.yaml", "classes.json", "history.csv",
                     "checkpoints"}  # fmt: skip


@pytest.mark.slow
def test_a_run_goes_on_when_there_is_space_again(whole, left, tmp_path):
    config = left(9)
    folder = pathlib.Path(config.run_dir) / "checkpoints"
    before = {p: p.read_bytes() for p in folder.iterdir()}
    assert len(before) == 4
    done = run_on_a_full_disk(config, 100_000, tmp_path / "config.yaml")
    assert done.returncode == 1 and "resumed after epoch 2" in done.stdout
    after = folder.iterdir()
    assert {p: p.read_bytes() for p in after} == before
    assert_same(training.train(config), whole)


def test_a_model_that_does_not_fit_leaves_the_last(tmp_path, monkeypatch):
    model, path = tiny(moe=None), tmp_path / "model.keras"
    models.save(model, path)
    good = path.read_bytes()

    def full(file, size):
        assert size > 4 * model.count_params()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_files, "_allocate", full)
    with pytest.raises(OSError, match="model.keras .*No space left.*again"):
        models.save(model, path)
    assert path.read_bytes() == good
    assert [x.name for x in tmp_path.iterdir()] == ["model.keras"]


@pytest.mark.parametrize("can", [True, False])
def test_space_is_set_aside_and_freed(tmp_path, monkeypatch, can):
    """Also where the system has no call for it."""
    if not can:
        monkeypatch.delattr(os, "posix_fallocate")
    sizes = []
    unlink = pathlib.Path.unlink

    def seen(path, missing_ok=False):
        sizes.append(path.stat().st_size)
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(pathlib.Path, "unlink", seen)
    _files.reserve(tmp_path, 3_000_000)
    assert sizes == [3_000_000] and not list(tmp_path.iterdir())


def test_a_disk_that_cannot_set_space_aside(tmp_path, monkeypatch):
    def unable(file, size):
        raise OSError(_files.UNABLE[0], "Invalid argument")

    monkeypatch.setattr(_files, "_allocate", unable)
    _files.reserve(tmp_path, 10)
    assert not list(tmp_path.iterdir())


def test_a_model_takes_no_more_than_is_reserved(tmp_path):
    model = tiny(num_layers=2, moe={"layers": [1]})
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    models.save(model, tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    for path in tmp_path.iterdir():
        assert path.stat().st_size < saving.size_of(model)


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """A loss of power leaves the old file or the new one, never an empty."""
    path, events = tmp_path / "x.json", []
    fsync, replace = os.fsync, pathlib.Path.replace

    def synced(descriptor):
        events.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def renamed(partial, target):
        events.append((partial.stat().st_ino, target))
        return replace(partial, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(pathlib.Path, "replace", renamed)
    _files.write_text(path, "{}")
    file, folder = path.stat().st_ino, tmp_path.stat().st_ino
    assert events == [file, (file, path), folder]


def test_two_that_write_one_file_take_turns(tmp_path):
    path, holds, left = tmp_path / "file", threading.Event(), threading.Event()

    def write_slowly():
        with _files.replacing(path) as partial:
            partial.write_text("first")
            holds.set()
            left.wait(30)

    threads = [threading.Thread(target=write_slowly)]
    threads[0].start()
    assert holds.wait(30)
    threads.append(
        threading.Thread(target=_files.write_text, args=(path, "second"))
    )
    threads[1].start()
    threads[1].join(0.2)
    assert threads[1].is_alive() and not path.exists()
    left.set()
    for thread in threads:
        thread.join(30)
    assert path.read_text() == "second"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_unfinished_is_removed_before_another_may_begin(
    tmp_path, monkeypatch
):
    removed, unlink = [], pathlib.Path.unlink

    def record(path, **options):
        removed.append(path.name)
        unlink(path, **options)

    monkeypatch.setattr(pathlib.Path, "unlink", record)
    _files.write_text(tmp_path / "file", "text")
    assert removed == [".partial.file", ".partial.file.lock"]
