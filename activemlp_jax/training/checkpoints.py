"""Checkpoints of the whole state by orbax: asynchronous, never half there, checked when read.

Each checkpoint also holds the digests of all its files. A marker file says that no checkpoint has
been completed yet; an empty directory without it has lost its checkpoints.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from activemlp_jax.distributed import sharding
from activemlp_jax.training.config import differing_keys
from activemlp_jax.training.step import TrainState
from activemlp_jax.utils.digests import check_digests, read_digests, write_digests
from activemlp_jax.utils.errors import Interrupted, UserError, one_line
from activemlp_jax.utils.files import write_aside
from activemlp_jax.utils.json_files import expect, read_json
from activemlp_jax.utils.orbax_logs import without_tracebacks
from activemlp_jax.weights.finite import describe_non_finite

BEST_BY = "score"
NOT_EVALUATED = -1.0  # below every score
STEPS_BETWEEN_CLOCKS = 10
RESTORE_TIMEOUT = 3600  # seconds for the slowest host to check its part of a checkpoint
NONE_YET = ".none_complete"
RUN = Path("run", "metadata")  # where orbax writes these items of a checkpoint
METRICS = Path("metrics", "metrics")
TEMPORARY = ocp.path.atomicity_types.TMP_DIR_SUFFIX


class _WithDigests(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A checkpoint that has the digests of its files before it has its name.

    orbax calls `finalize` on the first host, in the thread that writes, once all hosts have
    written; for the items of a checkpoint, too.
    """

    _final_path: Any

    async def finalize(self) -> None:
        """Give the directory its name."""
        final = self._final_path
        if not final.name.isdecimal():
            await super().finalize()
            return
        # What orbax still writes is to have a digest, too; by this name, it clears up after kills.
        self._final_path = final.with_name(f"{final.name}.written{TEMPORARY}")
        await super().finalize()
        write_digests(Path(self._final_path))
        os.rename(self._final_path, final)
        self._final_path = final
        Path(final.parent, NONE_YET).unlink(missing_ok=True)


