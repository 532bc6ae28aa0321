"""Every setting of a run, with its default; configs change what differs from these."""

from functools import reduce
from operator import getitem
from typing import Any

from ml_collections import ConfigDict

from activemlp_jax.data.device import IMAGENET_MEAN, IMAGENET_STD
from activemlp_jax.data.sources import SOURCES
from activemlp_jax.errors import UserError
from activemlp_jax.models.backbone import MIN_IMAGE_SIDE, ActiveMLP

# These do not change what a run computes, so a run may be resumed with others.
FREE_TO_CHANGE = ("tensorboard", "data.num_threads", "checkpoint.keep", "checkpoint.every_epochs")

DTYPES = ("bfloat16", "float32", "float64")


def default_config() -> ConfigDict:
    """The settings of a run on the digits, locked: keys can be changed, not added."""
    config = ConfigDict()
    config.seed = 0
    config.epochs = 30
    config.batch_size = 128  # over all devices
    config.eval_batch_size = 128
    config.label_smoothing = 0.1
    config.ema_decay = 0.99996  # 0 keeps no average
    config.tensorboard = False

    config.model = ConfigDict()  # the fields of ActiveMLP; num_classes is the data set's
    config.model.depths = (2, 2, 2, 2)
    config.model.embed_dims = (32, 64, 96, 128)
    config.model.mlp_ratios = (4.0, 4.0, 4.0, 4.0)
    config.model.share_dims = (2, 4, 4, 8)
    config.model.offset_interval = 2
    config.model.drop_path_rate = 0.0
    config.model.dtype = "float32"  # of the computation

    config.data = ConfigDict()
    config.data.name = "digits"
    config.data.image_size = 32
    config.data.mean = IMAGENET_MEAN
    config.data.std = IMAGENET_STD
    config.data.num_threads = 2
    config.data.warp = ConfigDict()  # see transforms.random_warp
    config.data.warp.degrees = 0.0
    config.data.warp.scale = 0.0
    config.data.warp.shear = 0.0
    config.data.warp.translate = 0.0
    config.data.warp.bend = 0.0

    config.optimizer = ConfigDict()  # AdamW
    config.optimizer.learning_rate = 5e-4  # the highest, after the warm-up
    config.optimizer.warmup_learning_rate = 1e-6
    config.optimizer.final_learning_rate = 1e-5
    config.optimizer.warmup_epochs = 5
    config.optimizer.weight_decay = 0.05
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8

    config.checkpoint = ConfigDict()
    config.checkpoint.every_epochs = 1
    config.checkpoint.keep = 2
    return config.lock()


def build_model(config: ConfigDict, num_classes: int) -> ActiveMLP:
    """The model of `config.model`.

    Raises:
      UserError: fields that fit no model.
    """
    try:
        return ActiveMLP(**config.model, num_classes=num_classes)
    except ValueError as error:
        raise UserError(f"config.model: {error}") from error


def check_config(config: ConfigDict) -> None:
    """Raises UserError, naming the key, the value and what was expected, before any work."""
    model = config.model
    if model.dtype not in DTYPES:
        raise UserError(f"config.model.dtype is {model.dtype!r}, expected one of {DTYPES}")
    build_model(config, num_classes=1)

    def require(key: str, holds: bool, expected: str) -> None:
        if not holds:
            value = reduce(getitem, key.split("."), config)
            raise UserError(f"config.{key} is {value!r}, expected {expected}")

    size = config.data.image_size
    require("data.image_size", size >= MIN_IMAGE_SIDE, f"at least {MIN_IMAGE_SIDE}")
    require("data.name", config.data.name in SOURCES, f"one of {', '.join(sorted(SOURCES))}")
    require("data.num_threads", config.data.num_threads >= 0, "0 or more")
    require("data.warp.scale", 0 <= config.data.warp.scale < 1, "0 <= scale < 1")
    require("seed", config.seed >= 0, "0 or more")
    require("epochs", config.epochs >= 1, "at least 1")
    require("batch_size", config.batch_size >= 1, "at least 1")
    require("eval_batch_size", config.eval_batch_size >= 1, "at least 1")
    require("label_smoothing", 0 <= config.label_smoothing < 1, "0 <= smoothing < 1")
    require("ema_decay", 0 <= config.ema_decay < 1, "0 <= decay < 1")
    optimizer = config.optimizer
    require("optimizer.learning_rate", optimizer.learning_rate > 0, "more than 0")
    require("optimizer.warmup_epochs", optimizer.warmup_epochs >= 0, "0 or more")
    require("checkpoint.every_epochs", config.checkpoint.every_epochs >= 1, "at least 1")
    require("checkpoint.keep", config.checkpoint.keep >= 1, "at least 1")


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat.update(_flatten(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return flat


def differing_keys(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Keys on which two runs' settings disagree in what the run computes, each with both values."""
    a, b = _flatten(ours), _flatten(theirs)
    return [
        f"{key} ({b.get(key, 'absent')!r} there, {a.get(key, 'absent')!r} here)"
        for key in sorted(a.keys() | b.keys())
        if a.get(key, "absent") != b.get(key, "absent") and key not in FREE_TO_CHANGE
    ]
