"""Two processes train, and resume a stopped run; prints the results as JSON.

KERAS_BACKEND=jax python -m tests.distribution.run_two localhost:12345 0 FOLDER
"""

import faulthandler
import json
import os
import pathlib
import sys

from tests import devices

faulthandler.dump_traceback_later(240, exit=True)
address, index, folder = sys.argv[1:4]
os.environ["XLA_FLAGS"] = devices.flags(2)  # Read when JAX is imported.

import keras  # noqa: E402

from keras_vmoe import distribution  # noqa: E402
from keras_vmoe import models  # noqa: E402
from keras_vmoe import training  # noqa: E402
from keras_vmoe.distribution import _processes  # noqa: E402
from keras_vmoe.distribution import _shards  # noqa: E402
from tests.distribution.stopping import copied_after_one_epoch  # noqa: E402
from tests.training.small import SMALL  # noqa: E402
from tests.training.small import changed  # noqa: E402
from tests.training.small import history  # noqa: E402

FOLDER = pathlib.Path(folder)
# The last batch of 50 has 18 images, which four devices do not divide.
RUN = changed(
    SMALL,
    data_dir=f"{folder}/data",
    validation_split="validation[:50]",
    moe=models.MoEConfig(layers="every_1", num_experts=4, images_per_group=4),
    distribution="expert_parallel",
)


def train(name, **changes):
    """A run: its losses, of training and validation."""
    run = changed(RUN, run_dir=str(FOLDER / name), **changes)
    rows = history(training.train(run).run_dir)
    return [[float(row[x]) for x in ("loss", "val_loss")] for row in rows]


def refused():
    """What is said of another configuration in one process."""
    try:
        train("refused", weight_decay=0.1 if index == "1" else 0.3)
    except ValueError as error:
        return str(error)
    return None


def status(field):
    """A figure of Linux about this process, in bytes."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    line = next(x for x in lines if x.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def growth():
    """How far this process grows, in arrays, when it saves and restores 16.

    It holds half of each.
    """
    keras.distribution.set_distribution(distribution.ExpertParallel(4))
    shape = (4, 1024, 3072)  # 48 MiB
    with keras.name_scope("experts"):
        variables = [keras.Variable("ones", shape) for _ in range(16)]
    size, found = variables[0].value.nbytes, []
    for step in (_shards.save, _shards.restore):
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # The peak.
        before = status("VmRSS")
        step(FOLDER / "parts", variables)
        found.append((status("VmHWM") - before) / size)
    assert {float(x[0, 0].sum()) for x in variables} == {3072.0}
    return found


def main():
    distribution.initialize(address, 2, int(index))
    words = refused()
    with copied_after_one_epoch(FOLDER / "stopped"):
        whole = train("whole")
    found = {"refused": words, "whole": whole, "resumed": train("stopped")}
    found["growth"] = growth()
    print(json.dumps(found))
    _processes.leave(0)


main()
