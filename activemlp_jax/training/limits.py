"""Allowed values of each config key on its own."""

import math
from collections.abc import Callable
from functools import reduce
from operator import getitem
from typing import Any

from ml_collections import ConfigDict

from activemlp_jax.models.active_mlp import MIN_IMAGE_SIDE
from activemlp_jax.models.segmentor import HEADS
from activemlp_jax.training.optimizer import NOT_DECAYED, OPTIMIZERS
from activemlp_jax.training.schedules import SCHEDULES
from activemlp_jax.utils.errors import UserError

# Keys, a condition on their values, and its description. ml_collections checks the types.
LIMITS: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (
        (
            "epochs",
            "batch_size",
            "eval_batch_size",
            "mix.group_size",
            "data.repeats",
            "accumulation",
            "log_every_steps",
            "mesh.fsdp",
            "checkpoint.every_epochs",
            "checkpoint.keep",
            "test.every_epochs",
            "test.size_multiple",
            "head.aux_channels",
            "head.neck_channels",
            "data.scene.short_side",
        ),
        lambda value: value >= 1,
        "at least 1",
    ),
    (("data.resize_factor",), lambda value: value >= 1, "1 or more"),
    (
        ("data.image_size",),
        lambda value: value >= MIN_IMAGE_SIDE,
        f"at least {MIN_IMAGE_SIDE}",
    ),
    (("mesh.data",), lambda value: value == -1 or value >= 1, "-1 or at least 1"),
    # JAX's random keys use 32 bits of a seed.
    (("seed",), lambda value: 0 <= value < 2**32, "0 <= seed < 2**32"),
    (
        (
            "label_smoothing",
            "ema_decay",
            "head.dropout_rate",
            "optimizer.b1",
            "optimizer.b2",
            "data.warp.scale",
        ),
        lambda value: 0 <= value < 1,
        "0 <= value < 1",
    ),
    (
        ("data.flip", "random_erasing", "mix.cutmix_probability"),
        lambda value: 0 <= value <= 1,
        "0 <= value <= 1",
    ),
    (
        (
            "data.crop.min_area",
            "data.crop.max_area",
            "data.scene.max_class_share",
            "optimizer.layer_decay",
        ),
        lambda value: 0 < value <= 1,
        "0 < value <= 1",
    ),
    (
        (
            "data.crop.min_ratio",
            "data.crop.max_ratio",
            "data.scene.min_ratio",
            "data.scene.max_ratio",
            "optimizer.learning_rate",
        ),
        lambda value: value > 0,
        "more than 0",
    ),
    *(
        ((key,), lambda value, choices=choices: value in choices, f"one of {', '.join(choices)}")
        for key, choices in (
            ("head.name", tuple(HEADS)),
            ("init_weights", ("auto", "ema", "model")),
            ("model.dtype", ("bfloat16", "float32", "float64")),
            ("optimizer.name", tuple(OPTIMIZERS)),
            ("optimizer.not_decayed", NOT_DECAYED),
            ("data.augmentation", ("warp", "random_resized_crop")),
            ("data.on_error", ("skip", "raise")),
            ("optimizer.schedule", tuple(SCHEDULES)),
        )
    ),
    (("data.train_split", "data.test_split"), lambda value: value != "", "the name of a split"),
    (
        (
            "optimizer.warmup_learning_rate",
            "optimizer.final_learning_rate",
            "optimizer.warmup_epochs",
            "optimizer.warmup_steps",
            "optimizer.weight_decay",
            "optimizer.eps",
            "steps",
            "head.channels",
            "optimizer.reference_batch_size",
            "optimizer.clip_norm",
            "mix.mixup_alpha",
            "mix.cutmix_alpha",
            "data.num_threads",
            "data.num_workers",
            "data.max_skipped",
            "data.scene.long_side",
            "profile",
            "checkpoint.every_steps",
            "checkpoint.every_minutes",
            "data.color_jitter",
            "data.warp.degrees",
            "data.warp.shear",
            "data.warp.translate",
            "data.warp.bend",
        ),
        lambda value: value >= 0,
        "0 or more",
    ),
)

# Upper limits far above what any run needs, to catch typing errors early.
MAXIMA: tuple[tuple[float, tuple[str, ...]], ...] = (
    (
        10**20,  # a run that diverges stops when a metric is not finite
        (
            "optimizer.learning_rate",
            "optimizer.warmup_learning_rate",
            "optimizer.final_learning_rate",
        ),
    ),
    (
        10**7,
        (
            "epochs",
            "steps",
            "log_every_steps",
            "profile",
            "test.every_epochs",
            "checkpoint.every_epochs",
            "checkpoint.every_steps",
            "checkpoint.every_minutes",
            "checkpoint.keep",
            "data.max_skipped",
            "optimizer.warmup_epochs",
            "optimizer.warmup_steps",
            "optimizer.clip_norm",
        ),
    ),
    (
        10**6,
        (
            "batch_size",
            "eval_batch_size",
            "accumulation",
            "mix.group_size",
            "optimizer.reference_batch_size",
            "mesh.data",
            "mesh.fsdp",
        ),
    ),
    (
        2**16,
        (
            "model.embed_dims",
            "model.share_dims",
            "head.channels",
            "head.aux_channels",
            "head.neck_channels",
        ),
    ),
    (2**14, ("data.scene.long_side", "data.scene.short_side")),
    (2**12, ("data.image_size", "test.size_multiple")),
    (
        1000,
        (
            "data.num_threads",
            "data.num_workers",
            "data.repeats",
            "data.mean",
            "data.std",
            "mix.mixup_alpha",
            "mix.cutmix_alpha",
            "model.depths",
            "model.offset_interval",
            "optimizer.weight_decay",
        ),
    ),
    (360, ("data.warp.degrees",)),
    (
        100,
        (
            "data.crop.min_ratio",
            "data.crop.max_ratio",
            "data.scene.min_ratio",
            "data.scene.max_ratio",
            "model.mlp_ratios",
        ),
    ),
    (
        10,
        (
            "data.color_jitter",
            "data.warp.shear",
            "data.warp.translate",
            "data.warp.bend",
        ),
    ),
    (4, ("data.resize_factor",)),
    (1, ("optimizer.eps",)),
)


def check_values(config: ConfigDict) -> None:
    """Raise UserError, naming the key, for a value outside `LIMITS` or above `MAXIMA`."""
    for keys, is_valid, expected in LIMITS:
        for key in keys:
            value = reduce(getitem, key.split("."), config)
            infinite = isinstance(value, float) and not math.isfinite(value)
            if infinite or not is_valid(value):
                raise UserError(f"config.{key} is {value!r}, expected {expected}")
    for maximum, keys in MAXIMA:
        for key in keys:
            value = reduce(getitem, key.split("."), config)
            numbers = value if isinstance(value, tuple) else (value,)
            if any(isinstance(number, int | float) and number > maximum for number in numbers):
                raise UserError(f"config.{key} is {value!r}, expected at most {maximum:,}")
