"""Suppress the tracebacks that orbax's threads print."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def without_tracebacks() -> Iterator[None]:
    """Keep the tracebacks of orbax's threads from being printed to standard error.

    Orbax also raises a thread's error in its caller, which reports it.
    """
    logger, hook = logging.getLogger("absl"), sys.unraisablehook

    def ignore_late_results(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    def keep(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR or f"{os.sep}orbax{os.sep}" not in record.pathname

    logger.addFilter(keep)
    sys.unraisablehook = ignore_late_results
    try:
        yield
        # Restore the hook only on success: after a failure, results of other arrays still arrive at
        # a closed loop.
        sys.unraisablehook = hook
    finally:
        logger.removeFilter(keep)
