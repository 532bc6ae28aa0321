"""The model directory: weights and all one must know to use them.

    model.json     architecture, classes, preprocessing, where the weights come from
    weights/ema    the averaged parameters, by orbax, where there are any
    weights/model  the parameters as training left them, likewise

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

from activemlp_jax.data.preprocessing import Preprocessing
from activemlp_jax.errors import UserError
from activemlp_jax.models.backbone import ActiveMLP, create_model, list_models
from activemlp_jax.weights.torch_files import choose_kind
from activemlp_jax.weights.torch_names import parameter_shapes

FORMAT = 1
ARCHITECTURE = ("depths", "embed_dims", "mlp_ratios", "share_dims", "offset_interval")

# What `ModelCard.from_json` raises where there is none.
BROKEN_CARD = (AttributeError, KeyError, TypeError, ValueError)

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """What `model.json` says.

    Args:
      model: of the weights, in float32 and without drop path.
      preprocessing: that the weights were made for.
      kinds: of weights, out of 'ema' and 'model'.
      default_kind: the one to use where none is asked for.
      class_names: by label, where they are known.
      source: where the weights come from, as JSON takes it.
    """

    model: ActiveMLP
    preprocessing: Preprocessing
    kinds: tuple[str, ...]
    default_kind: str
    class_names: tuple[str, ...] | None = None
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str | None:
        """The published variant's, or None where it is none of them."""
        return variant_name(self.model)

    def to_json(self) -> dict[str, Any]:
        """As written."""
        return {
            "format": FORMAT,
            "name": self.name,
            "architecture": {field: getattr(self.model, field) for field in ARCHITECTURE},
            "classes": {"number": self.model.num_classes, "names": self.class_names},
            "preprocessing": dataclasses.asdict(self.preprocessing),
            "weights": {"kinds": self.kinds, "default": self.default_kind},
            "source": dict(self.source),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "ModelCard":
        """The inverse of `to_json`; raises one of `BROKEN_CARD` if `content` is no such thing."""
        if content["format"] != FORMAT:
            raise ValueError(f"format is {content['format']!r}, expected {FORMAT}")
        classes, weights = content["classes"], content["weights"]
        architecture: dict[str, Any] = {
            field: tuple(value) if isinstance(value, list) else value
            for field, value in content["architecture"].items()
        }
        preprocessing = dict(content["preprocessing"])
        for field in ("mean", "std"):
            preprocessing[field] = tuple(preprocessing[field])
        kinds, default = tuple(weights["kinds"]), weights["default"]
        if default not in kinds:
            raise ValueError(f"weights {default!r} are the default, but there are only {kinds}")
        names = tuple(classes["names"]) if classes["names"] else None
        if names and len(names) != classes["number"]:
            raise ValueError(f"{len(names)} names for {classes['number']} classes")
        return cls(
            ActiveMLP(**architecture, num_classes=classes["number"]),
            Preprocessing(**preprocessing),
            kinds,
            default,
            names,
            content["source"],
        )


def variant_name(model: ActiveMLP) -> str | None:
    """The published variant that `model` is, at any number of classes."""
    plain = model.clone(drop_path_rate=0.0, dtype=jnp.float32, remat_stages=())
    same = (name for name in list_models() if create_model(name, model.num_classes) == plain)
    return next(same, None)


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


def write_model(directory: Path, card: ModelCard, weights: Mapping[str, Params]) -> None:
    """Fill an empty directory; of several hosts, one alone calls it.

    Args:
      directory: to write into; see `whole_or_nothing`.
      card: what to say of the weights.
      weights: parameters of `card.model`, numpy arrays, by the kinds that `card` names.
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
    """What `model.json` says; UserError if there is none or it is not one."""
    path = Path(directory).expanduser() / "model.json"
    if not path.is_file():
        raise UserError(
            f"{directory} is no model directory: it has no model.json; convert_torch_weights.py "
            "and train.py write such directories"
        )
    try:
        return ModelCard.from_json(json.loads(path.read_text()))
    except BROKEN_CARD as error:
        raise UserError(
            f"{path} is no description of a model: {type(error).__name__}: {error}"
        ) from error


def read_weights(directory: str | os.PathLike[str], card: ModelCard, kind: str) -> Params:
    """The parameters of one kind, as numpy arrays in the dtypes written.

    Raises:
      UserError: they are missing, unreadable, or not those of the model that `card` names.
    """
    path = Path(directory).expanduser().absolute() / "weights" / kind
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore(path)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{path} cannot be read: {reason}") from error
    params = jax.tree.map(np.asarray, params)
    shapes = {key: value.shape for key, value in traverse_util.flatten_dict(params).items()}
    expected = parameter_shapes(card.model)
    wrong = [key for key in shapes | expected if shapes.get(key) != expected.get(key)]
    if wrong:
        name, found = "/".join(wrong[0]), shapes.get(wrong[0], "absent")
        raise UserError(
            f"{path} does not fit the model.json beside it: {len(wrong)} parameters differ; "
            f"{name} is {found}, expected {expected.get(wrong[0], 'none')}"
        )
    return params


def load_pretrained(
    directory: str | os.PathLike[str], weights: str = "auto"
) -> tuple[ActiveMLP, dict[str, Any]]:
    """The model and the weights that conversion or training wrote.

    Args:
      directory: a model directory.
      weights: 'ema', 'model', or 'auto': the directory's default, which is the average where
        there is one unless conversion was told otherwise.

    Returns:
      The linen module, and its variables `{'params': tree}`, arrays on the default device.

    Raises:
      UserError: no such directory, or one that is incomplete or lacks these weights.
    """
    card = read_card(directory)
    kind = card.default_kind if weights == "auto" else choose_kind(card.kinds, weights, directory)
    params = read_weights(directory, card, kind)
    return card.model, {"params": jax.tree.map(jnp.asarray, params)}
