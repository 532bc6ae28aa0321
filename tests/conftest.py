"""Settings every test runs under: strict shapes, warnings as errors, fast tests first."""

import os
import signal
from pathlib import Path

import jax
import pytest
from processes import COMPILE_QUICKLY

from activemlp_jax.utils.runtime import collect_garbage_rarely

ROOT = Path(__file__).parents[1]

# The tests and the processes they start keep compiled programs in a cache of their own, whatever
# the user's settings are: JAX locks a cache only where its size has a limit, and then warns about
# programs that a process without one put there.
os.environ |= COMPILE_QUICKLY | {
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax-tests"),
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(8 * 2**30),
    # Most of what is run many times compiles in less than the second that JAX asks for.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
}
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update(
    "jax_compilation_cache_max_size", int(os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"])
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
jax.config.update("jax_numpy_rank_promotion", "raise")

collect_garbage_rarely()  # as the commands do; most of a test's time is tracing and compiling

# A script's background jobs ignore Ctrl-C, and `nohup` ignores SIGHUP; so would the processes that
# tests start and stop.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture
def float64():
    """float64 arrays and computations in this test."""
    with jax.enable_x64(True):
        yield
