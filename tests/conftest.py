"""What holds for all tests: four CPU devices, one seed, one dtype policy."""

import gc
import os
import pathlib

from tests import devices

# Read when the backend starts, so before Keras is imported anywhere; processes
# that a test starts inherit them.
os.environ["XLA_FLAGS"] = devices.flags()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Small tensors, and a worker per core: PyTorch needs no threads of its own.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The larger programs that JAX compiled are kept, for processes that a test
# starts and for the next run; small ones take longer to read than to compile.
CACHE = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax"
for name, value in {
    "JAX_COMPILATION_CACHE_DIR": CACHE,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0.5,
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": -1,
    "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": 0,  # Of every operation, for nobody.
}.items():
    os.environ.setdefault(name, str(value))

import pytest  # noqa: E402
from xdist.scheduler import LoadFileScheduling  # noqa: E402

TESTS = pathlib.Path(__file__).parent
# Those that take longest start first, or one core waits for the other's.
LONGEST = [
    "docs/test_snippets.py",
    "training/test_kills.py",
    "distribution/test_expert_parallel.py",
    "distribution/test_processes.py",
    "distribution/test_resumed.py",
    "distribution/test_mirrored.py",
    "training/test_resume.py",
    "training/test_recipes.py",
    "training/test_files.py",
    "training/test_settings.py",
    "layers/test_every_layer.py",
    "test_docstrings.py",
]
# Files whose tests share little: together they would keep one core waiting.
APART = [
    "docs/test_snippets.py",
    "training/test_recipes.py",
]

# Warnings that are not ours, and what causes them.
OF_OTHERS = [
    # Keras's variables, which NumPy 2 copies: tens of thousands of them.
    "__array__ implementation doesn't accept a copy keyword",
    # Two workers that write one program at once; JAX compiles it again.
    "Error reading persistent compilation cache entry",
    # tf2onnx, which predates NumPy 2.
    "In the future `np.object`",
    # PyTorch's Dynamo, which looks at all attributes.
    "The .grad attribute of a Tensor that is not a leaf",
    # Threads of Orbax that outlive their event loop.
    ":pytest.PytestUnraisableExceptionWarning",
]


def pytest_configure(config):
    # A warning that a user sees and cannot act on is a bug.
    for kind in ("UserWarning", "RuntimeWarning", "FutureWarning"):
        config.addinivalue_line("filterwarnings", f"error::{kind}")
    config.addinivalue_line("filterwarnings", r"error:::keras_vmoe(\..*)?$")
    for warning in OF_OTHERS:
        config.addinivalue_line("filterwarnings", f"ignore:{warning}")


def pytest_collection_finish(session):
    # Millions of objects of the backends, which stay: a tenth of the time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def pytest_collection_modifyitems(config, items):
    """Leaves to other backends what is theirs, and puts long files first."""
    import keras  # Here: what hands out tests to workers takes seconds less.

    backend = keras.backend.backend()
    kept = [item for item in items if runs_on(backend, item)]
    left = [item for item in items if not runs_on(backend, item)]
    if left:
        config.hook.pytest_deselected(items=left)
    items[:] = sorted(kept, key=rank)


class Scheduling(LoadFileScheduling):
    """A file's tests run in one process, but for those of `APART`."""

    def _split_scope(self, nodeid):
        file = super()._split_scope(nodeid)
        return nodeid if file.removeprefix("tests/") in APART else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    if config.getvalue("dist") != "loadfile":
        return None  # That of pytest-xdist.
    return Scheduling(config, log)


def runs_on(backend, item):
    """By the test's own markers and its parameters', or by its file's."""
    if item.path.is_relative_to(TESTS / "data"):
        return backend == "torch"  # tf.data under every backend.
    of_file = item.parent.get_closest_marker("backends")
    own = [x for x in item.own_markers if x.name == "backends"]
    found = own or ([of_file] if of_file else [])
    return all(backend in x.args for x in found)


def rank(item):
    """Where a test's file stands in the order."""
    name = item.path.relative_to(TESTS).as_posix()
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)


@pytest.fixture(autouse=True)
def fresh_state():
    """No test sees the seeds or the dtype policy of another."""
    import keras

    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("float32")
    yield
    keras.config.set_dtype_policy("float32")


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run folder that the command made, and what the command printed."""
    from tests.commands import SMALL
    from tests.commands import run

    run_dir = tmp_path_factory.mktemp("runs") / "run"
    done = run("train", *SMALL, f"--run_dir={run_dir}")
    assert done.returncode == 0, done.stderr
    return run_dir, done.stdout
