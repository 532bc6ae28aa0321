"""What orbax's threads print, which is more than its caller's error says."""

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Iterator


def _is_wanted(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR or f"{os.sep}orbax{os.sep}" not in record.pathname


@contextlib.contextmanager
def without_tracebacks() -> Iterator[None]:
    """Keep the tracebacks of orbax's threads from standard error.

    What fails in a thread is raised to orbax's caller as well, who reports it.
    """
    logger, hook = logging.getLogger("absl"), sys.unraisablehook

    def ignore_late_results(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    wanted = functools.partial(_is_wanted)  # a filter of its own, as uses may be nested
    logger.addFilter(wanted)
    sys.unraisablehook = ignore_late_results
    try:
        yield
        # Not after a failure: then the results of other arrays come when nobody waits for them.
        sys.unraisablehook = hook
    finally:
        logger.removeFilter(wanted)
