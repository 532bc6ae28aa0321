"""The model directory: weights, and everything needed to use them.

    model.json     task, architecture, classes, preprocessing, origin of the weights
    weights/ema    the averaged variables in orbax format, if there are any
    weights/model  the variables of the last step in orbax format, if there are any
    SHA256SUMS     digests of all these files, checked when they are read

The variables are `params`, and for segmentation also `batch_stats`. Directories of earlier versions
have no digests.

Conversion and training write model directories; every other tool needs nothing but the directory.
"""

import dataclasses
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from activemlp_jax.data.base import check_same_classes
from activemlp_jax.data.preprocessing import Preprocessing, ScenePreprocessing
from activemlp_jax.models.active_mlp import ActiveMLP
from activemlp_jax.models.segmentor import ActiveSegmentor
from activemlp_jax.utils.digests import DIGESTS, check_digests, read_digests, write_digests
from activemlp_jax.utils.errors import UserError, one_line
from activemlp_jax.utils.files import previous_path, read_file
from activemlp_jax.utils.json_files import MOST_BYTES, expect, parse_json, short
from activemlp_jax.utils.orbax_logs import without_tracebacks
from activemlp_jax.utils.types import Variables
from activemlp_jax.weights.architecture import (
    MAX_BLOCKS,
    Model,
    backbone,
    list_keys,
    variant_name,
)
from activemlp_jax.weights.finite import describe_non_finite
from activemlp_jax.weights.torch_files import KINDS, choose_kind
from activemlp_jax.weights.torch_names import variable_shapes

FORMAT = 2
CARD = "model.json"
CARD_KEYS = ("task", "architecture", "classes", "preprocessing", "weights", "source")
ARCHITECTURE = ("depths", "embed_dims", "mlp_ratios", "share_dims", "offset_interval")
HEAD = ("head", "channels", "aux_channels", "neck_channels")

# Limits above what any model needs, and low enough that a file cannot demand much memory.
MAX_CLASSES = 2**20
MAX_CHANNELS = 2**16
MAX_MLP_RATIO = 64

