"""The model directory: weights and all one must know to use them.

    model.json     architecture, classes, preprocessing, where the weights come from
    weights/ema    the averaged variables, by orbax, where there are any
    weights/model  the variables as training left them, likewise
    SHA256SUMS     digests of all these files, checked when they are read

Variables are `params`, and for segmentation `batch_stats`. Directories of earlier versions have no
digests.

Conversion and training write it; every other tool takes just the directory.
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
    MOST_BLOCKS,
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

# More than any model needs, and little enough that a file which asks for more costs nothing.
MOST_CLASSES = 2**20
MOST_CHANNELS = 2**16
MOST_RATIO = 64

# What `ModelCard.from_json` raises where there is none.
BROKEN_CARD = (AttributeError, KeyError, TypeError, ValueError)


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """The content of `model.json`, which describes the weights of a model directory.

    Args:
      model: of the weights, in float32 and without drop path.
      preprocessing: that the weights were made for; of a segmentor, a `ScenePreprocessing`.
      kinds: of weights, out of 'ema' and 'model'.
      default_kind: the one to use where none is asked for.
      class_names: by label, where they are known.
      source: where the weights come from, as JSON takes it. Training says the data set, the recipe,
        and what was measured, in percent, on how many images; conversion says the file, its SHA-256
        and the epoch.
      task: what the model was trained for; by default classification or segmentation, as the model.
    """

    model: Model
    preprocessing: Preprocessing | ScenePreprocessing
    kinds: tuple[str, ...]
    default_kind: str
    class_names: tuple[str, ...] | None = None
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    task: str = ""

    def __post_init__(self) -> None:
        """The usual task of such a model where none is given."""
        if not self.task:
            is_segmentor = isinstance(self.model, ActiveSegmentor)
            object.__setattr__(self, "task", "segmentation" if is_segmentor else "classification")

    @property
    def name(self) -> str | None:
        """The published variant's, also of a backbone; None where it is none of them."""
        return variant_name(self.model)

    def __repr__(self) -> str:
        """On one line; `to_json` has it all."""
        name = self.name or "an ActiveMLP of no published variant"
        if isinstance(self.model, ActiveSegmentor):
            name += f" under {self.model.head}"
        classes = f"{self.model.num_classes} classes"
        if self.class_names:
            classes += f" ({list_keys(list(self.class_names), 3)})"
        shown = self.preprocessing
        if isinstance(shown, Preprocessing):
            images = f"images of {shown.image_size} pixels"
        elif shown.long_side:
            images = f"images resized into {shown.long_side} x {shown.short_side} pixels"
        else:
            images = "images as large as they are"
        kinds = [f"{kind}{' (default)' * (kind == self.default_kind)}" for kind in self.kinds]
        return f"ModelCard({name}, {classes}, {images}, weights {', '.join(kinds)})"

    def to_json(self) -> dict[str, Any]:
        """The content of `model.json`, as `json.dumps` takes it.

        Returns:
          By key: `format`, the number of this form; `task`, such as 'classification';
          `name`, that of the published variant or None; `architecture`, the fields of `ActiveMLP`
          that say its shape, for segmentation under `backbone` beside those of the head; `classes`,
          their `number`, and their `names` by label or None; `preprocessing`, its fields, with
          sides in pixels, and mean and standard deviation of values from 0 to 1; `weights`, the
          `kinds` that there are and the `default`; and `source`, as it is.
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
        """The inverse of `to_json`.

        Args:
          content: what `json.loads` reads in a `model.json`.

        Raises:
          ValueError: it is not of this form, asks for more than any model needs, or contradicts
            itself.
        """
        _expect_keys(content, "it", ("format", *CARD_KEYS))
        if content["format"] != FORMAT:
            raise ValueError(f"format is {short(content['format'])}, expected {FORMAT}")
        if not isinstance(content["task"], str) or not content["task"].isidentifier():
            raise ValueError(f"task is {short(content['task'])}, expected a name")
        _expect_keys(content["architecture"], "architecture", ())
        to_segment = "backbone" in content["architecture"]
        classes, weights = content["classes"], content["weights"]
        _expect_keys(classes, "classes", ("number", "names"))
        _expect_keys(weights, "weights", ("kinds", "default"))
        number = expect(classes["number"], "classes.number", int, 1, MOST_CLASSES)
        kinds, default = weights["kinds"], weights["default"]
        if not isinstance(kinds, list | tuple) or not all(kind in list(KINDS) for kind in kinds):
            raise ValueError(f"weights.kinds is {short(kinds)}, expected a list out of {[*KINDS]}")
        if default not in kinds:
            raise ValueError(
                f"weights {short(default)} are the default, but there are only {tuple(kinds)}"
            )
        if not isinstance(content["source"], Mapping):
            raise ValueError(f"source is {short(content['source'])}, expected an object")
        make = _segmentor if to_segment else _classifier
        return cls(
            make(content["architecture"], number),
            _preprocessing(ScenePreprocessing if to_segment else Preprocessing, content),
            tuple(kinds),
            default,
            _class_names(classes["names"], number),
            content["source"],
            content["task"],
        )


def _expect_keys(
    content: Any, name: str, keys: Collection[str], known: Collection[str] | None = None
) -> None:
    """Raises ValueError unless `content` is a mapping with all `keys` and no unknown ones."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{name} is {short(content)}, expected an object")
    missing = [key for key in keys if key not in content]
    if missing:
        raise ValueError(f"{name} has no {', '.join(missing)}")
    unknown = [key for key in content if known is not None and key not in known]
    if unknown:
        raise ValueError(f"{name} has {short(unknown[0])}, which is unknown")