class Restored(NamedTuple):
    """A restored state, and the `losses` of the steps of its unfinished epoch."""

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

    Raises:
      UserError: the score of a checkpoint cannot be read.
    """

    def __init__(self, directory: Path, config: ConfigDict):
        self._config = json.loads(config.to_json())
        self._options = config.checkpoint
        self._last_save = time.monotonic()
        self._restores = 0
        self._directory = directory.absolute()
        for step in _steps(self._directory):
            with self._named(step):
                _check_score(self.path(step))
        best = BestN(get_metric_fn=_score, n=1)
        options = ocp.CheckpointManagerOptions(
            best_fn=_score,
            preservation_policy=AnyPreservationPolicy([LatestN(config.checkpoint.keep), best]),
            cleanup_tmp_directories=True,
            temporary_path_class=_WithDigests,
        )
        with without_tracebacks():
            self._manager = ocp.CheckpointManager(self._directory, options=options)

    def __enter__(self) -> "Checkpoints":
        self._quiet = without_tracebacks()
        self._quiet.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        try:
            self._close(kind)
        finally:
            self._quiet.__exit__(kind, *error)

    def _close(self, kind: type[BaseException] | None) -> None:
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
        steps = [step for step in _steps(self._directory) if step < below]
        return self.path(max(steps)) if steps else None

    def best(self) -> Best | None:
        """The best of those that were evaluated."""
        step = self._manager.best_step()
        score = NOT_EVALUATED if step is None else _score(self._manager.metrics(step))
        return None if score == NOT_EVALUATED else Best(step, score)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self._directory / str(step)

    def begin(self, has_records: bool) -> None:
        """Begin a run that has no checkpoint; the first host calls it.

        Args:
          has_records: whether the run has taken steps before.

        Raises:
          UserError: it has, and there was a checkpoint then.
        """
        mark = self._directory / NONE_YET
        if has_records and not mark.exists():
            raise UserError(
                f"{self._directory.parent} has the records of a run, but {self._directory} has "
                "lost its checkpoints; is its disk mounted? To begin again remove metrics.jsonl "
                "and steps.jsonl, or give another --workdir"
            )
        try:
            with write_aside(mark) as aside:
                aside.write_text("no checkpoint has been complete here yet\n")
        except OSError as error:
            raise UserError(f"{mark} cannot be written: {error.strerror or error}") from error

    def restore(self, like: TrainState, step: int | None = None) -> Restored | None:
        """A state as it was saved, on whatever devices it is wanted now.

        Args:
          like: a state of shapes with their shardings.
          step: of the checkpoint; None for the newest, for which the others are checked as well,
            so that a run does not end at one that it needs later.

        Returns:
          What was saved, or None where there is none.

        Raises:
          UserError: it cannot be read, is not as it was written, has weights that are not finite,
            or is of a run with other settings, each named.
        """
        steps = _steps(self._directory)
        wanted = max(steps, default=None) if step is None else step
        if wanted is None:
            return None
        host, hosts = sharding.this_host().values()
        for other in sorted(steps) if step is None else []:
            if other != wanted:
                with self._named(other):
                    # A kill may have cut short the removal of an old checkpoint.
                    _read(self.path(other), host, hosts, may_lack_files=True)
        with self._named(wanted):
            run = _read(self.path(wanted), host, hosts)
        self._restores += 1
        # Not a collective operation: hosts with slow disks may take long to read their part.
        sharding.check_same(f"the checkpoints, reading {self._restores}", {}, RESTORE_TIMEOUT)
        differences = differing_keys(self._config, run["config"])
        if differences:
            raise UserError(
                f"{self.path(wanted)} is of a run with other settings: {'; '.join(differences)}"
            )
        with self._named(wanted):
            args = ocp.args.Composite(state=ocp.args.StandardRestore(like))
            state = self._manager.restore(wanted, args=args)["state"]
            if broken := describe_non_finite({"variables": state.variables, "ema": state.ema}):
                raise UserError(broken)
        return Restored(state, run["losses"])

    @contextlib.contextmanager
    def _named(self, step: int) -> Iterator[None]:
        """Report any error inside as a damaged checkpoint, and name the one to go on from."""
        try:
            yield
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # orbax and its parts raise many kinds
            raise UserError(
                f"{self.path(step)} cannot be read: {_reason(error)}; remove it to go on from "
                f"{self._newest_good(step)}"
            ) from error

    def _newest_good(self, without: int) -> str:
        """The newest checkpoint, but for one, whose files are as they were written."""
        for step in sorted(_steps(self._directory) - {without}, reverse=True):
            with contextlib.suppress(UserError):
                _read(self.path(step))
                return str(self.path(step))
        return "step 0, and metrics.jsonl and steps.jsonl with it"

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
        evaluated = score is not None and math.isfinite(score)
        metrics = {BEST_BY: score if evaluated else NOT_EVALUATED}
        with self._guard():  # the save before may be what fails here
            self._manager.save(step, args=args, metrics=metrics)

    def wait(self) -> None:
        """Until what was begun is saved; raises UserError if it is not."""
        with self._guard():
            self._manager.wait_until_finished()

    def check(self) -> None:
        """Raises UserError if a save in the background has failed."""
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
            steps = _steps(self._directory)
            kept = f"the newest whole one is {self.path(max(steps))}" if steps else "there is none"
            raise UserError(
                f"a checkpoint cannot be written in {self._directory}: {_reason(error)}; {kept}"
            ) from error


def _score(metrics: dict[str, float]) -> float:
    return metrics[BEST_BY]


def _steps(directory: Path) -> set[int]:
    """Steps whose checkpoints are complete."""
    names = {path.name for path in directory.glob("*") if path.is_dir()}
    return {int(name) for name in names if name.isascii() and name.isdecimal()}


def _check_score(checkpoint: Path) -> None:
    """Raises UserError if a checkpoint has a score that cannot be read."""
    path = checkpoint / METRICS
    if not path.exists():
        return
    metrics = read_json(path)
    try:
        expect(metrics[BEST_BY], BEST_BY, (int, float), NOT_EVALUATED, 100)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not the score of a checkpoint: {_reason(error)}") from error


def _read(
    checkpoint: Path, part: int = 0, parts: int = 1, may_lack_files: bool = False
) -> dict[str, Any]:
    """Check the digests of a checkpoint's files, and read what was saved besides the state.

    Args:
      checkpoint: to read; earlier versions wrote no digests.
      part: of the files to check; several hosts share them.
      parts: hosts that share them.
      may_lack_files: whether those that are missing do not matter.

    Raises:
      UserError: a file is missing or not as it was written.
    """
    names = read_digests(checkpoint)
    digests = dict(list(names.items())[part::parts])
    path = checkpoint / RUN
    if may_lack_files:
        digests = {name: digests[name] for name in digests if (checkpoint / name).exists()}
        if not path.exists():
            return {}
    check_digests(checkpoint, digests)
    run = read_json(path)
    try:
        config, losses = run["config"], run["losses"]
        if not isinstance(config, dict):
            raise ValueError("config is not an object")
        for loss in losses:
            expect(loss, "a loss", (int, float), float("-inf"), float("inf"))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not what a run saves: {_reason(error)}") from error
    return {"config": config, "losses": losses}


def _reason(error: BaseException) -> str:
    reason = one_line(error)[:1000]
    return reason if isinstance(error, UserError) else f"{type(error).__name__}: {reason}"
