"""The interface of a task: everything that differs between the things a model is trained for."""

import abc
import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from operator import getitem
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image

from activemlp_jax.data.base import Example, Source
from activemlp_jax.inference.files import ImageFile
from activemlp_jax.utils.errors import UserError
from activemlp_jax.utils.types import Batch, Variables
from activemlp_jax.weights.architecture import Model
from activemlp_jax.weights.model_directory import ARCHITECTURE, ModelCard, backbone

Sums = dict[str, np.ndarray]  # of a dataset, from which metrics are computed
Shapes = dict[str, tuple[tuple[int, ...], str]]  # shape and dtype of each array of a batch
Draw = Callable[[Sequence[tuple[str, ...]]], list[Any]]  # random subtrees of variables, by path
Options = Mapping[str, Any]  # of a command line, by name
Record = dict[str, Any]  # what a command found, as JSON takes it
Test = Callable[[Mapping[str, Variables], Any], dict[str, Sums]]


def same(variables: Variables) -> Variables:
    """The variables as they are."""
    return variables


class Task(abc.ABC):
    """A task with its model and preprocessing.

    Everything else asks the task; nothing else asks which task it is. A new task is a subclass and
    its line in `registry.TASKS`.

    Attributes:
      name: the value of `config.task`, and of `task` in model directories.
      score: the metric, in percent, that compares the states of a run.
      score_name: the same, as people know it.
      counted: what the confusion matrix counts, such as 'images'.
      model_type: the class of its models.
      dataset: images, classes and name of the dataset that the original trained on.
      hub_name: the task's name in model hubs.
      does: what a model of it does to images, for model cards.
      noun: what its models are called in messages.
      evaluate_options: names of the options of `evaluate` that are for this task alone.
      predict_options: the same of `predict`.
      default_batch_size: of `evaluate`.
      written: endings of the files that `predict` writes, which it does not take for images.
      model: the model, which gives logits.
      preprocessing: of the images that it is tested on.
      config: the whole config of a run; None where nothing is trained.
    """

    name: ClassVar[str]
    score: ClassVar[str]
    score_name: ClassVar[str]
    counted: ClassVar[str]
    model_type: ClassVar[type]
    dataset: ClassVar[tuple[int, int, str]]
    hub_name: ClassVar[str]
    does: ClassVar[str]
    noun: ClassVar[str]
    evaluate_options: ClassVar[tuple[str, ...]] = ()
    predict_options: ClassVar[tuple[str, ...]] = ()
    default_batch_size: ClassVar[int] = 128
    written: ClassVar[tuple[str, ...]] = ()

    model: Any
    preprocessing: Any
    config: ConfigDict | None

    @property
    def settings(self) -> ConfigDict:
        """The config of a run."""
        assert self.config is not None, "a task without a config is not trained"
        return self.config

    # Config and data

    @classmethod
    @abc.abstractmethod
    def from_config(cls, config: ConfigDict, num_classes: int) -> "Task":
        """The task of a run; UserError for settings that fit no model or preprocessing."""

    @classmethod
    @abc.abstractmethod
    def from_card(cls, card: ModelCard, options: Options) -> "Task":
        """The task of a model directory; UserError for options that are not for it."""

    @staticmethod
    def check_config(config: ConfigDict) -> None:
        """Raises UserError for settings that this task cannot work with."""
        del config

    @staticmethod
    def check_packages(config: ConfigDict) -> None:
        """Raises UserError if a package is missing that training needs."""
        del config

    @staticmethod
    @abc.abstractmethod
    def open_data(name: str, split: str | None) -> Source:
        """A split of a dataset; None for the split to evaluate on. UserError if unreadable."""

    @staticmethod
    @abc.abstractmethod
    def transform(
        example: Example, rng: np.random.Generator, data: ConfigDict
    ) -> dict[str, np.ndarray]:
        """The arrays of one training sample, on the host; `data` is `config.data`."""

    # Weights to start from

    @staticmethod
    def adopt(config: ConfigDict, card: ModelCard) -> None:
        """Take over the architecture of a model directory to start from, into `config`."""
        for field in ARCHITECTURE:
            value = getattr(backbone(card.model), field)
            is_ratio = field == "mlp_ratios"
            config.model[field] = tuple(map(float, value)) if is_ratio else value

    @abc.abstractmethod
    def start_from(
        self, card: ModelCard, variables: Variables, draw: Draw
    ) -> tuple[Variables, str]:
        """Variables of this model from those of a model directory, and what became of the head."""

    # Training

    @abc.abstractmethod
    def batch_shapes(self) -> Shapes:
        """Shapes and dtypes of a training batch."""

    @abc.abstractmethod
    def inputs(self, batch: Batch, key: jax.Array) -> Any:
        """What a step trains on, made of a batch on the device."""

    @abc.abstractmethod
    def loss(
        self, variables: Variables, inputs: Any, key: jax.Array
    ) -> tuple[jax.Array, Variables]:
        """The mean loss, and the collections other than `params` that have changed."""

    # Evaluation

    @abc.abstractmethod
    def make_test(
        self,
        mesh: Mesh,
        batch_size: int,
        num_threads: int,
        gather: Callable[[Variables], Variables] = same,
        show_progress: bool = False,
    ) -> Test:
        """The function from variables by name and a dataset to sums for `metrics`, by name.

        Args:
          mesh: of all devices.
          batch_size: images at a time over all devices.
          num_threads: that read images on each host.
          gather: variables as they are kept to what the model needs on each device.
          show_progress: whether to draw a progress bar on standard error.
        """

    @staticmethod
    @abc.abstractmethod
    def metrics(sums: Mapping[str, Any]) -> dict[str, float]:
        """The metrics of a dataset, `score` among them."""

    def draw_examples(
        self, variables: Variables, source: Source, class_names: Sequence[str]
    ) -> Image.Image | None:
        """Some examples beside the model's answers, where a picture can show them."""
        del variables, source, class_names
        return None

    # The commands `evaluate` and `predict`

    @staticmethod
    def add_evaluate_options(parser: argparse._ArgumentGroup) -> None:
        """Add `evaluate_options`; not given, each is None or False."""
        del parser

    @abc.abstractmethod
    def report(
        self, found: Mapping[str, Sums], images: int, class_names: Sequence[str]
    ) -> tuple[list[Any], Record]:
        """What `evaluate` prints of sums by kind of weights, and the JSON record of it."""

    @staticmethod
    def add_predict_options(parser: argparse._ArgumentGroup) -> None:
        """Add `predict_options`; not given, each is None or False."""
        del parser

    @abc.abstractmethod
    def plan_predict(
        self, card: ModelCard, files: Sequence[ImageFile], options: Options
    ) -> Callable[[Variables, list[ImageFile]], Iterator[Record]]:
        """Check what `predict` is asked for, before any work, and return what does it.

        The function takes variables and a list, and yields a record for each file that can be
        read; it adds the others to the list.

        Raises:
          UserError: options that cannot work, or files that would be lost.
        """

    @staticmethod
    @abc.abstractmethod
    def print_records(records: Iterator[Record]) -> None:
        """Print the records of `predict` for people."""


