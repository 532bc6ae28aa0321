"""Checkpoints of the whole state by orbax: asynchronous, and never half there."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from activemlp_jax.errors import Interrupted, UserError
from activemlp_jax.training import sharding
from activemlp_jax.training.config import differing_keys
from activemlp_jax.training.step import TrainState

BEST_BY = "score"
NOT_EVALUATED = -1.0  # below every score
STEPS_BETWEEN_CLOCKS = 10


class Restored(NamedTuple):
    """A state, and what the run knew beside it: `losses` of the steps of the current epoch."""

    state: TrainState
    losses: list[float]


class Best(NamedTuple):
    """The step and the score, in percent, of the best checkpoint."""

    step: int
    score: float


class Checkpoints:
    """The states of a run in one directory; used as a context, which waits for pending saves.

    All hosts save and restore together, in a directory that they share. The newest are kept,
    and the one of the highest score among those that were evaluated.

    Args:
      directory: made if need be.
      config: the whole config; it is saved along, and compared with on the way back.
    """

    def __init__(self, directory: Path, config: ConfigDict):
        self._config = json.loads(config.to_json())
        self._options = config.checkpoint
        self._last_save = time.monotonic()
        self._directory = directory.absolute()
        best = BestN(get_metric_fn=_score, n=1)
        options = ocp.CheckpointManagerOptions(
            best_fn=_score,
            preservation_policy=AnyPreservationPolicy([LatestN(config.checkpoint.keep), best]),
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None or issubclass(kind, Interrupted):
            self.wait()
            self._manager.close()
        elif jax.process_count() == 1:  # one of many would wait for those that failed
            with contextlib.suppress(Exception):
                self._manager.close()

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint."""
        return self._manager.latest_step()

    def newest(self, below: int) -> Path | None:
        """The newest checkpoint of a step less than `below` that is whole."""
        with contextlib.suppress(Exception):  # a save that fails now leaves nothing
            self._manager.wait_until_finished()
        steps = [step for step in self._manager.all_steps(read=True) if step < below]
        return self.path(max(steps)) if steps else None

    def best(self) -> Best | None:
        """The best of those that were evaluated."""
        step = self._manager.best_step()
        score = NOT_EVALUATED if step is None else _score(self._manager.metrics(step))
        return None if score == NOT_EVALUATED else Best(step, score)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self._directory / str(step)

    def restore(self, like: TrainState, step: int | None = None) -> Restored | None:
        """A state as it was saved, on whatever devices it is wanted now.

        Args:
          like: a state of shapes with their shardings.
          step: of the checkpoint; None for the newest.

        Returns:
          What was saved, or None where there is none.

        Raises:
          UserError: it cannot be read, or is of a run with other settings, each named.
        """
        step = self.latest_step() if step is None else step
        if step is None:
            return None
        try:
            run = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))
            differences = differing_keys(self._config, run["run"]["config"])
            if not differences:
                args = ocp.args.Composite(state=ocp.args.StandardRestore(like))
                state = self._manager.restore(step, args=args)["state"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.path(step)} cannot be read: {_reason(error)}; "
                "remove it to go on from the checkpoint before"
            ) from error
        if differences:
            raise UserError(
                f"{self.path(step)} is of a run with other settings: {'; '.join(differences)}"
            )
        return Restored(state, run["run"]["losses"])

    def save(
        self, state: TrainState, step: int, losses: list[float], score: float | None = None
    ) -> None:
        """Begin to save `state`; training may go on.

        Args:
          state: to save.
          step: its step.
          losses: of the steps of the current epoch so far.
          score: the task's, in percent, if it was evaluated.

        Raises:
          UserError: this or the save before failed.
        """
        if step == self.latest_step():
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            run=ocp.args.JsonSave({"config": self._config, "losses": list(losses)}),
        )
        self._last_save = time.monotonic()
        metrics = {BEST_BY: NOT_EVALUATED if score is None else score}
        with self._guard():  # the save before may be what fails here
            self._manager.save(step, args=args, metrics=metrics)

    def wait(self) -> None:
        """Until what was begun is saved; raises UserError if it is not."""
        with self._guard():
            self._manager.wait_until_finished()

    def check(self) -> None:
        """Raises UserError if a save that went on beside the training has failed."""
        with self._guard():
            self._manager.check_for_errors()

    def is_due(self, step: int) -> bool:
        """Whether to save after `step` by number or by the clock; the same on all hosts.

        Where there are many, the clock is looked at now and then: it is one host's, and takes time
        to ask for.
        """
        by_number = self._options.every_steps and step % self._options.every_steps == 0
        if by_number or not self._options.every_minutes:
            return bool(by_number)
        if jax.process_count() > 1 and step % STEPS_BETWEEN_CLOCKS:
            return False
        minutes = (time.monotonic() - self._last_save) / 60
        return sharding.first_host_says(minutes >= self._options.every_minutes)

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # orbax and its parts raise many kinds
            steps = list(self._manager.all_steps(read=True))
            kept = f"the newest whole one is {self.path(max(steps))}" if steps else "there is none"
            raise UserError(
                f"a checkpoint cannot be written in {self._directory}: {_reason(error)}; {kept}"
            ) from error


def _score(metrics: dict[str, float]) -> float:
    return metrics[BEST_BY]


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:1000]}"
