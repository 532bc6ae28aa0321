"""Stopping a run early: on Ctrl-C, SIGTERM or preemption, and at metrics that are not finite."""

import json
import logging
import math
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import jax
import orbax.checkpoint as ocp

from activemlp_jax.distributed import hosts
from activemlp_jax.training.workdir import replace_file
from activemlp_jax.utils.errors import UserError
from activemlp_jax.utils.types import Record

log = logging.getLogger(__name__)


class Interruption:
    """Context manager that notices when the run should save its state and stop.

    Ctrl-C or SIGTERM on any host, or a notice from JAX's preemption service, stops all hosts after
    the same step. A second signal raises KeyboardInterrupt immediately.
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
        """Return whether all hosts stop after `step`; every host must call this at every step."""
        signaled = self._signal is not None
        if jax.process_count() == 1:
            return signaled
        return hosts.stop_is_agreed(signaled, step) or ocp.multihost.reached_preemption(step)

    @property
    def status(self) -> int:
        """Exit status by the shells' convention: 128 plus the signal's number."""
        return 128 + (self._signal or signal.SIGTERM)


def non_finite(metrics: Record) -> list[str]:
    """List the names of the metrics that are NaN or infinite."""
    return [name for name, value in metrics.items() if not math.isfinite(value)]


def stop_at_non_finite(
    workdir: Path, step: int, metrics: Record, examples: Sequence[int], checkpoint: Path | None
) -> UserError:
    """Record a step with non-finite metrics in `non_finite.json`, and return the error to raise.

    The first host writes the file. `step` is counted from 0. `examples` are the training set's
    indices of the images in the batch. `checkpoint` is the newest good one, or None.
    """
    broken = non_finite(metrics)
    values = {name: str(metrics[name]) if name in broken else metrics[name] for name in metrics}
    good = str(checkpoint) if checkpoint else None
    content = {"step": step, **values, "last_good_checkpoint": good, "examples": list(examples)}
    path = workdir / "non_finite.json"
    if hosts.is_first():
        replace_file(path, json.dumps(content) + "\n")
    where = f"the last good checkpoint is {good}" if good else "there is no good checkpoint"
    names = " and ".join(f"{name.replace('_', ' ')} is {values[name]}" for name in broken)
    return UserError(
        f"the {names} at step {step}; the run stops here; {where}; "
        f"{path} has the indices of the batch"
    )
