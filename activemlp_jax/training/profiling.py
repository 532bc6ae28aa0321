"""Profiling: a trace of a few steps for TensorBoard's profiler, XProf or Perfetto."""

from pathlib import Path

import jax

STEPS_BEFORE = 10  # steps to skip, since the first ones include one-time work


class Trace:
    """Context manager that traces some steps of a run.

    Args:
      directory: directory to write the trace to.
      first_step: first step of this process.
      last_step: last step of the run.
      steps: number of steps to trace; 0 for none.
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
        """Start the trace if `step`, about to be dispatched, is the first one to trace."""
        if self._first <= step < self._end and not self._running:
            jax.profiler.start_trace(self._directory)
            self._running = True

    def after(self, step: int) -> None:
        """Stop the trace if `step`, which has finished, is the last one to trace."""
        if self._running and step >= self._end - 1:
            jax.profiler.stop_trace()
            self._running = False
