"""Several processes that train one model, each on its own devices: JAX.

Every process runs the same program. Code that only one process may run, such as
writing a file, checks `is_first_process`.
"""

import contextlib
import importlib
import json
import os
import secrets
import shutil
import sys
from typing import Any

import keras
import numpy as np

from keras_vmoe._keras import get_random_seed
from keras_vmoe.distribution import _shards
from keras_vmoe.version import __version__

# Seconds until the other processes notice that one is gone or has failed. JAX's
# defaults are 100 and 300.
TIMEOUTS = {"heartbeat_timeout_seconds": 30, "shutdown_timeout_seconds": 30}


def initialize(
    job_addresses: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins this process with the others, before any computation.

    Like `keras.distribution.initialize`, but a lost process is noticed within
    30 seconds, not 100, and all processes must have the same seed. If none was
    set, the first process draws one for all. Does nothing if neither arguments
    nor Keras's environment variables for them are set
    (`KERAS_DISTRIBUTION_JOB_ADDRESSES`, `_NUM_PROCESSES`, `_PROCESS_ID`).

    Args:
        job_addresses: String, `host:port` of the first process, or of all,
            separated by commas. `"auto"` detects it, as on Cloud TPUs.
        num_processes: Integer, number of processes.
        process_id: Integer, index of this process, from 0.

    Raises:
        ValueError: If one of the three is missing or out of range, if the
            backend is not JAX, or if the processes' seeds differ.

    Example:

    >>> initialize("host0:1234", 2, process_id=0)  # doctest: +SKIP
    """
    given: dict[str, Any] = {
        "job_addresses": job_addresses,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    for name, value in given.items():
        if value is None:
            key = f"KERAS_DISTRIBUTION_{name.upper()}"
            given[name] = os.environ.get(key) or None
    if all(value is None for value in given.values()):
        return
    if keras.backend.backend() != "jax":
        raise ValueError(
            "Several processes need the JAX backend. Received: "
            f"{_words(given)} with the backend {keras.backend.backend()!r}. "
            "Set KERAS_BACKEND=jax."
        )
    import jax

    jax.distributed.initialize(**_rendezvous(given), **TIMEOUTS)
    _agree_on_a_seed()


def _rendezvous(given):
    """JAX's arguments for where the processes meet; none for "auto"."""
    if given["job_addresses"] == "auto":
        return {}
    try:
        count, index = int(given["num_processes"]), int(given["process_id"])
        good = 0 <= index < count and ":" in given["job_addresses"]
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(
            "Several processes need the address of the first as host:port, "
            "their number, and the index of this one, from 0. Received: "
            f"{_words(given)}. Set all three, as arguments or in the "
            "KERAS_DISTRIBUTION_ environment variables."
        )
    return {
        "coordinator_address": given["job_addresses"].split(",")[0],
        "num_processes": count,
        "process_id": index,
    }


def _agree_on_a_seed():
    """Gives all processes one seed: the one that was set, or a new one."""
    seed = get_random_seed()
    check_agreement("seed", seed=seed)
    if seed is None:
        drawn = _gather({"seed": secrets.randbelow(2**32)})
        keras.utils.set_random_seed(drawn[0]["seed"])


def num_processes():
    """The number of processes that train together; 1 unless on JAX."""
    if keras.backend.backend() != "jax":
        return 1
    import jax

    # Checked first, because counting would initialize the devices.
    joined = jax.distributed.is_initialized()
    return jax.process_count() if joined else 1


def process_id():
    """The index of this process, from 0."""
    if num_processes() == 1:
        return 0
    import jax

    return jax.process_index()


def is_first_process():
    """Whether this process is the one that writes and prints."""
    return process_id() == 0


def leave(status):
    """Ends this process, one of several, without Python's teardown.

    A run has hung in the teardown, which destroys objects of tf.data and JAX
    whose threads still run. After success all processes end together;
    after an error JAX would wait for the others, which may wait for this one.

    Args:
        status: Exit status.
    """
    if status == 0:
        import jax

        jax.distributed.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def versions():
    """Versions of the packages that determine what a process computes."""
    backend = keras.backend.backend()
    return {
        "keras_vmoe": __version__,
        "keras": keras.__version__,
        backend: importlib.import_module(backend).__version__,
    }


def check_agreement(what, **values):
    """Raises in all processes unless they all have the same values.

    This is also a barrier.

    Args:
        what: What is compared, for the message.
        **values: JSON values.
    """
    everyone = _gather(values)
    absent = {name: "absent" for values in everyone for name in values}
    first, *others = ({**absent, **values} for values in everyone)
    different = [
        f"{name}: {first[name]!r} in process 0, {other[name]!r} in process {i}"
        for i, other in enumerate(others, 1)
        for name in absent
        if other[name] != first[name]
    ]
    if different:
        raise ValueError(
            f"All processes must have the same {what}. "
            f"Received: {'; '.join(different)}. Start all of them with the "
            "same command and versions, and a run folder that all of them see."
        )


def _gather(values):
    """The dicts of all processes, in order."""
    if num_processes() == 1:
        return [values]
    from jax.experimental import multihost_utils

    text = json.dumps(values).encode()
    sizes = multihost_utils.process_allgather(np.array([len(text)]))
    padded = np.frombuffer(text.ljust(int(sizes.max())), "uint8")
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row.tobytes()) for row in rows]


def variables_of(model):
    """The variables of a model and of its optimizer."""
    optimizer = getattr(model, "optimizer", None)
    slots = [] if optimizer is None else optimizer.variables
    return [*model.variables, *slots]


@contextlib.contextmanager
def gathered(variables, folder):
    """Lets the first process read whole variables, to write them to a file.

    All processes must enter it, and leave together when the first is done. They
    write their parts to a folder, and the first reads one variable at a time.
    A single process does nothing.

    Args:
        variables: Keras variables.
        folder: `pathlib.Path` that all processes see; removed at the end.

    Yields:
        Whether this is the process that writes.
    """
    if num_processes() == 1:
        yield True
        return
    from jax.experimental import multihost_utils

    spread = [x for x in variables if not x.value.is_fully_replicated]
    values = [variable.value for variable in spread]
    parallel = keras.distribution.distribution()
    if spread:
        _shards.save(folder, spread)
    try:
        for i, variable in enumerate(spread):
            # Keras would send an assigned value back to its devices.
            variable._value = _shards.Stored(folder, i)
        # Keras creates variables while saving, which would need all processes.
        keras.distribution.set_distribution(None)
        yield is_first_process()
    finally:
        keras.distribution.set_distribution(parallel)
        for variable, value in zip(spread, values, strict=True):
            variable._value = value
        if is_first_process():  # The only one that reads them.
            shutil.rmtree(folder, ignore_errors=True)
    multihost_utils.sync_global_devices("written")


def _words(given):
    return ", ".join(f"{name}={value!r}" for name, value in given.items())
