"""Stopping a run early: on Ctrl-C, on SIGTERM, or when the cloud preempts its machines."""

import logging
import signal
from types import FrameType

import jax
import orbax.checkpoint as ocp

from activemlp_jax.distributed import hosts

log = logging.getLogger(__name__)


class Interruption:
    """Context manager that notices when the run should save its state and stop.

    Ctrl-C or SIGTERM on any host, or a notice from JAX's preemption service, stops all hosts after
    the same step. A second signal stops at once.
    """

    def __init__(self) -> None:
        self._signal: int | None = None

    def __enter__(self) -> "Interruption":
        self._before = {
            number: signal.signal(number, self._notice)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._signal is not None:
            raise KeyboardInterrupt
        self._signal = number
        log.info("stopping after this step; again stops at once")

    def requested(self, step: int) -> bool:
        """Whether to stop after `step`; the same on all hosts, which must all ask at every step."""
        signaled = self._signal is not None
        if jax.process_count() == 1:
            return signaled
        return hosts.stop_is_agreed(signaled, step) or ocp.multihost.reached_preemption(step)

    @property
    def status(self) -> int:
        """Exit status by the shells' convention: 128 plus the signal's number."""
        return 128 + (self._signal or signal.SIGTERM)