def _class_names(names: Any, number: int) -> tuple[str, ...] | None:
    """Class names as JSON has them, where there are any."""
    if not names:
        return None
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"classes.names is {short(names)}, expected a list of names")
    if len(names) != number:
        raise ValueError(f"{len(names)} names for {number} classes")
    return tuple(names)


def _preprocessing(kind: type[Any], content: Mapping[str, Any]) -> Any:
    """Preprocessing as JSON has it; the class checks the values."""
    fields = content["preprocessing"]
    names = [field.name for field in dataclasses.fields(kind)]
    _expect_keys(fields, "preprocessing", ("mean", "std"), names)
    return kind(**_tuples(fields))


def _classifier(fields: Any, classes: int, name: str = "architecture") -> ActiveMLP:
    """An ActiveMLP of the size of some model, from its fields as JSON has them."""
    _expect_keys(fields, name, ARCHITECTURE, ARCHITECTURE)
    number = (int, float)
    for field, kind, most in (
        ("depths", int, MOST_BLOCKS),
        ("embed_dims", int, MOST_CHANNELS),
        ("share_dims", int, MOST_CHANNELS),
        ("mlp_ratios", number, MOST_RATIO),
    ):
        values = fields[field]
        if not isinstance(values, list | tuple) or len(values) != 4:
            raise ValueError(f"{name}.{field} is {short(values)}, expected four numbers")
        for value in values:
            expect(value, f"{name}.{field}", kind, 0, most)
    expect(sum(fields["depths"]), f"the sum of {name}.depths", int, 0, MOST_BLOCKS)
    expect(fields["offset_interval"], f"{name}.offset_interval", int, 1, 2**31)
    return ActiveMLP(**_tuples(fields), num_classes=classes)


def _segmentor(fields: Any, classes: int) -> ActiveSegmentor:
    """An ActiveSegmentor, likewise."""
    _expect_keys(fields, "architecture", ("backbone", *HEAD), ("backbone", *HEAD))
    for field in HEAD[1:]:
        expect(fields[field], f"architecture.{field}", int, 1, MOST_CHANNELS)
    below = _classifier(fields["backbone"], 1, "architecture.backbone")
    return ActiveSegmentor(**{**fields, "backbone": architecture(below)}, num_classes=classes)


def architecture(model: Model) -> dict[str, Any]:
    """The fields of a model's type that say its shape, but for the number of classes."""
    fields = {field: getattr(backbone(model), field) for field in ARCHITECTURE}
    if isinstance(model, ActiveSegmentor):
        return {"backbone": fields} | {field: getattr(model, field) for field in HEAD}
    return fields


def _tuples(content: Mapping[str, Any]) -> dict[str, Any]:
    """A dict as JSON gives it, with tuples for lists."""
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
    }


def check_classes(card: ModelCard, class_names: tuple[str, ...], what: str) -> None:
    """Raises UserError if a data set, `what`, has other classes than the model was made for."""
    if len(class_names) != card.model.num_classes:
        raise UserError(
            f"{what} has {len(class_names)} classes, but the model has {card.model.num_classes}; "
            "fine-tune it on them first"
        )
    if card.class_names:
        check_same_classes(card.class_names, class_names, what)


def check_card(card: object, model: Model) -> None:
    """Raises ValueError unless `card` is a ModelCard of the type and class count of `model`."""
    if not isinstance(card, ModelCard):
        raise ValueError(f"card is a {type(card).__name__}, expected what read_card gives")
    ours, theirs = (f"{type(m).__name__} of {m.num_classes} classes" for m in (model, card.model))
    if ours != theirs:
        raise ValueError(f"card is of an {theirs}, but the model is an {ours}")


def write_model(directory: Path, card: ModelCard, weights: Mapping[str, Variables]) -> None:
    """Fill an empty directory; of several hosts, one alone calls it.

    Args:
      directory: to write into; see `files.write_directory_aside`.
      card: what to say of the weights.
      weights: variables of `card.model`, numpy arrays, by the kinds that `card` names.

    Raises:
      UserError: it cannot be written, as on a full disk.
    """
    host = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=host, active_processes={host}, barrier_sync_key_prefix="write_model"
    )
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    # A line a topic: easier to read than a line a number.
    topics = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in card.to_json().items()]
    try:
        with (
            without_tracebacks(),
            ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer,
        ):
            for kind in card.kinds:
                place = directory.absolute() / "weights" / kind
                checkpointer.save(place, args=ocp.args.StandardSave(weights[kind]))
        (directory / CARD).write_text("{\n" + ",\n".join(topics) + "\n}\n")
        write_digests(directory)
    # A full disk is any of them to tensorstore.
    except (OSError, RuntimeError, ValueError) as error:
        reason = one_line(getattr(error, "strerror", None) or error)[:500]
        raise UserError(f"no model can be written in {directory.parent}: {reason}") from error


