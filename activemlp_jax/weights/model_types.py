"""The types of models, in one table, and the description of a model's architecture as JSON."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from activemlp_jax.data.preprocessing import Preprocessing, ScenePreprocessing
from activemlp_jax.models.active_mlp import ActiveMLP
from activemlp_jax.models.segmentor import ActiveSegmentor, Model, backbone, variant_name
from activemlp_jax.utils.json_files import expect, short

ARCHITECTURE = ("depths", "embed_dims", "mlp_ratios", "share_dims", "offset_interval")
HEAD = ("head", "channels", "aux_channels", "neck_channels")


class ModelType(NamedTuple):
    """What the tools for weights know about a type of models.

    If the original trains such models with mmsegmentation, their checkpoints have one set of
    weights and are for images of any size.
    """

    task: str  # of a model, unless its card names another
    preprocessing: type[Any]  # its defaults are those of the published models
    dataset: str  # of the published models
    num_classes: int  # of that dataset
    head: tuple[str, ...] = ()  # fields of the architecture next to those of the backbone
    uses_mmsegmentation: bool = False


MODEL_TYPES: dict[type[Model], ModelType] = {
    ActiveMLP: ModelType("classification", Preprocessing, "ImageNet", 1000),
    ActiveSegmentor: ModelType("segmentation", ScenePreprocessing, "ADE20K", 150, HEAD, True),
}

# Type and range of each number of an architecture. The limits are above what any model needs, and
# low enough that a file cannot demand much memory.
MAX_BLOCKS = 500  # in all stages together; published variants have up to 41
MAX_ROWS = 2**20  # first dimension of a weight: features, hidden features or classes
LIMITS: dict[str, tuple[Any, int, int]] = {
    "depths": (int, 0, MAX_BLOCKS),
    "mlp_ratios": (int | float, 0, 64),
    "offset_interval": (int, 1, 2**31),
    **dict.fromkeys(("embed_dims", "share_dims"), (int, 0, 2**16)),
    **dict.fromkeys(("channels", "aux_channels", "neck_channels"), (int, 1, 2**16)),
}
STAGES = ("depths", "embed_dims", "share_dims", "mlp_ratios")  # four numbers, one for each stage


def model_type(model: Model) -> ModelType:
    """Return the entry of `MODEL_TYPES` for a model."""
    for kind, entry in MODEL_TYPES.items():
        if isinstance(model, kind):
            return entry
    known = ", ".join(kind.__name__ for kind in MODEL_TYPES)
    raise TypeError(f"the model is a {type(model).__name__}, expected one of {known}")


def architecture(model: Model) -> dict[str, Any]:
    """Return the fields that define a model's architecture, without the number of classes."""
    fields = {field: getattr(backbone(model), field) for field in ARCHITECTURE}
    head = {field: getattr(model, field) for field in model_type(model).head}
    return {"backbone": fields, **head} if head else fields


def build_model(fields: Any, num_classes: int) -> Model:
    """Build the model that has an `architecture`, given as parsed JSON; raise ValueError."""
    if isinstance(fields, Mapping) and "backbone" in fields:
        head = _check_fields(fields, "architecture", ("backbone", *HEAD))
        network = _check_fields(head["backbone"], "architecture.backbone", ARCHITECTURE)
        return ActiveSegmentor(**{**head, "backbone": network, "num_classes": num_classes})
    return ActiveMLP(**_check_fields(fields, "architecture", ARCHITECTURE), num_classes=num_classes)


def _check_fields(fields: Any, name: str, keys: Collection[str]) -> dict[str, Any]:
    """Check the keys and numbers of an architecture; return it with lists as tuples."""
    check_keys(fields, name, keys, keys)
    for field in filter(LIMITS.__contains__, keys):
        value, path = fields[field], f"{name}.{field}"
        if field in STAGES:
            check(isinstance(value, list | tuple) and len(value) == 4, path, value, "four numbers")
        for number in value if field in STAGES else (value,):
            expect(number, path, *LIMITS[field])
    expect(sum(fields.get("depths", ())), f"the sum of {name}.depths", int, 0, MAX_BLOCKS)
    return tuples(fields)


def check(is_valid: bool, name: str, value: object, expected: object) -> None:
    """Raise ValueError, which names the value, unless it is valid."""
    if not is_valid:
        raise ValueError(f"{name} is {short(value)}, expected {expected}")


def check_keys(
    content: Any, name: str, keys: Collection[str], known: Collection[str] | None = None
) -> None:
    """Raise ValueError if `content` is not a mapping, lacks a key, or has one not in `known`."""
    check(isinstance(content, Mapping), name, content, "an object")
    missing = [key for key in keys if key not in content]
    if missing:
        raise ValueError(f"{name} has no {', '.join(missing)}")
    unknown = [key for key in content if known is not None and key not in known]
    if unknown:
        raise ValueError(f"{name} has {short(unknown[0])}, which is unknown")


def tuples(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of parsed JSON with its lists converted to tuples."""
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
    }


def title(model: Model) -> str:
    """Name the variant and the head of a model, as in 'active_large under upernet'."""
    name, head = variant_name(model), architecture(model).get("head")
    return (name or "an ActiveMLP of no published variant") + (f" under {head}" if head else "")


def describe_architecture(model: Model) -> str:
    """Describe the variant, the head and the size of a model, for errors."""
    network = backbone(model)
    return f"{title(model)} (depths {network.depths}, embed_dims {network.embed_dims})"
