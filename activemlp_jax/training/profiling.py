"""A trace of a few steps, for TensorBoard's profiler, XProf or Perfetto."""

from pathlib import Path

import jax

STEPS_BEFORE = 10  # so that what only happens at the start is over


class Trace:
    """Traces some steps of a run; used as a context around them.

    Args:
      directory: to write to.
      first_step: of this process.
      last_step: of the run.
      steps: how many to trace; 0 for none.
    """

    def __init__(self, directory: Path, first_step: int, last_step: int, steps: int):
        self._directory = str(directory)
        self._first = max(first_step, min(first_step + STEPS_BEFORE, last_step - steps))
        self._end = self._first + steps
        self._running = False

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *error: object) -> None:
        if self._running:
            jax.profiler.stop_trace()

    def before(self, step: int) -> None:
        """`step` is about to be handed out."""
        if self._first <= step < self._end and not self._running:
            jax.profiler.start_trace(self._directory)
            self._running = True

    def after(self, step: int) -> None:
        """`step` has ended."""
        if self._running and step >= self._end - 1:
            jax.profiler.stop_trace()
            self._running = False
