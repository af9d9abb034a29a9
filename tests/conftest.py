"""What holds for all tests: four CPU devices, one seed, one dtype policy."""

import os

# Read when the backend starts, so before Keras is imported anywhere.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=4"
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: E402
import pytest  # noqa: E402


def pytest_configure(config):
    # A warning that our own code causes is a bug.
    config.addinivalue_line("filterwarnings", r"error:::keras_vmoe(\..*)?$")


@pytest.fixture(autouse=True)
def fresh_state():
    """No test sees the seeds or the dtype policy of another."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("float32")
    yield
    keras.config.set_dtype_policy("float32")
