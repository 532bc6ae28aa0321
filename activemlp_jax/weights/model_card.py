"""The model card: the content of a `model.json`, which describes a model directory's weights."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from activemlp_jax.data.base import check_same_classes
from activemlp_jax.data.preprocessing import Preprocessing, ScenePreprocessing
from activemlp_jax.models.segmentor import Model, variant_name
from activemlp_jax.utils.errors import UserError
from activemlp_jax.utils.json_files import expect, short
from activemlp_jax.weights.model_types import (
    MAX_ROWS,
    architecture,
    build_model,
    check,
    check_keys,
    model_type,
    title,
    tuples,
)
from activemlp_jax.weights.torch_files import KINDS
from activemlp_jax.weights.torch_names import list_keys

FORMAT = 2
# The objects that a model.json must have, and the keys that each must have at least. 'it' is the
# whole file.
KEYS: dict[str, tuple[str, ...]] = {
    "it": ("format", "task", "architecture", "classes", "preprocessing", "weights", "source"),
    "architecture": (),
    "classes": ("number", "names"),
    "preprocessing": ("mean", "std"),
    "weights": ("kinds", "default"),
    "source": (),
}
# Errors that `ModelCard.from_json` raises for content that is not a valid model.json.
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
      task: the task that the model was trained for; by default, that of the model's type.
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
            object.__setattr__(self, "task", model_type(self.model).task)

    @property
    def name(self) -> str | None:
        """Name of the published variant, or of a segmentor's backbone; None for other models."""
        return variant_name(self.model)

    def __repr__(self) -> str:
        """Summarize the card on one line; `to_json` gives everything."""
        images = self.preprocessing.describe()
        kinds = [f"{kind}{' (default)' * (kind == self.default_kind)}" for kind in self.kinds]
        weights = f"weights {', '.join(kinds)}"
        return f"ModelCard({title(self.model)}, {self.describe_classes()}, {images}, {weights})"

    def describe_classes(self) -> str:
        """Say how many classes there are and what the first are called, on one line."""
        names = f" ({list_keys(list(self.class_names))})" if self.class_names else ""
        return f"{self.model.num_classes} classes{names}"

    def to_json(self) -> dict[str, Any]:
        """Return the content of `model.json` as a dict for `json.dumps`.

        `architecture` has the fields of `ActiveMLP` that define it; for segmentation, these are
        under `backbone`, next to the fields of the head.
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
        """Build a card from the parsed JSON of a `model.json`; this is the inverse of `to_json`.

        Raises one of `CARD_ERRORS` if the content is invalid, too large or contradicts itself.
        """
        for name, keys in KEYS.items():
            check_keys(content if name == "it" else content[name], name, keys)
        version, task, source = (content[name] for name in ("format", "task", "source"))
        number, names = content["classes"]["number"], content["classes"]["names"] or ()
        kinds, default = content["weights"]["kinds"], content["weights"]["default"]
        are_names = isinstance(names, list | tuple) and all(isinstance(n, str) for n in names)
        are_kinds = isinstance(kinds, list | tuple) and all(kind in [*KINDS] for kind in kinds)
        check(version == FORMAT, "format", version, FORMAT)
        check(isinstance(task, str) and task.isidentifier(), "task", task, "a name")
        expect(number, "classes.number", int, 1, MAX_ROWS)
        check(are_names, "classes.names", names, "a list of names")
        check(are_kinds, "weights.kinds", kinds, f"a list out of {[*KINDS]}")
        if names and len(names) != number:
            raise ValueError(f"{len(names)} names for {number} classes")
        if default not in kinds:
            raise ValueError(
                f"weights {short(default)} are the default, but there are only {tuple(kinds)}"
            )
        model = build_model(content["architecture"], number)
        make_preprocessing = model_type(model).preprocessing
        known = [field.name for field in dataclasses.fields(make_preprocessing)]
        check_keys(content["preprocessing"], "preprocessing", (), known)
        preprocessing = make_preprocessing(**tuples(content["preprocessing"]))  # checks the values
        return cls(model, preprocessing, tuple(kinds), default, tuple(names) or None, source, task)


def check_classes(card: ModelCard, class_names: tuple[str, ...], data: str) -> None:
    """Raise UserError if the classes of the dataset named `data` are not those of the model."""
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
