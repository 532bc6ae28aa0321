"""The interface of a task: everything in training and inference that differs between tasks."""

import abc
import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image

from activemlp_jax.data.base import Example, Source
from activemlp_jax.inference.images import ImageFile
from activemlp_jax.models.segmentor import Model, backbone
from activemlp_jax.utils.errors import UserError
from activemlp_jax.utils.types import Batch, Record, Variables
from activemlp_jax.weights.model_card import ModelCard
from activemlp_jax.weights.model_types import ARCHITECTURE

Sums = dict[str, np.ndarray]  # totals over a dataset, from which metrics are computed
Shapes = dict[str, tuple[tuple[int, ...], str]]  # shape and dtype of each array of a batch
Draw = Callable[[Sequence[tuple[str, ...]]], list[Any]]  # paths -> random subtrees of variables
Options = Mapping[str, Any]  # command-line options by name
Test = Callable[[Mapping[str, Variables], Any], dict[str, Sums]]


class Usage(NamedTuple):
    """How to use an exported model, for its README: a sentence and two pieces of Python code."""

    preparation: str  # how an image becomes a model's input
    crop: str  # code that computes `left`, `top` and `side` of the input from `photo` and `prep`
    answer: str  # code that prints what `logits` mean, with `label_name` where a label's name goes


T = TypeVar("T")


