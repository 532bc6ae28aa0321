"""Checkpoints of the whole state by orbax: asynchronous, and never half there."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Sharding

from activemlp_jax.training.step import TrainState


class Checkpoints:
    """The states of a run in one directory; used as a context, which waits for pending saves."""

    def __init__(self, directory: Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self._manager.close()

    def restore_latest(self, like: Any, sharding: Sharding) -> TrainState | None:
        """The newest state, placed as `sharding` says, or None where there is none.

        Args:
          like: a state of shapes, as `jax.eval_shape` gives.
          sharding: of every array.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), like
        )
        return self._manager.restore(step, args=ocp.args.StandardRestore(target))

    def save(self, state: TrainState) -> None:
        """Begin to save `state`, under its step; training may go on."""
        self._manager.save(int(state.step), args=ocp.args.StandardSave(state))
