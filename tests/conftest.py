"""Settings for all tests: compilation cache, strict shapes, fast tests first."""

import contextlib
import gc
import os
import resource
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from processes import COMPILE_QUICKLY

from activemlp_jax.utils.runtime import collect_garbage_rarely

ROOT = Path(__file__).parents[1]

# The tests and the processes they start use their own compilation cache, whatever the user's
# settings are. It has a size limit, because JAX locks only limited caches. JAX then warns about
# programs that processes without a limit have cached, so these tests cannot use the user's cache.
os.environ |= COMPILE_QUICKLY | {
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax-tests"),
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(8 * 2**30),
    # JAX's default is 1 s. Most programs that tests run many times compile faster.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
}
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update(
    "jax_compilation_cache_max_size", int(os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"])
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
jax.config.update("jax_numpy_rank_promotion", "raise")

collect_garbage_rarely()  # as commands do; tests spend most of their time tracing and compiling

# Background jobs of a script ignore SIGINT, and `nohup` ignores SIGHUP. The processes that tests
# start would inherit this, and tests could not stop them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture
def float64():
    """Enable float64 arrays and computations in a test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def full_disk():
    """A context that limits the size of files in bytes: writing fails where a full disk fails."""

    @contextlib.contextmanager
    def limit(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    yield limit
    with warnings.catch_warnings():  # Orbax never awaits some coroutines of a failed write
        warnings.simplefilter("ignore")
        gc.collect()
