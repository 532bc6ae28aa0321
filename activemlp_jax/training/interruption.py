"""Asked to stop: by Ctrl-C, by SIGTERM, by a cloud that takes its machines back."""

import signal
from collections.abc import Callable
from types import FrameType

import jax
import orbax.checkpoint as ocp

from activemlp_jax.distributed import sharding


class Interruption:
    """Notices that the run should save and stop; used as a context around the steps.

    Ctrl-C and SIGTERM of any host, and what JAX's preemption service is told by other means, stop
    all hosts after the same step. A second signal stops at once.

    Args:
      say: told that the wish was understood.
    """

    def __init__(self, say: Callable[[str], None]):
        self._say = say
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
        self._say("stopping after this step; again stops at once")

    def asked(self, step: int) -> bool:
        """Whether to stop after `step`; the same on all hosts, which all ask after every step."""
        wanted = self._signal is not None
        if jax.process_count() == 1:
            return wanted
        return sharding.stop_is_agreed(wanted, step) or ocp.multihost.reached_preemption(step)

    @property
    def status(self) -> int:
        """To exit with: 128 and the signal's number, as shells count."""
        return 128 + (self._signal or signal.SIGTERM)