def build_model(make: Callable[..., Model], key: str, /, *args: Any, **fields: Any) -> Model:
    """A model from the fields of a config; UserError, naming `key`, for fields that fit none."""
    try:
        return make(*args, **fields)
    except ValueError as error:
        raise UserError(f"{key}: {error}") from error


# Parts of a tree of variables whose shapes depend on the number of classes.
CLASSIFIERS = (
    ("params", "head"),
    ("params", "decode_head", "classifier"),
    ("params", "auxiliary_head", "classifier"),
)


def redraw_heads(
    model: Model, card: ModelCard, variables: Variables, draw: Draw
) -> tuple[Variables, str]:
    """Variables with random `CLASSIFIERS` where `model` has another number of classes.

    Returns:
      The variables, and what became of the head, for people.
    """
    there, here = card.model.num_classes, model.num_classes
    if there == here:
        return variables, f"head kept, {here} classes"
    paths = [path for path in CLASSIFIERS if _has(variables, path)]
    for path, drawn in zip(paths, draw(paths), strict=True):
        reduce(getitem, path[:-1], variables)[path[-1]] = drawn
    return variables, f"head re-initialised, {there} classes there and {here} here"


def _has(tree: Any, path: Sequence[str]) -> bool:
    return not path or (path[0] in tree and _has(tree[path[0]], path[1:]))
