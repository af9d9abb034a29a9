"""What holds for all tests: four CPU devices, one seed, one dtype policy."""

import os

# Read when the backend starts, so before Keras is imported anywhere. A test
# compiles much and computes little: without LLVM's optimisations the suite
# takes less than half the time. To test the optimised programs, set
# XLA_FLAGS=--xla_backend_optimization_level=3.
flags = os.environ.get("XLA_FLAGS", "")
for name, value in (
    ("xla_force_host_platform_device_count", 4),
    ("xla_backend_optimization_level", 0),
):
    if name not in flags:
        flags += f" --{name}={value}"
os.environ["XLA_FLAGS"] = flags
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: E402
import pytest  # noqa: E402


def pytest_configure(config):
    if keras.backend.backend() == "jax" and hasattr(config, "cache"):
        keep_compiled_programs(str(config.cache.mkdir("jax")))
    # A warning that our own code causes is a bug.
    config.addinivalue_line("filterwarnings", r"error:::keras_vmoe(\..*)?$")


def keep_compiled_programs(folder):
    """Lets JAX find the programs of the last run: the next takes a third."""
    import jax

    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(autouse=True)
def fresh_state():
    """No test sees the seeds or the dtype policy of another."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("float32")
    yield
    keras.config.set_dtype_policy("float32")


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run folder that the command made, and what the command printed.

    The process starts under another backend, and `--backend` moves it over.
    """
    from tests.commands import SMALL
    from tests.commands import run_process

    backend = keras.backend.backend()
    other = "tensorflow" if backend != "tensorflow" else "jax"
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    done = run_process(
        "train",
        *SMALL,
        f"--run_dir={run_dir}",
        f"--backend={backend}",
        backend=other,
    )
    assert done.returncode == 0, done.stderr
    return run_dir, done.stdout
