"""Settings of a whole process, which commands make; to import this package changes none."""

import contextlib
import ctypes
import gc
import os
from pathlib import Path

import jax

CACHE_LIMIT = 8 * 2**30  # bytes; JAX locks a cache only where it has one
# Parameters of glibc's mallopt, from its malloc.h.
TRIM_THRESHOLD, MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Have the C library keep memory that was freed, for this process; call it before the rest.

    On a CPU each call of a compiled program asks for all of its temporary memory, which the C
    library would return to the system after it, and the system clears every page of it anew: a
    fifth of the time of a train step. The heap of the main thread can be kept, those of other
    threads hold no pieces of that size. So JAX is to run a CPU's programs in the thread that calls
    them, which it reads when it first looks for devices, and that heap is never trimmed. On
    accelerators, and with another C library than glibc, this changes nothing that counts.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # elsewhere there is no mallopt; OSError: no C library under this name
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((MMAP_MAX, 0), (TRIM_THRESHOLD, -1)):
            mallopt(parameter, value)


def keep_compiled_programs() -> None:
    """Have JAX keep what it compiles on disk, in the user's cache, unless told where otherwise."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(caches / "activemlp_jax" / "jax"))
        jax.config.update("jax_compilation_cache_max_size", CACHE_LIMIT)


def collect_garbage_rarely() -> None:
    """Have Python look for garbage once in 50,000 new objects, not in 700.

    A search walks through objects that live on; tracing a model makes many, and the imported
    libraries hold more. Of a short run whose programs are in JAX's cache it took a sixth.
    """
    gc.set_threshold(50_000)
