"""The model directory: weights and all one must know to use them.

    model.json     architecture, classes, preprocessing, where the weights come from
    weights/ema    the averaged variables, by orbax, where there are any
    weights/model  the variables as training left them, likewise

Variables are `params`, and for segmentation `batch_stats`.

Conversion and training write it; every other tool takes just the directory.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from activemlp_jax.data.examples import check_same_classes
from activemlp_jax.data.preprocessing import Preprocessing, ScenePreprocessing
from activemlp_jax.errors import UserError
from activemlp_jax.models.backbone import ActiveMLP
from activemlp_jax.models.segmentation import ActiveSegmentor
from activemlp_jax.weights.architecture import Model, backbone, list_keys, variant_name
from activemlp_jax.weights.torch_files import choose_kind
from activemlp_jax.weights.torch_names import variable_shapes

FORMAT = 2
ARCHITECTURE = ("depths", "embed_dims", "mlp_ratios", "share_dims", "offset_interval")
HEAD = ("head", "channels", "aux_channels", "neck_channels")

# What `ModelCard.from_json` raises where there is none.
BROKEN_CARD = (AttributeError, KeyError, TypeError, ValueError)

Variables = dict[str, Any]  # what a model's `apply` takes, as arrays


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """What `model.json` says of the weights beside it.

    Args:
      model: of the weights, in float32 and without drop path.
      preprocessing: that the weights were made for; of a segmentor, a `ScenePreprocessing`.
      kinds: of weights, out of 'ema' and 'model'.
      default_kind: the one to use where none is asked for.
      class_names: by label, where they are known.
      source: where the weights come from, as JSON takes it. Training says the data set, the recipe,
        and what was measured, in percent, on how many images; conversion says the file, its SHA-256
        and the epoch.
    """

    model: Model
    preprocessing: Preprocessing | ScenePreprocessing
    kinds: tuple[str, ...]
    default_kind: str
    class_names: tuple[str, ...] | None = None
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str | None:
        """The published variant's, also of a backbone; None where it is none of them."""
        return variant_name(self.model)

    @property
    def is_segmentor(self) -> bool:
        """Whether the model labels pixels, not images."""
        return isinstance(self.model, ActiveSegmentor)

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
          By key: `format`, the number of this form; `task`, 'classification' or 'segmentation';
          `name`, that of the published variant or None; `architecture`, the fields of `ActiveMLP`
          that say its shape, for segmentation under `backbone` beside those of the head; `classes`,
          their `number`, and their `names` by label or None; `preprocessing`, its fields, with
          sides in pixels, and mean and standard deviation of values from 0 to 1; `weights`, the
          `kinds` that there are and the `default`; and `source`, as it is.
        """
        return {
            "format": FORMAT,
            "task": "segmentation" if self.is_segmentor else "classification",
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
          AttributeError, KeyError, TypeError, ValueError: it is not of this form, or contradicts
            itself.
        """
        if content["format"] != FORMAT:
            raise ValueError(f"format is {content['format']!r}, expected {FORMAT}")
        classes, weights = content["classes"], content["weights"]
        if content["task"] not in ("classification", "segmentation"):
            raise ValueError(f"task is {content['task']!r}, which is unknown")
        to_segment = content["task"] == "segmentation"
        preprocessing = dict(content["preprocessing"])
        for field in ("mean", "std"):
            preprocessing[field] = tuple(preprocessing[field])
        kinds, default = tuple(weights["kinds"]), weights["default"]
        if default not in kinds:
            raise ValueError(f"weights {default!r} are the default, but there are only {kinds}")
        names = tuple(classes["names"]) if classes["names"] else None
        if names and len(names) != classes["number"]:
            raise ValueError(f"{len(names)} names for {classes['number']} classes")
        model_type = ActiveSegmentor if to_segment else ActiveMLP
        return cls(
            model_type(**_tuples(content["architecture"]), num_classes=classes["number"]),
            ScenePreprocessing(**preprocessing) if to_segment else Preprocessing(**preprocessing),
            kinds,
            default,
            names,
            content["source"],
        )


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
    """Raises ValueError if `card` is no card of a model such as `model`."""
    if not isinstance(card, ModelCard):
        raise ValueError(f"card is a {type(card).__name__}, expected what read_card gives")
    ours, theirs = (f"{type(m).__name__} of {m.num_classes} classes" for m in (model, card.model))
    if ours != theirs:
        raise ValueError(f"card is of an {theirs}, but the model is an {ours}")


@contextlib.contextmanager
def whole_or_nothing(directory: Path) -> Iterator[Path]:
    """A new directory to write into, which takes the place of `directory` if nothing is raised."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{directory.name}.", suffix=".partial", dir=directory.parent
    ) as aside:
        written = Path(aside) / directory.name
        written.mkdir()
        yield written
        if directory.exists():
            shutil.rmtree(directory)
        written.rename(directory)


def write_model(directory: Path, card: ModelCard, weights: Mapping[str, Variables]) -> None:
    """Fill an empty directory; of several hosts, one alone calls it.

    Args:
      directory: to write into; see `whole_or_nothing`.
      card: what to say of the weights.
      weights: variables of `card.model`, numpy arrays, by the kinds that `card` names.
    """
    host = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=host, active_processes={host}, barrier_sync_key_prefix="write_model"
    )
    with ocp.StandardCheckpointer(multiprocessing_options=alone) as checkpointer:
        for kind in card.kinds:
            checkpointer.save(directory.absolute() / "weights" / kind, weights[kind])
    # A line a topic: easier to read than a line a number.
    topics = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in card.to_json().items()]
    (directory / "model.json").write_text("{\n" + ",\n".join(topics) + "\n}\n")


def read_card(directory: str | os.PathLike[str]) -> ModelCard:
    """What the `model.json` of a model directory says: classes, preprocessing, where it comes from.

    Args:
      directory: that conversion or training wrote.

    Returns:
      A `ModelCard`.

    Raises:
      UserError: there is no `model.json`, or it is not one.
    """
    place = Path(directory).expanduser()
    path = place / "model.json"
    if not path.is_file():
        raise UserError(f"{directory} is no model directory: {_missing_card(place)}")
    try:
        return ModelCard.from_json(json.loads(path.read_text()))
    except BROKEN_CARD as error:
        raise UserError(
            f"{path} is no description of a model: {type(error).__name__}: {error}"
        ) from error


def _missing_card(place: Path) -> str:
    """Why there is no `model.json` in `place`, and what there is to do."""
    if not place.exists():
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
      UserError: they are missing, unreadable, or not those of the model that `card` names.
    """
    path = Path(directory).expanduser().absolute() / "weights" / kind
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            variables = checkpointer.restore(path)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0]
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
