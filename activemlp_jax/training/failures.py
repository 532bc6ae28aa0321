"""What is left behind when a run cannot go on."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from activemlp_jax.distributed.sharding import is_first_host
from activemlp_jax.training.workdir import replace_file
from activemlp_jax.utils.errors import UserError
from activemlp_jax.utils.types import Record


def non_finite(figures: Record) -> list[str]:
    """Names of the figures that are no number."""
    return [name for name, value in figures.items() if not math.isfinite(value)]


def stop_at_non_finite(
    workdir: Path, step: int, figures: Record, examples: Sequence[int], checkpoint: Path | None
) -> UserError:
    """Write down what led to figures that are not finite; the error to raise.

    Args:
      workdir: of the run; the first host writes `non_finite.json` there.
      step: that found them; steps count from 0.
      figures: of the step.
      examples: indices in the training set of the step's batch, by row.
      checkpoint: the newest whose weights still gave finite figures.
    """
    broken = non_finite(figures)
    found = {name: str(figures[name]) if name in broken else figures[name] for name in figures}
    good = str(checkpoint) if checkpoint else None
    content = {"step": step, **found, "last_good_checkpoint": good, "examples": list(examples)}
    path = workdir / "non_finite.json"
    if is_first_host():
        replace_file(path, json.dumps(content) + "\n")
    where = f"the last good checkpoint is {good}" if good else "there is no good checkpoint"
    names = " and ".join(f"{name.replace('_', ' ')} is {found[name]}" for name in broken)
    return UserError(
        f"the {names} at step {step}; the run stops here; {where}; "
        f"{path} has the indices of the batch"
    )
