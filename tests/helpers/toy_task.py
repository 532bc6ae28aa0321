"""The part of a task that a training step uses."""

from collections.abc import Callable
from typing import Any, NamedTuple


class ToyTask(NamedTuple):
    """A task with any loss; by default, its inputs are the batch."""

    loss: Callable[..., Any]
    inputs: Callable[..., Any] = lambda batch, _: batch
