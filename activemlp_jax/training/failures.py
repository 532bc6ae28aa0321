"""Stopping a run when its metrics are NaN or infinite."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from activemlp_jax.distributed import hosts
from activemlp_jax.training.workdir import replace_file
from activemlp_jax.utils.errors import UserError
from activemlp_jax.utils.types import Record


def non_finite(metrics: Record) -> list[str]:
    """Names of the metrics that are NaN or infinite."""
    return [name for name, value in metrics.items() if not math.isfinite(value)]


def stop_at_non_finite(
    workdir: Path, step: int, metrics: Record, examples: Sequence[int], checkpoint: Path | None
) -> UserError:
    """Record the step with non-finite metrics in `non_finite.json`.

    Args:
      workdir: directory of the run; the first host writes the file there.
      step: number of the step, counted from 0.
      metrics: metrics of the step.
      examples: indices in the training set of the step's batch, by row.
      checkpoint: newest checkpoint that is still good; None if there is none.

    Returns:
      The error to raise.
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