# Errors of `ModelCard.from_json` for content that is not a valid model.json.
CARD_ERRORS = (AttributeError, KeyError, TypeError, ValueError)


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """The content of a `model.json`, which describes the weights of a model directory.

    Args:
      model: the model that the weights are for, in float32 and without drop path.
      preprocessing: the preprocessing that the weights were trained with; for a segmentor, a
        `ScenePreprocessing`.
      kinds: the kinds of weights in the directory: 'ema', 'model' or both.
      default_kind: the kind to use unless another is requested.
      class_names: the names of the classes by label, if known.
      source: the origin of the weights, as JSON values. Training records the dataset, the recipe,
        and the metrics, in percent, with the number of images; conversion records the file, its
        SHA-256 and the epoch.
      task: the task that the model was trained for; by default 'segmentation' for a segmentor and
        'classification' otherwise.
    """

    model: Model
    preprocessing: Preprocessing | ScenePreprocessing
    kinds: tuple[str, ...]
    default_kind: str
    class_names: tuple[str, ...] | None = None
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    task: str = ""

    def __post_init__(self) -> None:
        """Fill in the default task of the model."""
        if not self.task:
            is_segmentor = isinstance(self.model, ActiveSegmentor)
            object.__setattr__(self, "task", "segmentation" if is_segmentor else "classification")

    @property
    def name(self) -> str | None:
        """Name of the published variant, for a segmentor its backbone's; None for other models."""
        return variant_name(self.model)

    def __repr__(self) -> str:
        """Summarize the card on one line; `to_json` gives all of it."""
        name = self.name or "an ActiveMLP of no published variant"
        if isinstance(self.model, ActiveSegmentor):
            name += f" under {self.model.head}"
        classes = f"{self.model.num_classes} classes"
        if self.class_names:
            classes += f" ({list_keys(list(self.class_names), 3)})"
        preprocessing = self.preprocessing
        if isinstance(preprocessing, Preprocessing):
            images = f"images of {preprocessing.image_size} pixels"
        elif preprocessing.long_side:
            size = f"{preprocessing.long_side} x {preprocessing.short_side}"
            images = f"images resized into {size} pixels"
        else:
            images = "images as large as they are"
        kinds = [f"{kind}{' (default)' * (kind == self.default_kind)}" for kind in self.kinds]
        return f"ModelCard({name}, {classes}, {images}, weights {', '.join(kinds)})"

    def to_json(self) -> dict[str, Any]:
        """Return the content of `model.json` as a dict for `json.dumps`.

        Returns:
          A dict with the keys `format`, the version of the format; `task`, such as
          'classification'; `name`, the published variant or None; `architecture`, the fields of
          `ActiveMLP` that define its architecture, for segmentation under `backbone`, next to the
          fields of the head; `classes`, with their `number`, and their `names` by label or None;
          `preprocessing`, its fields, with sides in pixels, and mean and standard deviation of
          values from 0 to 1; `weights`, with the available `kinds` and the `default`; and `source`,
          unchanged.
        """
        return {
            "format": FORMAT,
            "task": self.task,
            "name": self.name,
            "architecture": architecture(self.model),
            "classes": {"number": self.model.num_classes, "names": self.class_names},
            "preprocessing": dataclasses.asdict(self.preprocessing),
            "weights": {"kinds": self.kinds, "default": self.default_kind},
            "source": dict(self.source),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "ModelCard":
        """Build a card from the content of a `model.json`: the inverse of `to_json`.

        Args:
          content: the parsed JSON of a `model.json`.

        Raises:
          ValueError: the content is not in this format, exceeds a limit, or contradicts itself.
        """
        _expect_keys(content, "it", ("format", *CARD_KEYS))
        if content["format"] != FORMAT:
            raise ValueError(f"format is {short(content['format'])}, expected {FORMAT}")
        if not isinstance(content["task"], str) or not content["task"].isidentifier():
            raise ValueError(f"task is {short(content['task'])}, expected a name")
        _expect_keys(content["architecture"], "architecture", ())
        is_segmentor = "backbone" in content["architecture"]
        classes, weights = content["classes"], content["weights"]
        _expect_keys(classes, "classes", ("number", "names"))
        _expect_keys(weights, "weights", ("kinds", "default"))
        number = expect(classes["number"], "classes.number", int, 1, MAX_CLASSES)
        kinds, default = weights["kinds"], weights["default"]
        if not isinstance(kinds, list | tuple) or not all(kind in list(KINDS) for kind in kinds):
            raise ValueError(f"weights.kinds is {short(kinds)}, expected a list out of {[*KINDS]}")
        if default not in kinds:
            raise ValueError(
                f"weights {short(default)} are the default, but there are only {tuple(kinds)}"
            )
        if not isinstance(content["source"], Mapping):
            raise ValueError(f"source is {short(content['source'])}, expected an object")
        build_model = _segmentor if is_segmentor else _classifier
        return cls(
            build_model(content["architecture"], number),
            _preprocessing(ScenePreprocessing if is_segmentor else Preprocessing, content),
            tuple(kinds),
            default,
            _class_names(classes["names"], number),
            content["source"],
            content["task"],
        )


def _expect_keys(
    content: Any, name: str, keys: Collection[str], known: Collection[str] | None = None
) -> None:
    """Raise ValueError if `content` is not a mapping, lacks a key, or has one not in `known`."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{name} is {short(content)}, expected an object")
    missing = [key for key in keys if key not in content]
    if missing:
        raise ValueError(f"{name} has no {', '.join(missing)}")
    unknown = [key for key in content if known is not None and key not in known]
    if unknown:
        raise ValueError(f"{name} has {short(unknown[0])}, which is unknown")


def _class_names(names: Any, number: int) -> tuple[str, ...] | None:
    """Check the class names of a card; None if it has none."""
    if not names:
        return None
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"classes.names is {short(names)}, expected a list of names")
    if len(names) != number:
        raise ValueError(f"{len(names)} names for {number} classes")
    return tuple(names)


def _preprocessing(kind: type[Any], content: Mapping[str, Any]) -> Any:
    """Build preprocessing of class `kind` from a card; the class checks the values."""
    fields = content["preprocessing"]
    names = [field.name for field in dataclasses.fields(kind)]
    _expect_keys(fields, "preprocessing", ("mean", "std"), names)
    return kind(**_tuples(fields))


def _classifier(fields: Any, classes: int, name: str = "architecture") -> ActiveMLP:
    """Build an ActiveMLP from the `architecture` of a card."""
    _expect_keys(fields, name, ARCHITECTURE, ARCHITECTURE)
    number = (int, float)
    for field, kind, limit in (
        ("depths", int, MAX_BLOCKS),
        ("embed_dims", int, MAX_CHANNELS),
        ("share_dims", int, MAX_CHANNELS),
        ("mlp_ratios", number, MAX_MLP_RATIO),
    ):
        values = fields[field]
        if not isinstance(values, list | tuple) or len(values) != 4:
            raise ValueError(f"{name}.{field} is {short(values)}, expected four numbers")
        for value in values:
            expect(value, f"{name}.{field}", kind, 0, limit)
    expect(sum(fields["depths"]), f"the sum of {name}.depths", int, 0, MAX_BLOCKS)
    expect(fields["offset_interval"], f"{name}.offset_interval", int, 1, 2**31)
    return ActiveMLP(**_tuples(fields), num_classes=classes)


def _segmentor(fields: Any, classes: int) -> ActiveSegmentor:
    """Build an ActiveSegmentor from the `architecture` of a card."""
    _expect_keys(fields, "architecture", ("backbone", *HEAD), ("backbone", *HEAD))
    for field in HEAD[1:]:
        expect(fields[field], f"architecture.{field}", int, 1, MAX_CHANNELS)
    network = _classifier(fields["backbone"], 1, "architecture.backbone")
    return ActiveSegmentor(**{**fields, "backbone": architecture(network)}, num_classes=classes)


def architecture(model: Model) -> dict[str, Any]:
    """Return the fields that define a model's architecture, without the number of classes."""
    fields = {field: getattr(backbone(model), field) for field in ARCHITECTURE}
    if isinstance(model, ActiveSegmentor):
        return {"backbone": fields} | {field: getattr(model, field) for field in HEAD}
    return fields


def _tuples(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of parsed JSON with its lists converted to tuples."""
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
    }


def check_classes(card: ModelCard, class_names: tuple[str, ...], data: str) -> None:
    """Raise UserError if the dataset named `data` has other classes than the model."""
    if len(class_names) != card.model.num_classes:
        raise UserError(
            f"{data} has {len(class_names)} classes, but the model has {card.model.num_classes}; "
            "fine-tune it on them first"
        )
    if card.class_names:
        check_same_classes(card.class_names, class_names, data)


def check_card(card: object, model: Model) -> None:
    """Raise ValueError unless `card` fits the type and the number of classes of `model`."""
    if not isinstance(card, ModelCard):
        raise ValueError(f"card is a {type(card).__name__}, expected what read_card gives")
    given, described = (
        f"{type(m).__name__} of {m.num_classes} classes" for m in (model, card.model)
    )
    if given != described:
        raise ValueError(f"card is of an {described}, but the model is an {given}")


def write_model(directory: Path, card: ModelCard, weights: Mapping[str, Variables]) -> None:
    """Write a model into an empty directory; with several hosts, only one may call this.

    Args:
      directory: an empty directory, such as one from `utils.files.write_directory_aside`.
      card: the content of `model.json`.
      weights: the variables of `card.model` as numpy arrays, for every kind in `card.kinds`.

    Raises:
      UserError: the files cannot be written, for example because the disk is full.
    """
    host = jax.process_index()
    this_host_only = ocp.options.MultiprocessingOptions(
        primary_host=host, active_processes={host}, barrier_sync_key_prefix="write_model"
    )
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=this_host_only)
    # One line for each key reads better than `indent`, which puts every number on its own line.
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in card.to_json().items()]
    try:
        with (
            without_tracebacks(),
            ocp.Checkpointer(handler, multiprocessing_options=this_host_only) as checkpointer,
        ):
            for kind in card.kinds:
                path = directory.absolute() / "weights" / kind
                checkpointer.save(path, args=ocp.args.StandardSave(weights[kind]))
        (directory / CARD).write_text("{\n" + ",\n".join(lines) + "\n}\n")
        write_digests(directory)
    # tensorstore reports a full disk as any of these.
    except (OSError, RuntimeError, ValueError) as error:
        reason = one_line(getattr(error, "strerror", None) or error)[:500]
        raise UserError(f"no model can be written in {directory.parent}: {reason}") from error


def read_card(directory: str | os.PathLike[str]) -> ModelCard:
    """Read the `model.json` of a model directory: architecture, classes, preprocessing and origin.

    Args:
      directory: a model directory, as written by conversion or training.

    Returns:
      A `ModelCard`.

    Raises:
      UserError: `model.json` is missing, invalid, or differs from its SHA-256 in `SHA256SUMS`.
    """
    root = Path(directory).expanduser()
    path = root / CARD
    if not path.is_file():
        raise UserError(f"{directory} is not a model directory: {_missing_card(root)}")
    text = read_file(path, MOST_BYTES)
    try:
        card = ModelCard.from_json(parse_json(text, "it"))
    except CARD_ERRORS as error:
        raise UserError(f"{path} is not a model description: {one_line(error)}") from error
    digests = read_digests(root)
    try:
        check_digests(root, {CARD: digests[CARD]} if CARD in digests else {})
    except UserError as error:
        raise UserError(
            f"{error}; if you changed it on purpose, remove its line from {root / DIGESTS}"
        ) from error
    return card


def _missing_card(root: Path) -> str:
    """Explain why `root` has no `model.json`, and how to get one."""
    if not root.exists():
        previous = previous_path(root)
        if previous.exists():
            return f"a kill cut short its replacement; what was there before is {previous}"
        return "there is no such folder"
    if root.is_file():
        return "it is a file; convert_torch_weights.py makes a model directory from PyTorch's files"
    if (root / "model" / "model.json").is_file():
        return f"it is the workdir of a run; the run's model is {root / 'model'}"
    return "it has no model.json; convert_torch_weights.py and train.py write such directories"


def read_weights(directory: str | os.PathLike[str], card: ModelCard, kind: str) -> Variables:
    """Read the variables of one kind as numpy arrays, in the dtypes in which they were written.

    Args:
      directory: a model directory.
      card: its card, from `read_card`.
      kind: one of `card.kinds`.

    Returns:
      The variables of `card.model`: `{'params': tree}`, and for segmentation `batch_stats`.

    Raises:
      UserError: the variables are missing, unreadable, changed since they were written, not finite,
        or not those of `card.model`.
    """
    root = Path(directory).expanduser().absolute()
    path = root / "weights" / kind
    try:
        # Users may delete the other kind to save space.
        removed = tuple(
            f"weights/{other}/"
            for other in card.kinds
            if other != kind and not (root / "weights" / other).exists()
        )
        digests = {
            name: digest
            for name, digest in read_digests(root).items()
            if not name.startswith(removed)
        }
        check_digests(root, digests)
    except UserError as error:
        raise UserError(
            f"{path} cannot be read: {error}; take another copy of {directory}"
        ) from error
    try:
        with without_tracebacks(), ocp.StandardCheckpointer() as checkpointer:
            variables = checkpointer.restore(path)
    except MemoryError:
        raise
    except Exception as error:  # orbax and tensorstore raise many types
        reason = one_line(str(error).split("\n")[0]) or type(error).__name__
        raise UserError(f"{path} cannot be read: {reason}") from error
    variables = jax.tree.map(np.asarray, variables)
    shapes = {key: value.shape for key, value in traverse_util.flatten_dict(variables).items()}
    expected = variable_shapes(card.model)
    wrong = [key for key in shapes | expected if shapes.get(key) != expected.get(key)]
    if wrong:
        name, shape = "/".join(wrong[0][1:]), shapes.get(wrong[0], "absent")
        raise UserError(
            f"{path} does not fit the directory's model.json: {len(wrong)} parameters differ; "
            f"{name} is {shape}, expected {expected.get(wrong[0], 'none')}"
        )
    if broken := describe_non_finite(variables):
        raise UserError(f"{path} cannot be used: {broken}")
    return variables


def load_pretrained(
    directory: str | os.PathLike[str], weights: str = "auto"
) -> tuple[Model, Variables]:
    """Load the model and the weights that conversion or training wrote.

    Args:
      directory: a model directory.
      weights: 'ema', 'model', or 'auto' for the directory's default: the averaged weights if it
        has them, unless conversion was told otherwise.

    Returns:
      The linen module, and its variables as arrays on the default device: `{'params': tree}`, and
      for segmentation `batch_stats`.

    Raises:
      UserError: the directory does not exist, is incomplete, or lacks these weights.
    """
    card = read_card(directory)
    kind = card.default_kind if weights == "auto" else choose_kind(card.kinds, weights, directory)
    variables = read_weights(directory, card, kind)
    return card.model, jax.tree.map(jnp.asarray, variables)
