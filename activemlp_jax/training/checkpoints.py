"""Orbax checkpoints of the training state: saved asynchronously and atomically, checked when read.

Each checkpoint holds the digests of all its files. A marker file says that the run has not
completed a checkpoint yet; a directory with neither a checkpoint nor the marker has lost its
checkpoints.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from activemlp_jax.distributed import hosts
from activemlp_jax.training.config import differing_keys
from activemlp_jax.training.step import TrainState
from activemlp_jax.training.workdir import replace_file
from activemlp_jax.utils.digests import check_digests, read_digests, write_digests
from activemlp_jax.utils.errors import Interrupted, UserError, one_line
from activemlp_jax.utils.json_files import expect, read_json
from activemlp_jax.utils.orbax_logs import without_tracebacks
from activemlp_jax.weights.model_directory import describe_non_finite

NOT_EVALUATED = -1.0  # the score of a checkpoint without an evaluation, below all others
CLOCK_INTERVAL = 10  # steps between checks of the clock if there are several hosts
NONE_COMPLETE = ".none_complete"  # the marker file


class _WithDigests(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """Checkpoint directory that writes the digests of its files before taking its final name.

    Once all hosts have written, Orbax calls `finalize` for the checkpoint and for each of its
    items, only on the first host, in the thread that writes.
    """

    _final_path: Any

    async def finalize(self) -> None:
        """Rename the directory to its final name; for a checkpoint, write the digests first."""
        final = self._final_path
        if not final.name.isdecimal():
            await super().finalize()
            return
        # Orbax writes more files while it finalizes, and they need digests as well, so it finalizes
        # to a temporary name first. After a kill, Orbax removes directories with this suffix.
        suffix = ocp.path.atomicity_types.TMP_DIR_SUFFIX
        self._final_path = final.with_name(f"{final.name}.written{suffix}")
        await super().finalize()
        write_digests(Path(self._final_path))
        os.rename(self._final_path, final)
        self._final_path = final
        Path(final.parent, NONE_COMPLETE).unlink(missing_ok=True)


class Restored(NamedTuple):
    """A restored state, and the losses of the steps already done in the current epoch."""

    state: TrainState
    losses: list[float]


class Best(NamedTuple):
    """The best checkpoint: its step, and its score in percent."""

    step: int
    score: float


class Checkpoints:
    """Context manager for the checkpoints of a run; on exit it waits for pending saves.

    All hosts save and restore together, in a directory that they share. The newest checkpoints are
    kept, and so is the one with the highest score among those that were evaluated. The config is
    saved in each checkpoint and compared when one is restored.
    """

    def __init__(self, directory: Path, config: ConfigDict):
        self._config = config
        self._options = config.checkpoint
        self._last_save = time.monotonic()
        self._directory = directory.absolute()
        for step in self._steps():
            with self._reading(step):
                _check_score(self.path(step))
        best = BestN(get_metric_fn=itemgetter("score"), n=1)
        options = ocp.CheckpointManagerOptions(
            best_fn=itemgetter("score"),
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
            if kind is None or issubclass(kind, Interrupted):
                self.wait()
                self._manager.close()
            elif jax.process_count() == 1:  # else it would wait for the hosts that failed
                with contextlib.suppress(Exception):
                    self._manager.close()
        finally:
            self._quiet.__exit__(kind, *error)

    def newest(self, below: int) -> Path | None:
        """Return the path of the newest complete checkpoint before step `below`, or None."""
        with contextlib.suppress(Exception):  # a failed save leaves no checkpoint
            self._manager.wait_until_finished()
        steps = [step for step in self._steps() if step < below]
        return self.path(max(steps)) if steps else None

    def best(self) -> Best | None:
        """Return the evaluated checkpoint with the highest score, or None if none was evaluated."""
        step = self._manager.best_step()
        score = NOT_EVALUATED if step is None else self._manager.metrics(step)["score"]
        return None if score == NOT_EVALUATED else Best(step, score)

    def path(self, step: int) -> Path:
        """Return the directory of the checkpoint of `step`."""
        return self._directory / str(step)

    def _steps(self) -> set[int]:
        """Return the steps that have a complete checkpoint."""
        names = {path.name for path in self._directory.glob("*") if path.is_dir()}
        return {int(name) for name in names if name.isascii() and name.isdecimal()}

    def begin(self, has_records: bool) -> None:
        """Mark the run as having no complete checkpoint yet; call it on the first host only.

        Raises UserError if the run has records of steps but no marker, since it must have lost its
        checkpoints.
        """
        marker = self._directory / NONE_COMPLETE
        if has_records and not marker.exists():
            raise UserError(
                f"{self._directory.parent} has the records of a run, but {self._directory} has "
                "lost its checkpoints; is its disk mounted? To begin again remove metrics.jsonl "
                "and steps.jsonl, or give another --workdir"
            )
        replace_file(marker, "no checkpoint has been complete here yet\n")

    def restore(self, like: TrainState, step: int | None = None) -> Restored | None:
        """Restore the checkpoint of `step`; if it is None, check all and restore the newest one.

        `like` has the state's shapes and shardings. Returns None if there is no checkpoint. Raises
        UserError if a checkpoint is damaged, has weights that are not finite, or belongs to a run
        with other settings, which the error names.
        """
        steps = self._steps()
        wanted = max(steps, default=None) if step is None else step
        if wanted is None:
            return None
        for other in sorted(steps - {wanted}) if step is None else []:
            with self._reading(other):  # the run may need it later
                # A run may have been killed while it removed an old checkpoint.
                _read(self.path(other), may_lack_files=True)
        with self._reading(wanted):
            run = _read(self.path(wanted))
        hosts.wait_for_all("the checkpoints")  # hosts with slow disks may take long to read
        differences = differing_keys(self._config, run["config"])
        if differences:
            raise UserError(
                f"{self.path(wanted)} is of a run with other settings: {'; '.join(differences)}"
            )
        with self._reading(wanted):
            args = ocp.args.Composite(state=ocp.args.StandardRestore(like))
            state = self._manager.restore(wanted, args=args)["state"]
            if broken := describe_non_finite({"variables": state.variables, "ema": state.ema}):
                raise UserError(broken)
        return Restored(state, run["losses"])

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Turn errors into a UserError about checkpoint `step` that also names a good one."""
        try:
            yield
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # Orbax and its dependencies raise many types
            raise UserError(
                f"{self.path(step)} cannot be read: {_reason(error)}; remove it to go on from "
                f"{self._newest_good(step)}"
            ) from error

    def _newest_good(self, without: int) -> str:
        """Return a phrase that names the newest undamaged checkpoint not of step `without`."""
        for step in sorted(self._steps() - {without}, reverse=True):
            with contextlib.suppress(UserError):
                _read(self.path(step), share=False)
                return str(self.path(step))
        return "step 0, and metrics.jsonl and steps.jsonl with it"

    def save(
        self, state: TrainState, step: int, losses: list[float], score: float | None = None
    ) -> None:
        """Start saving a state, unless its step is already saved; training may continue meanwhile.

        `losses` are those of the current epoch so far; `score` is in percent, or None if the state
        was not evaluated. Raises UserError if this save or the previous one failed.
        """
        if step == self._manager.latest_step():
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            run=ocp.args.JsonSave(
                {"config": json.loads(self._config.to_json()), "losses": list(losses)}
            ),
        )
        self._last_save = time.monotonic()
        evaluated = score is not None and math.isfinite(score)
        metrics = {"score": score if evaluated else NOT_EVALUATED}
        with self._writing():  # an error may also come from the previous save
            self._manager.save(step, args=args, metrics=metrics)

    def wait(self) -> None:
        """Wait for pending saves; raise UserError if one fails."""
        with self._writing():
            self._manager.wait_until_finished()

    def check(self) -> None:
        """Raise UserError if a save in the background has failed."""
        with self._writing():
            self._manager.check_for_errors()

    def is_due(self, step: int) -> bool:
        """Return whether to save after `step`, by step number or by time; the same on all hosts.

        With several hosts, the clock is checked only every `CLOCK_INTERVAL` steps, because all use
        the first host's clock, and asking for it takes time.
        """
        every_steps, every_minutes = self._options.every_steps, self._options.every_minutes
        if every_steps and step % every_steps == 0:
            return True
        if not every_minutes or (jax.process_count() > 1 and step % CLOCK_INTERVAL):
            return False
        minutes = (time.monotonic() - self._last_save) / 60
        return hosts.first_host_says(minutes >= every_minutes)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn errors into a UserError that names the directory and the newest whole checkpoint."""
        try:
            yield
        except jax.errors.JaxRuntimeError:  # such as a host that is gone; the disk is not to blame
            raise
        except Exception as error:  # Orbax and its dependencies raise many types
            steps = self._steps()
            kept = f"the newest whole one is {self.path(max(steps))}" if steps else "there is none"
            raise UserError(
                f"a checkpoint cannot be written in {self._directory}: {_reason(error)}; {kept}"
            ) from error


def _check_score(checkpoint: Path) -> None:
    """Raise UserError if the score of a checkpoint cannot be read."""
    path = checkpoint / "metrics" / "metrics"  # where Orbax stores the item `metrics`
    metrics = read_json(path) if path.exists() else {"score": NOT_EVALUATED}
    try:
        expect(metrics["score"], "score", (int, float), NOT_EVALUATED, 100)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not the score of a checkpoint: {_reason(error)}") from error


def _read(checkpoint: Path, share: bool = True, may_lack_files: bool = False) -> dict[str, Any]:
    """Check the digests of a checkpoint's files, and return its config and losses as a dict.

    Checkpoints of earlier versions have no digests. With `share`, each host checks its share of the
    files. With `may_lack_files`, missing files are accepted.
    """
    digests = read_digests(checkpoint)
    path = checkpoint / "run" / "metadata"  # where Orbax stores the item `run`
    if share:
        digests = dict(list(digests.items())[jax.process_index() :: jax.process_count()])
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


def _reason(error: Exception) -> str:
    reason = one_line(error)[:1000]
    return reason if isinstance(error, UserError) else f"{type(error).__name__}: {reason}"
