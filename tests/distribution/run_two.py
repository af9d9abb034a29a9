"""Two processes train, stop and go on; prints what they came to as JSON.

KERAS_BACKEND=jax python -m tests.distribution.run_two localhost:12345 0 FOLDER
"""

import json
import os
import pathlib
import sys

address, index, folder = sys.argv[1:4]
os.environ["XLA_FLAGS"] = (  # Read when JAX is imported.
    "--xla_force_host_platform_device_count=2 "
    "--xla_backend_optimization_level=0"
)

from keras_vmoe import distribution  # noqa: E402
from keras_vmoe import models  # noqa: E402
from keras_vmoe import training  # noqa: E402
from keras_vmoe.training.checkpointing import SaveCheckpoint  # noqa: E402
from tests.training.small import SMALL  # noqa: E402
from tests.training.small import changed  # noqa: E402
from tests.training.small import history  # noqa: E402

# The last batch of 50 has 18 images: they are shared by no four devices.
RUN = changed(
    SMALL,
    data_dir=f"{folder}/data",
    validation_split="validation[:50]",
    moe=models.MoEConfig(layers="last_1", num_experts=4, images_per_group=4),
    distribution="expert_parallel",
)


class Stop(Exception):
    """Stops a run behind its first checkpoint."""


def stop(self, epoch, logs=None):
    if epoch == 1:
        raise Stop


def train(name):
    """A run: its losses, of training and validation."""
    run = changed(RUN, run_dir=str(pathlib.Path(folder) / name))
    rows = history(training.train(run).run_dir)
    return [[float(row[x]) for x in ("loss", "val_loss")] for row in rows]


def main():
    distribution.initialize(address, 2, int(index))
    whole = train("whole")
    save = SaveCheckpoint.on_epoch_begin
    SaveCheckpoint.on_epoch_begin = stop
    try:
        train("stopped")
    except Stop:
        SaveCheckpoint.on_epoch_begin = save
    print(json.dumps({"whole": whole, "resumed": train("stopped")}))


main()
