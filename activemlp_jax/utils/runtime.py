"""Process-wide settings that commands make; importing the package changes none of them."""

import contextlib
import ctypes
import gc
import os
from pathlib import Path

import jax

CACHE_LIMIT = 8 * 2**30  # bytes; JAX locks only a cache that has a limit
# Parameters of glibc's mallopt, from its malloc.h.
TRIM_THRESHOLD, MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Make the C library keep freed memory in this process; call it before using JAX.

    On a CPU, each call of a compiled program allocates all its temporary memory. By default the C
    library returns that memory to the system after the call, and the system clears every page again
    for the next call, which takes a fifth of a train step. Only the heap of the main thread can be
    kept, so JAX has to run CPU programs in the thread that calls them; it reads that setting when
    it first looks for devices. On accelerators, or without glibc, this has no effect.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # Other systems have no mallopt, or no C library that can be loaded this way.
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((MMAP_MAX, 0), (TRIM_THRESHOLD, -1)):
            mallopt(parameter, value)


def keep_compiled_programs() -> None:
    """Cache compiled programs in the user's cache folder, unless the environment names another."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(caches / "activemlp_jax" / "jax"))
        jax.config.update("jax_compilation_cache_max_size", CACHE_LIMIT)


def collect_garbage_rarely() -> None:
    """Make Python collect garbage once per 50,000 new objects instead of once per 700.

    A collection visits all the objects of traced models and libraries; collections took a sixth of
    the time of a short run whose programs were cached by JAX.
    """
    gc.set_threshold(50_000)
