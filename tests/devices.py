"""What XLA is told for tests; free of imports that would start a backend."""

import os

FLAGS = {
    "xla_force_host_platform_device_count": 4,
    # A test compiles much and computes little: this takes a third of the time.
    # To test the optimized programs, set both in XLA_FLAGS.
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": "false",
}


def flags(devices=None):
    """The XLA_FLAGS of the environment, and ours for what they leave open.

    Args:
        devices: Number of virtual devices; what is set, or 4, if None.
    """
    given = os.environ.get("XLA_FLAGS", "").split()
    values = dict(x.lstrip("-").partition("=")[::2] for x in given)
    values = {**FLAGS, **values}
    if devices is not None:
        values["xla_force_host_platform_device_count"] = devices
    return " ".join(f"--{name}={value}" for name, value in values.items())