class Task(abc.ABC):
    """A task with its model and preprocessing.

    Training, `evaluate` and `predict` call these methods and never ask which task it is. To add a
    task whose labels are classes, write a subclass and add it to `registry.TASKS`.
    """

    name: ClassVar[str]  # value of `config.task`, and of `task` in model directories
    score: ClassVar[str]  # metric, in percent, that compares the states of a run; higher is better
    score_name: ClassVar[str]  # name of that metric in messages and plots
    counted: ClassVar[str]  # what the confusion matrix counts, such as 'images'
    model_type: ClassVar[type]
    dataset: ClassVar[tuple[int, int, str]]  # images, classes and name of the original's data
    hub_name: ClassVar[str]  # name of the task on model hubs
    does: ClassVar[str]  # what a model does with images, as a phrase for model cards
    noun: ClassVar[str]  # what messages call a model of this task
    evaluate_options: ClassVar[tuple[str, ...]] = ()  # options of the command for this task only
    predict_options: ClassVar[tuple[str, ...]] = ()
    default_batch_size: ClassVar[int] = 128  # of `evaluate`
    written: ClassVar[tuple[str, ...]] = ()  # endings of files that `predict` writes, never reads

    model: Any  # returns logits
    preprocessing: Any  # for evaluation
    config: ConfigDict | None  # config of the run; None if the task is not for training

    @property
    def settings(self) -> ConfigDict:
        """Return the config; only a task made for training has one."""
        assert self.config is not None, "a task without a config is not for training"
        return self.config

    # Config and data

    @classmethod
    @abc.abstractmethod
    def from_config(cls, config: ConfigDict, num_classes: int) -> "Task":
        """Make the task of a run; raise UserError for an invalid model or preprocessing."""

    @classmethod
    @abc.abstractmethod
    def from_card(cls, card: ModelCard, options: Options) -> "Task":
        """Make the task of a model directory; raise UserError for invalid options."""

    @staticmethod
    def check_config(config: ConfigDict) -> None:
        """Raise UserError for settings that this task does not support."""
        del config

    @staticmethod
    def check_packages(config: ConfigDict) -> None:
        """Raise UserError if a package that training needs is not installed."""
        del config

    @staticmethod
    @abc.abstractmethod
    def open_data(name: str, split: str | None) -> Source:
        """Open a split, by default the evaluation split; raise UserError if it cannot be read."""

    @staticmethod
    @abc.abstractmethod
    def transform(
        example: Example, rng: np.random.Generator, config: ConfigDict
    ) -> dict[str, np.ndarray]:
        """Make the arrays of one training sample, on the host; `config` is the whole config."""

    # Weights to start from

    @staticmethod
    def adopt(config: ConfigDict, card: ModelCard) -> None:
        """Copy the architecture in `card`, which describes the model to start from, to `config`."""
        for field in ARCHITECTURE:
            value = getattr(backbone(card.model), field)
            is_ratio = field == "mlp_ratios"
            config.model[field] = tuple(map(float, value)) if is_ratio else value

    @abc.abstractmethod
    def start_from(
        self, card: ModelCard, variables: Variables, draw: Draw
    ) -> tuple[Variables, str]:
        """Make initial variables of this task's model from `variables` of a model directory.

        `draw` makes random subtrees of this model's variables, given their paths.

        Returns the variables, and a phrase that says what became of the head.
        """

    # Training

    @abc.abstractmethod
    def batch_shapes(self) -> Shapes:
        """Return the shape and dtype of each array of a training batch."""

    @abc.abstractmethod
    def inputs(self, batch: Batch, key: jax.Array) -> Any:
        """Prepare the inputs of `loss` from a batch, on the device; `key` is for augmentation."""

    @abc.abstractmethod
    def loss(
        self, variables: Variables, inputs: Any, key: jax.Array
    ) -> tuple[jax.Array, Variables]:
        """Compute the mean loss, and the updated collections other than `params`."""

    # Evaluation

    @abc.abstractmethod
    def make_test(
        self, mesh: Mesh, batch_size: int, num_threads: int, show_progress: bool = False
    ) -> Test:
        """Make a function that takes variables by name and a dataset, and returns sums by name.

        Args:
          mesh: mesh of all devices, over which the variables may be split.
          batch_size: images per batch, over all devices.
          num_threads: threads that read images, on each host.
          show_progress: whether to show a progress bar on standard error.
        """

    @staticmethod
    @abc.abstractmethod
    def metrics(sums: Mapping[str, Any]) -> dict[str, float]:
        """Compute the metrics of a dataset from its sums; `score` is one of them."""

    def draw_sums(self, sums: Mapping[str, Any], class_names: Sequence[str], path: Path) -> None:
        """Draw the sums of a test to a file; by default, the confusion matrix if there is one."""
        if "confusion" not in sums:
            return
        from activemlp_jax.plots.training import draw_confusion  # slow to import

        confusion = sums["confusion"]
        correct, total = int(np.trace(confusion)), int(confusion.sum())
        share = f"{100 * correct / total:.2f}%"
        title = f"{correct:,} of {total:,} test {self.counted} right ({share})"
        draw_confusion(confusion, class_names, title, path)

    def draw_examples(
        self, variables: Variables, source: Source, class_names: Sequence[str]
    ) -> Image.Image | None:
        """Draw examples with the model's predictions; None if the task has no such picture."""
        del variables, source, class_names
        return None

    # The commands `evaluate` and `predict`

    @staticmethod
    def add_evaluate_options(parser: argparse._ArgumentGroup) -> None:
        """Add the options in `evaluate_options`; each must default to None or False."""
        del parser

    @abc.abstractmethod
    def report(
        self, results: Mapping[str, Sums], images: int, class_names: Sequence[str]
    ) -> tuple[list[Any], Record]:
        """Describe the `results` of `evaluate`: per kind of weights, the sums over all `images`.

        Returns a list of what to print, each a line of text or a `rich` renderable, and the record
        for JSON.
        """

    @staticmethod
    def add_predict_options(parser: argparse._ArgumentGroup) -> None:
        """Add the options in `predict_options`; each must default to None or False."""
        del parser

    @abc.abstractmethod
    def plan_predict(
        self, card: ModelCard, files: Sequence[ImageFile], options: Options
    ) -> Callable[[Variables, list[ImageFile]], Iterator[Record]]:
        """Check the arguments of `predict` before any work, and make the function that runs it.

        Returns:
          A function that takes variables and a list, and yields a record for each file that can be
          read. It adds the files that cannot be read to the list.

        Raises:
          UserError: invalid options, or existing files that would be overwritten.
        """

    @staticmethod
    @abc.abstractmethod
    def print_records(records: Iterator[Record]) -> None:
        """Print the records of `predict` in readable form."""

    # The command `export`

    @staticmethod
    def class_names(card: ModelCard) -> tuple[str, ...] | None:
        """Return the class names to show to people, in label order; None if unknown."""
        return card.class_names

    @staticmethod
    @abc.abstractmethod
    def usage(preprocessing: Any) -> Usage:
        """Describe how to use an exported model."""


def build(make: Callable[..., T], prefix: str, /, *args: Any, **fields: Any) -> T:
    """Call `make`; turn a ValueError into a UserError whose message starts with `prefix`."""
    try:
        return make(*args, **fields)
    except ValueError as error:
        raise UserError(f"{prefix}{error}") from error


# Paths of the variables whose shapes depend on the number of classes.
CLASSIFIERS = (
    ("params", "head"),
    ("params", "decode_head", "classifier"),
    ("params", "auxiliary_head", "classifier"),
)


def redraw_heads(
    model: Model, card: ModelCard, variables: Variables, draw: Draw
) -> tuple[Variables, str]:
    """Reinitialize `CLASSIFIERS` in place if the number of classes differs from that of `card`.

    Arguments and results are as in `Task.start_from`; `model` has the architecture of `card`.
    """
    old, new = card.model.num_classes, model.num_classes
    if old == new:
        return variables, f"head kept, {new} classes"
    paths = [path for path in CLASSIFIERS if path[1] in variables["params"]]
    for path, drawn in zip(paths, draw(paths), strict=True):
        reduce(getitem, path[:-1], variables)[path[-1]] = drawn
    return variables, f"head re-initialized, {old} classes there and {new} here"