def read_card(directory: str | os.PathLike[str]) -> ModelCard:
    """What the `model.json` of a model directory says: classes, preprocessing, where it comes from.

    Args:
      directory: that conversion or training wrote.

    Returns:
      A `ModelCard`.

    Raises:
      UserError: there is no `model.json`, or it is not one, or not as it was written.
    """
    place = Path(directory).expanduser()
    path = place / CARD
    if not path.is_file():
        raise UserError(f"{directory} is no model directory: {_missing_card(place)}")
    text = read_file(path, MOST_BYTES)
    try:
        card = ModelCard.from_json(parse_json(text, "it"))
    except BROKEN_CARD as error:
        raise UserError(f"{path} is no description of a model: {one_line(error)}") from error
    digests = read_digests(place)
    try:
        check_digests(place, {CARD: digests[CARD]} if CARD in digests else {})
    except UserError as error:
        raise UserError(
            f"{error}; if you changed it on purpose, remove its line from {place / DIGESTS}"
        ) from error
    return card


def _missing_card(place: Path) -> str:
    """Why there is no `model.json` in `place`, and what there is to do."""
    if not place.exists():
        previous = previous_path(place)
        if previous.exists():
            return f"a kill cut short its replacement; what was there before is {previous}"
        return "there is no such folder"
    if place.is_file():
        return "it is a file; convert_torch_weights.py makes a model directory of PyTorch's files"
    if (place / "model" / "model.json").is_file():
        return f"it is that of a run, whose model is {place / 'model'}"
    return "it has no model.json; convert_torch_weights.py and train.py write such directories"


def read_weights(directory: str | os.PathLike[str], card: ModelCard, kind: str) -> Variables:
    """The variables of one kind, as numpy arrays in the dtypes written.

    Args:
      directory: a model directory.
      card: what `read_card` gives of it.
      kind: one of `card.kinds`.

    Raises:
      UserError: they are missing, unreadable, not as they were written, not finite, or not those
        of the model that `card` names.
    """
    place = Path(directory).expanduser().absolute()
    path = place / "weights" / kind
    try:
        # The weights of the other kind may have been removed to save space.
        removed = tuple(
            f"weights/{other}/"
            for other in card.kinds
            if other != kind and not (place / "weights" / other).exists()
        )
        digests = read_digests(place).items()
        check_digests(place, {name: sum_ for name, sum_ in digests if not name.startswith(removed)})
    except UserError as error:
        raise UserError(
            f"{path} cannot be read: {error}; take another copy of {directory}"
        ) from error
    try:
        with without_tracebacks(), ocp.StandardCheckpointer() as checkpointer:
            variables = checkpointer.restore(path)
    except MemoryError:
        raise
    except Exception as error:  # orbax and its parts raise many kinds
        reason = one_line(str(error).split("\n")[0]) or type(error).__name__
        raise UserError(f"{path} cannot be read: {reason}") from error
    variables = jax.tree.map(np.asarray, variables)
    shapes = {key: value.shape for key, value in traverse_util.flatten_dict(variables).items()}
    expected = variable_shapes(card.model)
    wrong = [key for key in shapes | expected if shapes.get(key) != expected.get(key)]
    if wrong:
        name, found = "/".join(wrong[0][1:]), shapes.get(wrong[0], "absent")
        raise UserError(
            f"{path} does not fit the model.json beside it: {len(wrong)} parameters differ; "
            f"{name} is {found}, expected {expected.get(wrong[0], 'none')}"
        )
    if broken := describe_non_finite(variables):
        raise UserError(f"{path} cannot be used: {broken}")
    return variables


def load_pretrained(
    directory: str | os.PathLike[str], weights: str = "auto"
) -> tuple[Model, Variables]:
    """The model and the weights that conversion or training wrote.

    Args:
      directory: a model directory.
      weights: 'ema', 'model', or 'auto': the directory's default, which is the average where
        there is one unless conversion was told otherwise.

    Returns:
      The linen module, and its variables, `{'params': tree}` and for segmentation `batch_stats`,
      arrays on the default device.

    Raises:
      UserError: no such directory, or one that is incomplete or lacks these weights.
    """
    card = read_card(directory)
    kind = card.default_kind if weights == "auto" else choose_kind(card.kinds, weights, directory)
    variables = read_weights(directory, card, kind)
    return card.model, jax.tree.map(jnp.asarray, variables)
