"""Peak memory of a training step beside inputs, weights and gradients."""

import pathlib
import subprocess
import sys

import keras
import numpy as np
import steps

from keras_vmoe import layers


def of_candidate(name, make, inputs, script, args):
    """Bytes of one candidate's training step.

    Of JAX the compiler's figure for temporary buffers. Else the growth of a
    process of its own, which `script --memory-of NAME` prints.

    Args:
        name: Name of the candidate.
        make: Function that makes a layer or model of it.
        inputs: Tensor that it takes.
        script: Path of the benchmark.
        args: Its arguments, of which the process gets `dtype`, and
            `batch_size` where there is one.
    """
    if keras.backend.backend() == "jax":
        layer = make(name)
        layer.build(inputs.shape)
        step, arguments = steps.jax_training(layer, inputs)
        found = step.lower(*arguments).compile().memory_analysis()
        return found.temp_size_in_bytes
    command = [sys.executable, script, "--memory-of", name]
    for flag in ("dtype", "batch_size"):
        if hasattr(args, flag):
            command += [f"--{flag}", str(getattr(args, flag))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.splitlines()[-1])


def growth(layer, inputs):
    """How far this process grows while it runs a layer's step, in bytes."""
    # The libraries' own buffers are there after a step of another layer.
    warm = layers.MLP(8)
    warm.build(inputs.shape)
    steps.training(warm, inputs)()
    layer.build(inputs.shape)
    step = steps.training(layer, inputs)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # Forgets the peak.
    before = status("VmRSS")
    for _ in range(3):
        gradients = step()
    results = sum(4 * int(np.prod(gradient.shape)) for gradient in gradients)
    return status("VmHWM") - before - results


def status(field):
    """A figure of Linux about this process, in bytes."""
    status = pathlib.Path("/proc/self/status").read_text()
    line = next(x for x in status.splitlines() if x.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])
