"""Every setting of a run, with its default; configs change what differs from these."""

import math
from collections.abc import Callable
from functools import reduce
from operator import getitem
from typing import Any

from ml_collections import ConfigDict

from activemlp_jax.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from activemlp_jax.errors import UserError
from activemlp_jax.models.backbone import ActiveMLP

# These do not change what a run computes, so a run may be resumed with others.
FREE_TO_CHANGE = ("tensorboard", "data.num_threads", "checkpoint.keep", "checkpoint.every_epochs")

DTYPES = ("bfloat16", "float32")


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
    # A model directory to start from: its weights, and its architecture in place of config.model's.
    config.init_from = ""

    config.model = ConfigDict()  # the fields of ActiveMLP; num_classes is the data set's
    config.model.depths = (2, 2, 2, 2)
    config.model.embed_dims = (32, 64, 96, 128)
    config.model.mlp_ratios = (4.0, 4.0, 4.0, 4.0)
    config.model.share_dims = (2, 4, 4, 8)
    config.model.offset_interval = 2
    config.model.drop_path_rate = 0.0
    config.model.dtype = "float32"  # of the computation

    config.data = ConfigDict()
    config.data.name = "digits"  # or folder:PATH, or tfds:NAME; see sources.open_source
    config.data.train_split = "train"
    config.data.test_split = "test"
    config.data.image_size = 32
    config.data.resize_factor = 256 / 224  # of evaluation; see preprocessing.Preprocessing
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


def build_preprocessing(config: ConfigDict) -> Preprocessing:
    """The preprocessing of `config.data`, for evaluation.

    Raises:
      UserError: a value that cannot work.
    """
    data = config.data
    try:
        return Preprocessing(data.image_size, data.resize_factor, data.mean, data.std)
    except ValueError as error:
        raise UserError(f"config.data.{error}") from error


# What a value must be to work: keys, condition, and the words for it. Types are ml_collections'.
LIMITS: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (
        ("epochs", "batch_size", "eval_batch_size", "checkpoint.every_epochs", "checkpoint.keep"),
        lambda value: value >= 1,
        "at least 1",
    ),
    # JAX's keys keep 32 bits of a seed.
    (("seed",), lambda value: 0 <= value < 2**32, "0 <= seed < 2**32"),
    (
        ("label_smoothing", "ema_decay", "optimizer.b1", "optimizer.b2", "data.warp.scale"),
        lambda value: 0 <= value < 1,
        "0 <= value < 1",
    ),
    (("data.train_split", "data.test_split"), lambda value: value != "", "the name of a split"),
    (("model.dtype",), lambda value: value in DTYPES, f"one of {', '.join(DTYPES)}"),
    (("optimizer.learning_rate",), lambda value: value > 0, "more than 0"),
    (
        (
            "optimizer.warmup_learning_rate",
            "optimizer.final_learning_rate",
            "optimizer.warmup_epochs",
            "optimizer.weight_decay",
            "optimizer.eps",
            "data.num_threads",
            "data.warp.degrees",
            "data.warp.shear",
            "data.warp.translate",
            "data.warp.bend",
        ),
        lambda value: value >= 0,
        "0 or more",
    ),
)


def check_config(config: ConfigDict) -> None:
    """Raises UserError, naming the key, the value and what was expected, before any work."""
    for keys, holds, expected in LIMITS:
        for key in keys:
            value = reduce(getitem, key.split("."), config)
            infinite = isinstance(value, float) and not math.isfinite(value)
            if infinite or not holds(value):
                raise UserError(f"config.{key} is {value!r}, expected {expected}")
    build_model(config, num_classes=1)
    build_preprocessing(config)


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
