"""Runs of two epochs as a kill after the first one leaves them."""

import shutil

DONE_LATER = ("epoch_000002*", "model.keras", "result.json", "curves.png")


def copy_as_stopped(run_dir, copy):
    """Copies the folder of a whole run without what its last epoch added.

    Args:
        run_dir: `pathlib.Path` of the run.
        copy: `pathlib.Path` that does not exist.
    """
    ignore = shutil.ignore_patterns(*DONE_LATER)
    shutil.copytree(run_dir, copy, ignore=ignore)
    assert [x.name for x in (copy / "checkpoints").glob("*.json")] == [
        "epoch_000001.json"
    ]
